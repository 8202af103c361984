"""Commands that look after a repository; none needs a daemon.

Parts of the engine that need NumPy, which takes long to load, are imported by their commands.
"""

from __future__ import annotations

from contextlib import closing

import click
import msgspec

from lazarette.backup import copying
from lazarette.backup.jobs.access import credentials, secret
from lazarette.backup.jobs.model import StoreAccess
from lazarette.backup.repository import keys, scrub
from lazarette.backup.stores.open import lockable, open_store
from lazarette.runtime.cli import local, output
from lazarette.runtime.cli.backup import when
from lazarette.runtime.cli.context import json_option
from lazarette.runtime.cli.secrets import secret_options, store_access
from lazarette.storage.clock import NANOSECONDS, SystemClock
from lazarette.storage.errors import EXIT_OK, EXIT_WARNINGS, DamagedData, Unsupported

_DAY_NS = 86_400 * NANOSECONDS


@click.command("stats")
@secret_options
@json_option
@click.argument("url")
def stats(url: str, key_file: str | None, kit: str | None, as_json: bool) -> None:
    """Show sizes: raw and stored, of the whole, of each volume and snapshot."""
    from lazarette.backup.repository import statistics

    with local.opened(store_access(url, key_file, kit)) as opened:
        found = statistics.run(opened)
    if as_json:
        output.write_json(found)
        return
    click.echo(
        f"{len(found.snapshots)} snapshots of {output.size_text(found.raw)} are stored in "
        f"{output.size_text(found.stored)} ({found.packs} packs, {found.chunks} chunks)"
    )
    output.write_table(
        ("SNAPSHOT", "VOLUME", "RAW", "STORED", "EXCLUSIVE"),
        [
            (
                one.snapshot[:12],
                one.volume,
                output.size_text(one.raw),
                output.size_text(one.referenced),
                output.size_text(one.exclusive),
            )
            for one in found.snapshots
        ],
    )


@click.command("scrub")
@json_option
@click.argument("url")
def scrub_(url: str, as_json: bool) -> None:
    """Verify every stored byte by its checksum; needs no key."""
    access = store_access(url)
    store = open_store(access.url, credentials(access))
    try:
        found = scrub.run(store)
    finally:
        store.close()
    if as_json:
        output.write_json(found)
    else:
        click.echo(f"{found.objects} objects, {output.size_text(found.bytes)} verified")
        for name, fault in found.damaged:
            click.echo(f"{name}: {fault}")
    if not found.clean:
        raise DamagedData(
            f"{len(found.damaged)} objects of {access.url} are damaged",
            hint="laz repo check says which files that costs, laz repo repair saves the rest",
        )


@click.command("repair")
@click.option("--drop-snapshots", is_flag=True, help="Delete snapshots that cannot be opened.")
@secret_options
@json_option
@click.argument("url")
def repair_(
    url: str, drop_snapshots: bool, key_file: str | None, kit: str | None, as_json: bool
) -> int:
    """Isolate damage and save what is whole; the next backup stores lost chunks again."""
    from lazarette.backup.repository import repair

    with local.opened(store_access(url, key_file, kit)) as opened:
        done = repair.run(opened, drop_snapshots)
    if as_json:
        output.write_json(
            {
                "problems": len(done.found.problems),
                "indexes_rebuilt": done.indexes_rebuilt,
                "packs_adopted": done.packs_adopted,
                "packs_rewritten": done.packs_rewritten,
                "chunks_saved": done.chunks_saved,
                "chunks_lost": done.chunks_lost,
                "snapshots_dropped": done.snapshots_dropped,
            }
        )
    else:
        click.echo(
            f"{len(done.found.problems)} problems; {done.packs_rewritten} packs rewritten, "
            f"{done.chunks_saved} chunks saved, {done.chunks_lost} lost until the next backup"
        )
    return EXIT_WARNINGS if done.chunks_lost else EXIT_OK


