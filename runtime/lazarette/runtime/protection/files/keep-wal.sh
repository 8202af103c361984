#!/bin/sh
# PostgreSQL's archive command: keeps a finished file of its log until Lazarette has stored it.
# $1: the file, $2: its name.  Answers 0 only when the copy is on disk; never replaces another.
set -eu
ready=lazarette.wal/ready
[ -d "$ready" ] || mkdir -p "$ready"
if [ -e "$ready/$2" ]; then
    cmp -s "$1" "$ready/$2" && exit 0
    echo "$ready/$2 is there with other content" >&2
    exit 1
fi
dd if="$1" of="$ready/.$2" bs=1M conv=fsync 2>"$ready/.said" || {
    cat "$ready/.said" >&2
    exit 1
}
mv "$ready/.$2" "$ready/$2"
sync "$ready" 2>/dev/null || sync
