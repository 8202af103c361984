"""Commands for volumes: Docker's, and those no engine has yet."""

from __future__ import annotations

import sys
from typing import cast
from urllib.parse import quote

import click
import msgspec

from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, parse_bytes, pass_session
from lazarette.runtime.cli.failures import failure

_CHUNK = 1 << 20


def _path(name: str, *rest: str) -> str:
    return "/".join(["/volumes", quote(name, safe=""), *rest])


def _pairs(items: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, _, value in (item.partition("=") for item in items)}


@click.group("volume")
def volume() -> None:
    """Named volumes: create, snapshot, clone, roll back, measure."""


@volume.command("create")
@click.option("-d", "--driver", default="", help="btrfs, overlay, fuse, tmpfs or bind.")
@click.option("-o", "--opt", "options", multiple=True, help="NAME=VALUE, e.g. size=10g")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@click.argument("name", required=False)
@json_option
@pass_session
def create(
    session: Session,
    name: str | None,
    driver: str,
    options: tuple[str, ...],
    labels: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a volume."""
    made = session.daemon.create_volume(
        name, driver or None, _pairs(options) or None, _pairs(labels) or None
    )
    if as_json:
        output.write_json(made)
    else:
        click.echo(made["Name"])


@volume.command("ls")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-f", "--filter", "filters", multiple=True, help="KEY=VALUE")
@json_option
@pass_session
def ls(session: Session, quiet: bool, filters: tuple[str, ...], as_json: bool) -> None:
    """List volumes."""
    wanted: dict[str, list[str]] = {}
    for item in filters:
        key, _, value = item.partition("=")
        wanted.setdefault(key, []).append(value)
    found = cast(list[Json], session.daemon.volumes(filters=wanted or None)["Volumes"])
    if as_json:
        output.write_json(found)
    elif quiet:
        for one in found:
            click.echo(str(one["Name"]))
    else:
        output.write_table(
            ("DRIVER", "VOLUME NAME"), [(str(one["Driver"]), str(one["Name"])) for one in found]
        )


@volume.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_session
def inspect(session: Session, names: tuple[str, ...]) -> None:
    """Describe volumes in JSON."""
    output.write_json([session.daemon.inspect_volume(name) for name in names])


@volume.command("rm")
@click.option("-f", "--force", is_flag=True)
@click.argument("names", nargs=-1, required=True)
@json_option
@pass_session
def rm(session: Session, names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove volumes nobody uses."""
    for name in names:
        session.daemon.remove_volume(name, force=force)
    output.answer(as_json, {"names": list(names)}, *names)


@volume.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Named ones too.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def prune(session: Session, everything: bool, force: bool, as_json: bool) -> None:
    """Remove volumes nobody uses."""
    if not force:
        click.confirm("Remove all volumes that no container uses?", abort=True)
    done = session.daemon.prune_volumes({"all": ["true"]} if everything else None)
    if as_json:
        output.write_json(done)
    else:
        for name in done["VolumesDeleted"] or []:
            click.echo(name)
        click.echo(f"freed {output.size_text(done['SpaceReclaimed'])}")


@volume.command("snapshot")
@click.option("--name", "snapshot", default="", help="The snapshot's id; made up when missing.")
@click.argument("names", nargs=-1, required=True)
@json_option
@pass_session
def snapshot(session: Session, names: tuple[str, ...], snapshot: str, as_json: bool) -> None:
    """Take one snapshot of one or several volumes, all at the same instant."""
    made = session.daemon.ask("POST", "/snapshots", {"volumes": names, "id": snapshot})
    if as_json:
        output.write_json(made)
        return
    for one in cast(list[Json], made["snapshots"]):
        click.echo(
            f"{one['volume']}@{one['id']}  {one['kind']}, writers held "
            f"{output.duration_text(cast(int, one['pause_ns']))}"
        )


@volume.command("snapshots")
@click.argument("name")
@json_option
@pass_session
def snapshots(session: Session, name: str, as_json: bool) -> None:
    """List the snapshots of a volume."""
    found = session.daemon.ask_list(_path(name, "snapshots"))
    if as_json:
        output.write_json(found)
    else:
        output.write_table(
            ("SNAPSHOT", "TIME", "KIND"),
            [(str(one["id"]), str(one["time"]), str(one["kind"])) for one in found],
        )


@volume.command("snapshot-rm")
@click.argument("name")
@click.argument("snapshot")
@json_option
@pass_session
def snapshot_rm(session: Session, name: str, snapshot: str, as_json: bool) -> None:
    """Remove a snapshot."""
    session.daemon.call("DELETE", _path(name, "snapshots", quote(snapshot, safe="")))
    output.answer(as_json, {"volume": name, "snapshot": snapshot})


@volume.command("clone")
@click.argument("source")
@click.argument("name")
@click.option("-d", "--driver", default="", help="Of the new volume; the same where it can be.")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@json_option
@pass_session
def clone(
    session: Session, source: str, name: str, driver: str, labels: tuple[str, ...], as_json: bool
) -> None:
    """Make a writable volume NAME of SOURCE or SOURCE@SNAPSHOT."""
    origin, _, point = source.partition("@")
    wanted = {"name": name, "snapshot": point, "driver": driver, "labels": _pairs(labels)}
    made = session.daemon.ask("POST", _path(origin, "clone"), wanted)
    if as_json:
        output.write_json(made)
    else:
        click.echo(name)


@volume.command("rollback")
@click.argument("name")
@click.argument("snapshot")
@json_option
@pass_session
def rollback(session: Session, name: str, snapshot: str, as_json: bool) -> None:
    """Set a volume back to a snapshot; what was is kept as a safety snapshot."""
    done = session.daemon.ask("POST", _path(name, "rollback"), {"snapshot": snapshot})
    if as_json:
        output.write_json(done)
    else:
        click.echo(f"rolled back; undo with: laz volume rollback {name} {done['safety']}")


@volume.command("resize")
@click.argument("name")
@click.argument("size")
@json_option
@pass_session
def resize(session: Session, name: str, size: str, as_json: bool) -> None:
    """Set a volume's size limit, e.g. 20g."""
    session.daemon.call("POST", _path(name, "resize"), {"size": parse_bytes(size)})
    output.answer(as_json, {"volume": name, "size": parse_bytes(size)})


@volume.command("rename")
@click.argument("name")
@click.argument("new_name")
@json_option
@pass_session
def rename(session: Session, name: str, new_name: str, as_json: bool) -> None:
    """Give a volume another name."""
    session.daemon.call("POST", _path(name, "rename"), {"name": new_name})
    output.answer(as_json, {"volume": new_name})


@volume.command("label")
@click.argument("name")
@click.argument("labels", nargs=-1)
@json_option
@pass_session
def label(session: Session, name: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Set the labels of a volume: those given as KEY=VALUE, and no others."""
    session.daemon.call("PUT", _path(name, "labels"), {"labels": _pairs(labels)})
    output.answer(as_json, {"volume": name, "labels": _pairs(labels)})


@volume.command("usage")
@click.argument("name")
@json_option
@pass_session
def usage(session: Session, name: str, as_json: bool) -> None:
    """Show the space a volume takes."""
    found = session.daemon.ask("GET", _path(name, "usage"))
    if as_json:
        output.write_json(found)
        return
    limit = cast(int | None, found.get("limit"))
    click.echo(
        f"referenced {output.size_text(cast(int, found['referenced']))}, "
        f"exclusive {output.size_text(cast(int, found['exclusive']))}, "
        f"limit {output.size_text(limit) if limit else 'none'}"
    )


@volume.command("fill")
@click.option("--start", is_flag=True, help="Bring everything of a branch here.")
@click.option("--rate", default="", help="Limit, e.g. 50m (a second).")
@click.argument("name", required=False)
@json_option
@pass_session
def fill(session: Session, name: str | None, start: bool, rate: str, as_json: bool) -> None:
    """Show how far instantly restored volumes are filled; begin with a branch."""
    if start or rate:
        if name is None:
            raise click.UsageError("--start and --rate need the name of a volume")
        session.daemon.call("POST", _path(name, "fill"), {"rate": parse_bytes(rate) if rate else 0})
    found = [
        one for one in session.daemon.ask_list("/fills") if name is None or one["volume"] == name
    ]
    if as_json:
        output.write_json(found)
        return
    output.write_table(
        ("VOLUME", "STATE", "FILES", "SIZE", "ERROR"),
        [
            (
                str(one["volume"]),
                "whole" if one["whole"] else "lazy" if one["lazy"] else "filling",
                f"{one.get('fetched_files', '?')}/{one.get('files', '?')}",
                output.size_text(cast(int, one.get("bytes", 0))),
                str(one.get("error", "")),
            )
            for one in found
        ],
    )


@volume.command("diff")
@click.argument("name")
@click.argument("base")
@click.argument("target")
@json_option
@pass_session
def diff(session: Session, name: str, base: str, target: str, as_json: bool) -> None:
    """Show what differs between two snapshots of a volume; with --json, one object a line."""
    for one in session.daemon.follow("GET", _path(name, "diff"), None, base=base, target=target):
        if as_json:
            click.echo(msgspec.json.encode(one))
        else:
            size = cast(int | None, one.get("bytes"))
            text = "" if size is None else f"  {output.size_text(size)}"
            click.echo(f"{one['kind']:<9} {output.printable(str(one['path']))}{text}")


@volume.command("export")
@click.argument("name")
@click.option("-o", "--output", "path", default="-", help="File; - for standard output.")
@pass_session
def export(session: Session, name: str, path: str) -> None:
    """Write the content of NAME or NAME@SNAPSHOT as a tar."""
    daemon = session.daemon
    volume, _, point = name.partition("@")
    address = f"{daemon.base_url}/lazarette/v1{_path(volume, 'export')}"
    with daemon.get(address, params={"snapshot": point} if point else None, stream=True) as got:
        if got.status_code >= 400:
            raise failure(got.content, got.status_code)
        with click.open_file(path, "wb") as out:
            for chunk in got.iter_content(_CHUNK):
                out.write(chunk)


@volume.command("import")
@click.argument("name")
@click.option("-i", "--input", "path", default="-", help="File; - for standard input.")
@pass_session
def import_(session: Session, name: str, path: str) -> None:
    """Unpack a tar into a volume."""
    daemon = session.daemon
    source = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    with source:
        got = daemon.post(
            f"{daemon.base_url}/lazarette/v1{_path(name, 'import')}",
            data=source,
            headers={"Content-Type": "application/x-tar"},
        )
    if got.status_code >= 400:
        raise failure(got.content, got.status_code)


COMMANDS = (volume,)
