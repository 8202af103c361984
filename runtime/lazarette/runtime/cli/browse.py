"""Commands that look into snapshots without restoring them; none needs a daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import click

from lazarette.backup.jobs.model import StoreAccess
from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.tree import TreeReader
from lazarette.runtime.cli import local, output
from lazarette.runtime.cli.backup import when
from lazarette.runtime.cli.context import json_option
from lazarette.runtime.cli.secrets import repository_option, secret_options, store_access
from lazarette.storage.errors import InvalidArgument

_CHUNK = 1 << 20
_LETTERS = {
    Kind.FILE: "-",
    Kind.DIRECTORY: "d",
    Kind.SYMLINK: "l",
    Kind.FIFO: "p",
    Kind.SOCKET: "s",
    Kind.CHARACTER: "c",
    Kind.BLOCK: "b",
}


def chosen(repository: Repository, point: str) -> SnapshotRecord:
    """The snapshot of ``VOLUME@POINT``, or of an id.

    Raises:
        SnapshotNotFound: there is none.
    """
    from lazarette.runtime.protection.restores import choose_point

    volume, at, moment = point.rpartition("@")
    if not at:
        return repository.snapshot(point)
    return choose_point(repository.snapshots(volume), moment)


@click.command("mount")
@secret_options
@click.argument("url")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def mount(url: str, folder: str, key_file: str | None, kit: str | None) -> None:
    """Show all snapshots of a repository in a folder, read-only, until Ctrl-C or umount."""
    from lazarette.backup.recovery.browse import serve

    with local.opened(store_access(url, key_file, kit)) as opened:
        click.echo(f"{url} is at {folder}; end with: umount {folder}", err=True)
        serve(opened, folder)


@click.command("ls")
@repository_option
@json_option
@click.argument("point", metavar="VOLUME@POINT|SNAPSHOT")
@click.argument("path", default="")
def ls(access: StoreAccess, point: str, path: str, as_json: bool) -> None:
    """List a folder of a snapshot."""
    with local.opened(access) as opened:
        opened.ready()
        tree = TreeReader(opened.reader, chosen(opened, point))
        entry = tree.lookup(os.fsencode(path))
        found = tree.listing(entry) if entry.kind == Kind.DIRECTORY else [entry]
    if as_json:
        output.write_json([_described(one) for one in found])
    else:
        output.write_table(("MODE", "OWNER", "SIZE", "TIME", "NAME"), [_row(one) for one in found])


@click.command("find")
@repository_option
@json_option
@click.argument("point", metavar="VOLUME@POINT|SNAPSHOT")
@click.argument("pattern", default="*")
def find(access: StoreAccess, point: str, pattern: str, as_json: bool) -> None:
    """List paths of a snapshot whose last part matches PATTERN (``*.conf``)."""
    from fnmatch import fnmatchcase

    with local.opened(access) as opened:
        opened.ready()
        tree = TreeReader(opened.reader, chosen(opened, point))
        wanted = os.fsencode(pattern)
        found = [
            (path, entry)
            for path, entry in tree.walk()
            if path and fnmatchcase(path.rpartition(b"/")[2], wanted)
        ]
    if as_json:
        output.write_json([_described(one) | {"path_hex": path.hex()} for path, one in found])
    else:
        for path, _ in found:
            click.echo(output.name_text(path))


@click.command("cat")
@repository_option
@click.argument("point", metavar="VOLUME@POINT|SNAPSHOT")
@click.argument("path")
def cat(access: StoreAccess, point: str, path: str) -> None:
    """Write a file of a snapshot to standard output."""
    with local.opened(access) as opened:
        opened.ready()
        tree = TreeReader(opened.reader, chosen(opened, point))
        entry = tree.lookup(os.fsencode(path))
        if entry.kind != Kind.FILE:
            raise InvalidArgument(f"{path} is no file")
        for piece in _pieces(tree, entry):
            sys.stdout.buffer.write(piece)


@click.command("dump")
@repository_option
@click.argument("point", metavar="VOLUME@POINT|SNAPSHOT")
@click.argument("path", default="")
def dump(access: StoreAccess, point: str, path: str) -> None:
    """Write a folder of a snapshot to standard output as a tar."""
    from lazarette.backup import tarstream

    with local.opened(access) as opened:
        tarstream.write(opened, chosen(opened, point), sys.stdout.buffer, os.fsencode(path))


@click.command("diff")
@repository_option
@json_option
@click.argument("first", metavar="VOLUME@POINT|SNAPSHOT")
@click.argument("second", metavar="VOLUME@POINT|SNAPSHOT")
def diff(access: StoreAccess, first: str, second: str, as_json: bool) -> None:
    """Show which paths differ between two snapshots."""
    with local.opened(access) as opened:
        opened.ready()
        before, after = (
            dict(TreeReader(opened.reader, chosen(opened, point)).walk())
            for point in (first, second)
        )
    found = [
        (_change(before.get(path), after.get(path)), path)
        for path in sorted(before.keys() | after.keys())
    ]
    changed = [(kind, path) for kind, path in found if kind]
    if as_json:
        output.write_json([{"kind": kind, "path_hex": path.hex()} for kind, path in changed])
    else:
        for kind, path in changed:
            click.echo(f"{kind:<8} {output.name_text(path) or '.'}")


def _change(before: Entry | None, after: Entry | None) -> str:
    if before is None:
        return "added"
    if after is None:
        return "removed"
    same_content = before.kind == after.kind and (
        before.kind == Kind.DIRECTORY
        or (before.content, before.size) == (after.content, after.size)
    )
    if not same_content:
        return "content"
    kept = ("mode", "uid", "gid", "mtime", "extra")
    return "" if all(getattr(before, one) == getattr(after, one) for one in kept) else "metadata"


def _pieces(tree: TreeReader, entry: Entry) -> Iterator[bytes]:
    content = tree.content(entry)
    for offset in range(0, entry.size, _CHUNK):
        yield content.read(offset, _CHUNK)


def _described(entry: Entry) -> dict[str, object]:
    return {
        "name": os.fsencode(entry.name).decode("utf-8", "backslashreplace"),
        "name_hex": entry.name.hex(),
        "kind": Kind(entry.kind).name.lower(),
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime_ns": entry.mtime,
    }


def _row(entry: Entry) -> tuple[str, ...]:
    letters = "".join(
        letter if entry.mode >> 8 - place & 1 else "-" for place, letter in enumerate("rwxrwxrwx")
    )
    name = output.name_text(entry.name)
    if entry.kind == Kind.SYMLINK:
        name += " -> " + output.name_text(entry.content)
    return (
        _LETTERS[Kind(entry.kind)] + letters,
        f"{entry.uid}:{entry.gid}",
        str(entry.size),
        when(entry.mtime),
        name,
    )


COMMANDS = (mount, ls, find, cat, dump, diff)
