"""How databases are brought into a state they call consistent, for the instant of a snapshot.

Three kinds:

*Session*: a client session is opened, put into backup mode or given a lock, and kept over
the snapshot.  If the client or the daemon dies, the server ends the mode with the session:
nothing is left behind.

*Command*: a command before, and one after that undoes it (written down first).

*Locks*: SQLite files are locked from the host as SQLite itself would lock them.

Commands run in the container with its own environment, so no password passes through here.

======== ==================================================================== ===========
profile  what is held                                                         kind
======== ==================================================================== ===========
postgres ``pg_backup_start`` … ``pg_backup_stop`` in one session              session
mysql    ``FLUSH TABLES WITH READ LOCK`` in one session (MariaDB too)         session
mongodb  ``fsyncLock`` … ``fsyncUnlock``                                      command
redis    a finished ``BGSAVE`` (Valkey too)                                   command
sqlite   the write lock of every database file found                          locks
======== ==================================================================== ===========
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarette.backup.policy.access import User
from lazarette.storage.errors import InvalidArgument

_READY = "lazarette-ready"
_DONE = "lazarette-done"


@dataclass(frozen=True, slots=True)
class SessionProfile:
    """A client session kept over the snapshot.

    Attributes:
        name: of the profile.
        images: parts of image names it is chosen by.
        argv: the client.
        begin: what it is told; it answers with a line ``ready``.
        end: what ends the mode; it answers with lines, the last ``done``.
        keeps: name of the document that the lines before ``done`` make.
        check: run in a restored container by a drill.
        blocks: writers wait meanwhile.
    """

    name: str
    images: tuple[str, ...]
    argv: tuple[str, ...]
    begin: str
    end: str
    keeps: str = ""
    check: tuple[str, ...] = ()
    blocks: bool = False
    ready: str = _READY
    done: str = _DONE


@dataclass(frozen=True, slots=True)
class CommandProfile:
    """A command before the snapshot, and one that undoes it; see :class:`SessionProfile`."""

    name: str
    images: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class LockProfile:
    """Database files locked from the host; see :mod:`.sqlitelock`."""

    name: str
    images: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    blocks: bool = True


Profile = SessionProfile | CommandProfile | LockProfile


def _sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def _patiently(script: str) -> tuple[str, ...]:
    """Try for a minute: a database that was just restored recovers first."""
    return _sh(f"for i in $(seq 600); do ({script}) && exit 0; sleep 0.1; done; exit 1")


def _mongosh(script: str) -> str:
    """A script for mongosh, which reads the password from the environment by itself."""
    return f"exec mongosh --quiet --eval '{_MONGO_LOGIN}{script}'"


_PSQL = 'exec psql -X -q -A -t -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d postgres'
_MYSQL = (
    'export MYSQL_PWD="${MYSQL_ROOT_PASSWORD:-$MARIADB_ROOT_PASSWORD}"; '
    "client=$(command -v mariadb || command -v mysql) && "
    'exec "$client" -uroot --skip-column-names --batch --unbuffered'
)
_MONGO_LOGIN = (
    "const e = process.env; if (e.MONGO_INITDB_ROOT_USERNAME) "
    'db.getSiblingDB("admin")'
    ".auth(e.MONGO_INITDB_ROOT_USERNAME, e.MONGO_INITDB_ROOT_PASSWORD); "
)
_REDIS = (
    'export REDISCLI_AUTH="${REDISCLI_AUTH:-$REDIS_PASSWORD}"; '
    "client=$(command -v redis-cli || command -v valkey-cli) || exit 1; "
)

POSTGRES = SessionProfile(
    name="postgres",
    images=("postgres", "postgis", "timescale", "pgvector"),
    argv=_sh(_PSQL),
    begin=(
        "SELECT current_setting('server_version_num')::int >= 150000 AS modern \\gset\n"
        "\\if :modern\n"
        "SELECT pg_backup_start('lazarette', true) \\g /dev/null\n"
        "\\else\n"
        "SELECT pg_start_backup('lazarette', true, false) \\g /dev/null\n"
        "\\endif\n"
        f"\\echo {_READY}\n"
    ),
    end=(
        "\\if :modern\n"
        "SELECT labelfile FROM pg_backup_stop(false);\n"
        "\\else\n"
        "SELECT labelfile FROM pg_stop_backup(false, false);\n"
        "\\endif\n"
        f"\\echo {_DONE}\n"
    ),
    keeps="backup_label",
    check=_sh(
        'for i in $(seq 600); do psql -X -q -t -U "${POSTGRES_USER:-postgres}" -d postgres '
        "-c 'SELECT 1' >/dev/null 2>&1 && break; sleep 0.1; done; "
        'psql -X -q -t -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d postgres '
        "-c 'SELECT count(*) FROM pg_class' >/dev/null || exit 1; "
        "if command -v pg_amcheck >/dev/null; then "
        'pg_amcheck -U "${POSTGRES_USER:-postgres}" --all --install-missing; fi'
    ),
)
MYSQL = SessionProfile(
    name="mysql",
    images=("mysql", "mariadb", "percona"),
    argv=_sh(_MYSQL),
    # a query that goes on makes the lock, and everybody behind it, wait; and a session whose
    # client is lost unseen is ended by the server
    begin=(
        "SET SESSION lock_wait_timeout = 10, wait_timeout = 60;\n"
        f"FLUSH TABLES WITH READ LOCK;\nSELECT '{_READY}';\n"
    ),
    end=f"UNLOCK TABLES;\nSELECT '{_DONE}';\n",
    check=_patiently(_MYSQL + " -e 'SELECT 1'"),
    blocks=True,
)
MONGODB = CommandProfile(
    name="mongodb",
    images=("mongo",),
    before=_sh(_mongosh("if (!db.fsyncLock().ok) quit(1)")),
    after=_sh(_mongosh("while (db.fsyncUnlock().lockCount > 0);")),
    check=_patiently(_mongosh("if (!db.hello().ok) quit(1)")),
    blocks=True,
)
REDIS = CommandProfile(
    name="redis",
    images=("redis", "valkey", "keydb"),
    before=_sh(
        _REDIS + '"$client" BGSAVE || exit 1; '
        'while "$client" INFO persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.05; done; '
        '"$client" INFO persistence | grep -q rdb_last_bgsave_status:ok'
    ),
    check=_patiently(_REDIS + '"$client" PING | grep -q PONG'),
)
SQLITE = LockProfile(name="sqlite")

PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (POSTGRES, MYSQL, MONGODB, REDIS, SQLITE)
}
_ALIASES = {"postgresql": "postgres", "mariadb": "mysql", "mongo": "mongodb", "valkey": "redis"}
_DATA_FOLDERS = {
    "/var/lib/postgresql",
    "/var/lib/postgresql/data",
    "/var/lib/mysql",
    "/data/db",
}
"""Where the images of those databases, and what is built on them, keep their files."""
NO_PROFILE = {"none", "crash"}
HOOKS = "hooks"


def profile_named(name: str) -> Profile:
    """A profile by its name or another name of the same database.

    Raises:
        InvalidArgument: there is none.
    """
    found = PROFILES.get(_ALIASES.get(name, name))
    if found is None:
        raise InvalidArgument(
            f"no consistency profile is called {name!r}",
            hint="there are auto, none, hooks, " + ", ".join(PROFILES),
        )
    return found


def profile_for(rule: str, user: User) -> Profile | None:
    """The profile of one container: by its own label, the policy's word, or its image.

    Args:
        rule: the policy's word: ``auto``, ``none``, ``hooks`` or a profile's name.
        user: the container.

    Raises:
        InvalidArgument: no profile has that name.
    """
    word = user.labels.get("lazarette.consistency", rule)
    if word in NO_PROFILE or word == HOOKS:
        return None
    if word != "auto":
        return profile_named(word)
    return _by_image(user.image)


def keeps_database(image: str, destination: str) -> bool:
    """Whether a volume that a container sees at ``destination`` is most likely a database's."""
    return destination in _DATA_FOLDERS or _by_image(image) is not None


def _by_image(image: str) -> Profile | None:
    repository = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
    words = repository.lower().replace("_", "-").split("-")
    return next(
        (
            profile
            for profile in PROFILES.values()
            if any(word.startswith(image) for image in profile.images for word in words[:2])
            and not _is_helper(words)
        ),
        None,
    )


def _is_helper(words: Sequence[str]) -> bool:
    """Images named after a database that are not one: exporters, proxies, consoles."""
    helpers = (
        "exporter",
        "proxy",
        "router",
        "operator",
        "backup",
        "commander",
        "insight",
        "express",
    )
    return any(word.startswith(helper) for word in words for helper in helpers)
