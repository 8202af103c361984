#!/bin/bash
# Entry point of the PostgreSQL image: makes the cluster at the first start, then becomes
# the server.  Understands the variables people know from Docker's postgres image:
# POSTGRES_PASSWORD, POSTGRES_USER, POSTGRES_DB (each also as NAME_FILE),
# POSTGRES_INITDB_ARGS, POSTGRES_INITDB_WALDIR, POSTGRES_HOST_AUTH_METHOD, PGDATA, and
# scripts in /docker-entrypoint-initdb.d.
set -Eeuo pipefail

readonly SCRIPTS=/docker-entrypoint-initdb.d

die() { printf 'Error: %s\n' "$*" >&2; exit 1; }

# value_of NAME DEFAULT: sets NAME from itself, from the file NAME_FILE names, or the default.
value_of() {
    local name=$1 file_name=$1_FILE
    if [[ -n ${!name:-} && -n ${!file_name:-} ]]; then
        die "both $name and $file_name are set (but are exclusive)"
    fi
    local value=${!name:-${2:-}}
    if [[ -n ${!file_name:-} ]]; then value=$(<"${!file_name}"); fi
    export "$name=$value"
    unset "$file_name"
}

# PostgreSQL refuses to run under a user that has no name: give an arbitrary --user one.
name_this_user() {
    getent passwd "$(id -u)" >/dev/null && return
    local wrapper
    for wrapper in /usr/lib/*/libnss_wrapper.so; do
        [[ -e $wrapper ]] || continue
        NSS_WRAPPER_PASSWD=$(mktemp) NSS_WRAPPER_GROUP=$(mktemp)
        printf 'postgres:x:%s:%s:PostgreSQL:%s:/bin/false\n' "$(id -u)" "$(id -g)" "$PGDATA" \
            >"$NSS_WRAPPER_PASSWD"
        printf 'postgres:x:%s:\n' "$(id -g)" >"$NSS_WRAPPER_GROUP"
        export LD_PRELOAD=$wrapper NSS_WRAPPER_PASSWD NSS_WRAPPER_GROUP
        return
    done
}

prepare_folders() {
    mkdir -p "$PGDATA" /run/postgresql
    chmod 700 "$PGDATA" 2>/dev/null || :
    chmod 3777 /run/postgresql 2>/dev/null || :
    if [[ -n ${POSTGRES_INITDB_WALDIR:-} ]]; then
        mkdir -p "$POSTGRES_INITDB_WALDIR"
        chmod 700 "$POSTGRES_INITDB_WALDIR"
    fi
    if [[ $(id -u) = 0 ]]; then
        local folder
        for folder in "$PGDATA" /run/postgresql ${POSTGRES_INITDB_WALDIR:+"$POSTGRES_INITDB_WALDIR"}; do
            find "$folder" \! -user postgres -exec chown postgres '{}' +
        done
    fi
}

check_password() {
    if [[ -z $POSTGRES_PASSWORD && $POSTGRES_HOST_AUTH_METHOD != trust ]]; then
        cat >&2 <<-'TEXT'
	Error: Database is uninitialized and superuser password is not specified.
	       You must specify POSTGRES_PASSWORD to a non-empty value for the
	       superuser. For example, "-e POSTGRES_PASSWORD=password" on "docker run".

	       You may also use "POSTGRES_HOST_AUTH_METHOD=trust" to allow all
	       connections without a password. This is *not* recommended.
	TEXT
        exit 1
    fi
}

make_cluster() {
    local arguments=(--username="$POSTGRES_USER" --data-checksums)
    if [[ -n ${POSTGRES_INITDB_WALDIR:-} ]]; then arguments+=(--waldir "$POSTGRES_INITDB_WALDIR"); fi
    eval "arguments+=(${POSTGRES_INITDB_ARGS:-})"  # words may be quoted, as in the known image
    if [[ -n $POSTGRES_PASSWORD ]]; then
        initdb "${arguments[@]}" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD")
    else
        initdb "${arguments[@]}"
    fi
    printf '\nhost all all all %s\n' "${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >>"$PGDATA/pg_hba.conf"
}

sql() { psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc --username "$POSTGRES_USER" "$@"; }

make_database() {
    [[ $POSTGRES_DB != postgres ]] || return 0
    if [[ -z $(sql --dbname postgres --tuples-only --set db="$POSTGRES_DB" \
        <<<"SELECT 1 FROM pg_database WHERE datname = :'db'") ]]; then
        sql --dbname postgres --set db="$POSTGRES_DB" <<<'CREATE DATABASE :"db"'
    fi
}

run_scripts() {
    local file
    for file in "$SCRIPTS"/*; do
        case $file in
            *.sh)
                echo "$0: running $file"
                # shellcheck disable=SC1090
                if [[ -x $file ]]; then "$file"; else . "$file"; fi ;;
            *.sql) echo "$0: running $file"; sql --dbname "$POSTGRES_DB" -f "$file" ;;
            *.sql.gz) echo "$0: running $file"; gzip -dc "$file" | sql --dbname "$POSTGRES_DB" ;;
            *.sql.xz) echo "$0: running $file"; xz -dc "$file" | sql --dbname "$POSTGRES_DB" ;;
            *.sql.zst) echo "$0: running $file"; zstd -dc "$file" | sql --dbname "$POSTGRES_DB" ;;
            "$SCRIPTS/*") ;;
            *) echo "$0: ignoring $file" ;;
        esac
    done
}

first_start() {
    check_password
    make_cluster
    local PGHOST='' PGHOSTADDR='' PGPORT=5432
    export PGPASSWORD="${PGPASSWORD:-$POSTGRES_PASSWORD}"
    # Only by its socket: nobody may find a database that is not set up yet.
    pg_ctl -D "$PGDATA" -o "$(printf '%q ' "${@:2}" -c listen_addresses='' -p 5432)" -w start
    make_database
    run_scripts
    pg_ctl -D "$PGDATA" -m fast -w stop
    unset PGPASSWORD
    printf '\nPostgreSQL init process complete; ready for start up.\n\n'
}

wants_help() {
    local word
    for word; do
        case $word in -'?' | --help | --describe-config | -V | --version) return 0 ;; esac
    done
    return 1
}

main() {
    if [[ ${1:0:1} = - ]]; then set -- postgres "$@"; fi
    if [[ ${1:-} = postgres ]] && ! wants_help "$@"; then
        prepare_folders
        if [[ $(id -u) = 0 ]]; then
            exec setpriv --reuid=postgres --regid=postgres --init-groups -- "$BASH_SOURCE" "$@"
        fi
        name_this_user
        value_of POSTGRES_PASSWORD
        value_of POSTGRES_USER postgres
        value_of POSTGRES_DB "$POSTGRES_USER"
        value_of POSTGRES_INITDB_ARGS
        : "${POSTGRES_HOST_AUTH_METHOD:=}"
        if [[ -s $PGDATA/PG_VERSION ]]; then
            printf '\nPostgreSQL Database directory appears to contain a database; Skipping initialization\n\n'
        else
            first_start "$@"
        fi
    fi
    exec "$@"
}

main "$@"