@click.command("copy")
@click.option("--snapshot", "chosen", multiple=True, help="Only these (repeatable).")
@click.option("--to-key-file", default=None, help="Key file of the other repository.")
@click.option("--to-kit", default=None, help="Recovery kit of the other repository.")
@secret_options
@json_option
@click.argument("url")
@click.argument("target")
def copy(
    url: str,
    target: str,
    chosen: tuple[str, ...],
    to_key_file: str | None,
    to_kit: str | None,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> None:
    """Copy snapshots into another repository; what is there already is passed over."""
    with (
        local.opened(store_access(url, key_file, kit)) as source,
        local.opened(store_access(target, to_key_file, to_kit)) as other,
    ):
        wanted = [source.snapshot(one) for one in chosen] or source.snapshots()
        done = copying.run(source, other, wanted)
    answer = {
        "copied": [one.id for one in done.copied],
        "passed_over": done.passed_over,
        "bytes_sent": done.bytes_sent,
    }
    output.answer(
        as_json,
        answer,
        f"{len(done.copied)} snapshots copied, {len(done.passed_over)} were there, "
        f"{output.size_text(done.bytes_sent)} sent",
    )


@click.group("key")
def key() -> None:
    """The secrets that open a repository."""


@key.command("ls")
@json_option
@click.argument("url")
def key_ls(url: str, as_json: bool) -> None:
    """List keys; needs none."""
    access = store_access(url)
    store = open_store(access.url, credentials(access))
    try:
        found = keys.listing(store)
    finally:
        store.close()
    if as_json:
        output.write_json([msgspec.to_builtins(one) for one in found])
        return
    output.write_table(
        ("KEY", "KIND", "LABEL", "MADE", "MAY"),
        [
            (
                one.id[:12],
                one.kind,
                one.label,
                when(one.created_ns),
                "write" if one.writer else "read and write",
            )
            for one in found
        ],
    )


@key.command("add")
@click.option("--label", default="", help="For people.")
@click.option(
    "--new-key-file",
    required=True,
    type=click.Path(dir_okay=False),
    help="The file to make; it must not exist.",
)
@click.option("--write-only", is_flag=True, help="It can add backups and read none.")
@secret_options
@json_option
@click.argument("url")
def key_add(
    url: str,
    label: str,
    new_key_file: str,
    write_only: bool,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> None:
    """Make a key file that opens the repository too."""
    with local.opened(store_access(url, key_file, kit)) as opened:
        made = keys.KeyFile.generate()
        made.write(new_key_file)
        allowed = opened.keys.for_writer() if write_only else opened.keys
        info = keys.add(opened.store, allowed, made, label=label, clock=SystemClock())
    output.answer(as_json, msgspec.to_builtins(info), info.id[:12])


@key.command("rm")
@secret_options
@json_option
@click.argument("url")
@click.argument("identity", metavar="KEY")
def key_rm(url: str, identity: str, key_file: str | None, kit: str | None, as_json: bool) -> None:
    """Take a key away; what it has opened, its holder may have kept."""
    with local.opened(store_access(url, key_file, kit)) as opened:
        keys.remove(opened.store, identity)
    output.answer(as_json, {"removed": identity})


@key.command("rotate")
@click.option(
    "--new-key-file",
    required=True,
    type=click.Path(dir_okay=False),
    help="The file to make; it must not exist.",
)
@click.option("--keep", "kept", is_flag=True, help="The key given goes on opening it as well.")
@secret_options
@json_option
@click.argument("url")
def key_rotate(
    url: str, new_key_file: str, kept: bool, key_file: str | None, kit: str | None, as_json: bool
) -> None:
    """Encrypt what is written from now on with a new master key.

    Every other key, recovery kits and those of hosts that only write among them, opens the
    repository no more.
    """
    access = local.with_key(store_access(url, key_file, kit))
    with local.opened(access) as opened:
        made = keys.KeyFile.generate()
        made.write(new_key_file)
        secrets = [made, *([secret(access)] if kept else [])]
        fresh = keys.rotate(opened.store, opened.keys, secrets, clock=SystemClock())
    output.answer(as_json, {"epoch": fresh.epoch}, f"master key {fresh.epoch + 1} is in use")


@click.command("migrate")
@secret_options
@json_option
@click.argument("url")
def migrate(url: str, key_file: str | None, kit: str | None, as_json: bool) -> None:
    """Bring an older repository up to this program's format; older programs then refuse it."""
    with local.opened(store_access(url, key_file, kit)) as opened:
        changed = opened.migrate()
        version = opened.config.version
    text = f"the format is version {version}{'' if changed else ' already'}"
    output.answer(as_json, {"version": version, "changed": changed}, text)


def make_locked(access: StoreAccess, days: int) -> None:
    """Make a bucket with object lock and a default lock of so many days.

    Raises:
        InvalidArgument: it is no bucket's URL.
        StoreRefused: the server has no object lock, or the bucket exists.
    """
    with closing(lockable(access.url, credentials(access))) as bucket:
        bucket.create_locked_bucket(days)


@click.command("lock")
@click.option("--days", type=click.IntRange(1), required=True, help="From now on.")
@secret_options
@json_option
@click.argument("url")
def lock(url: str, days: int, key_file: str | None, kit: str | None, as_json: bool) -> None:
    """Lock all that the snapshots need for so many days: meant to be run once a day.

    Nobody can delete it until then, not even with the store's key.  What was forgotten and
    pruned before its lock ran out is hidden, and still there in the bucket as of an earlier
    time: open it with &as-of=2026-01-31T12:00:00Z in the URL.
    """
    # On use: boto3 takes a quarter of a second to import.
    from lazarette.backup.repository import retention
    from lazarette.backup.stores.s3lock import has_object_lock

    access = store_access(url, key_file, kit)
    until = SystemClock().now_ns() + days * _DAY_NS
    with (
        closing(lockable(access.url, credentials(access))) as bucket,
        local.opened(access) as opened,
    ):
        if not has_object_lock(bucket):
            raise Unsupported(
                f"the bucket of {access.url} has no object lock",
                hint="it is decided when a bucket is made: laz repo init --lock-days",
            )
        done = retention.extend(opened, bucket, until)
    output.answer(
        as_json,
        {"locked": done.locked, "kept": done.kept, "until_ns": until},
        f"{done.locked} objects locked, {done.kept} were",
    )


COMMANDS = (stats, scrub_, repair_, copy, key, lock, migrate)
