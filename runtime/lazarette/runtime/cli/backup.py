"""Commands for backups and restores."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import cast

import click

from lazarette.backup.jobs.model import LOG_PREFIX, BackupJob, RestoreJob
from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, parse_bytes, pass_session
from lazarette.runtime.cli.secrets import secret_options, store_access
from lazarette.storage.errors import EXIT_FAULT, EXIT_OK, EXIT_WARNINGS, InvalidArgument

_NS = 1_000_000_000


@click.group("backup")
def backup() -> None:
    """Back up volumes and folders."""


@backup.command("run")
@click.option("--repo", "repository", default="", help="Name of a repository the daemon knows.")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@json_option
@click.argument("volumes", nargs=-1, required=True)
@pass_session
def run(
    session: Session,
    volumes: tuple[str, ...],
    repository: str,
    labels: tuple[str, ...],
    as_json: bool,
) -> int:
    """Back up volumes as they are at one instant, while their containers run."""
    body = {
        "volumes": volumes,
        "repository": repository,
        "labels": {k: v for k, _, v in (item.partition("=") for item in labels)},
    }
    done = follow(session, "/backups", body, f"backup {' '.join(volumes)}", as_json)
    runs = cast(list[Json], done["runs"])
    if as_json:
        output.write_json(runs)
    else:
        for one in runs:
            _show_run(one)
    return max(_exit_code(one) for one in runs)


@backup.command("approve")
@json_option
@click.argument("volume")
@pass_session
def approve(session: Session, volume: str, as_json: bool) -> int:
    """Say that a volume's suspicious backups are good: they count from now on."""
    done = session.daemon.ask("POST", f"/volumes/{volume}/approve")
    if as_json:
        output.write_json(done)
    else:
        click.echo(f"{done['approved']} backups of {volume} count now")
    return EXIT_OK


@backup.command("drill")
@json_option
@click.argument("volume")
@pass_session
def drill(session: Session, volume: str, as_json: bool) -> int:
    """Restore a volume's newest good backup beside it, start its image on it, check, remove."""
    done = follow(session, f"/volumes/{volume}/drill", None, f"drill {volume}", as_json)
    good = done["outcome"] == "ok"
    if as_json:
        output.write_json(done)
    elif good:
        click.echo(f"{volume} came back in {cast(int, done['restore_ns']) / _NS:.1f} s")
    else:
        output.write_error(str(done["error"]), "laz backup ls; laz repo check")
    return EXIT_OK if good else EXIT_FAULT


@backup.command("history")
@click.option("--kind", default="", help="backup, copy, verify or drill; all by default.")
@click.option("--limit", default=50, show_default=True, help="How many, the newest first.")
@json_option
@click.argument("volume", required=False)
@pass_session
def history(session: Session, volume: str | None, kind: str, limit: int, as_json: bool) -> None:
    """Show what was run, failed runs included."""
    found = session.daemon.ask_list("/history", volume=volume or "", kind=kind, limit=str(limit))
    if as_json:
        output.write_json(found)
        return
    rows = [
        (
            when(cast(int, one["started_ns"])),
            str(one["volume"]),
            str(one["kind"]),
            str(one["outcome"]),
            str(one["reason"]),
            _told(one),
        )
        for one in found
    ]
    output.write_table(("BEGAN", "VOLUME", "KIND", "OUTCOME", "WHY", "SAID"), rows)


def _told(run: Json) -> str:
    """The error, else the first warning, else what was made."""
    warnings = cast(list[str], run["warnings"])
    more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
    said = str(run["error"]) or (warnings[0] + more if warnings else str(run["snapshot"])[:12])
    return output.printable(said)


def follow(session: Session, path: str, body: object, title: str, as_json: bool) -> Json:
    """Run long work in the daemon behind a progress bar; its result."""
    with output.Bar(title, quiet=as_json) as bar:
        for record in session.daemon.follow("POST", path, body):
            if "result" in record:
                return cast(Json, record["result"])
            bar.show(record)
    raise InvalidArgument(f"the daemon ended {title} without a result", hint="laz status")


def _exit_code(run: Json) -> int:
    outcome = run["outcome"]
    if outcome == "ok":
        return EXIT_OK
    if outcome == "warnings":
        return EXIT_WARNINGS
    failure = cast(dict[str, int] | None, cast(Json, run["result"]).get("failure"))
    return failure["exit"] if failure else EXIT_FAULT


def _show_run(run: Json) -> None:
    result = cast(dict[str, object], run["result"])
    if run["outcome"] not in ("ok", "warnings"):
        failure = cast(dict[str, str] | None, result.get("failure"))
        output.write_error(
            f"backup of {run['volume']} {run['outcome']}: "
            f"{failure['message'] if failure else 'unknown'}",
            failure.get("hint", "") if failure else "",
        )
        return
    size = {
        key: output.size_text(cast(int, result[key]))
        for key in ("bytes_total", "bytes_read", "bytes_sent")
    }
    click.echo(
        f"{run['volume']}@{str(run['snapshot'])[:12]}  {run['consistency']}-consistent, "
        f"writers held {output.duration_text(cast(int, run['pause_ns']))}; "
        f"volume {size['bytes_total']}, read {size['bytes_read']}, "
        f"sent {size['bytes_sent']} in "
        f"{output.duration_text(cast(int, result['duration_ns']))}"
    )
    for warning in cast(list[str], result["warnings"]):
        click.echo(f"warning: {output.printable(warning)}", err=True)


@backup.command("ls")
@click.option("--repo", "repository", default="", help="A repository's name, or its URL.")
@secret_options
@json_option
@click.argument("volume", required=False)
@pass_session
def ls(
    session: Session,
    volume: str | None,
    repository: str,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> None:
    """List restore points."""
    if _is_url(repository):
        from lazarette.runtime.cli import local
        from lazarette.runtime.protection.restores import encode_point

        with local.opened(store_access(repository, key_file, kit)) as opened:
            found: list[Json] = [encode_point(record) for record in opened.snapshots(volume)]
    else:
        found = session.daemon.ask_list("/backups", volume=volume or "", repository=repository)
    if volume is None:  # a database's log has a snapshot a minute: laz wal ls
        found = [one for one in found if not str(one["volume"]).startswith(LOG_PREFIX)]
    if as_json:
        output.write_json(found)
        return
    rows = []
    for one in found:
        stats = cast(dict[str, int], one["stats"])
        rows.append(
            (
                f"{one['volume']}@{str(one['id'])[:12]}",
                when(cast(int, one["time_ns"])),
                str(one["consistency"]),
                output.size_text(stats.get("bytes_total", 0)),
                output.size_text(stats.get("bytes_read", 0)),
                output.size_text(stats.get("bytes_sent", 0)),
            )
        )
    output.write_table(("POINT", "TIME", "CONSISTENCY", "SIZE", "READ", "SENT"), rows)


def when(ns: int) -> str:
    """A wall-clock time for a person, with its zone."""
    return f"{datetime.fromtimestamp(ns // _NS, UTC):%Y-%m-%d %H:%M:%SZ}" if ns else "never"


def _is_url(text: str) -> bool:
    return "://" in text or text.startswith(("/", "."))


@backup.command("path")
@click.option("--repo", "url", required=True, help="The repository's URL.")
@click.option("--name", default=None, help="Name its snapshots carry; default: the path.")
@click.option("--tag", "tags", multiple=True, help="KEY=VALUE")
@secret_options
@json_option
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def path(
    folder: str,
    url: str,
    name: str | None,
    tags: tuple[str, ...],
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> int:
    """Back up a folder; needs no daemon."""
    from lazarette.runtime.cli import local

    root = os.path.abspath(folder)
    job = BackupJob(
        root=root,
        volume=name or root,
        host=os.uname().nodename,
        base="latest",
        labels={k: v for k, _, v in (item.partition("=") for item in tags)},
    )
    result = local.perform(job, store_access(url, key_file, kit), f"backup {root}", as_json)
    if as_json:
        output.write_json(result)
    else:
        click.echo(
            f"{result.snapshot[:12]}  {output.size_text(result.bytes_total)} in "
            f"{result.files} files, read {output.size_text(result.bytes_read)}, "
            f"sent {output.size_text(result.bytes_sent)} in "
            f"{output.duration_text(result.duration_ns)}"
        )
    return local.finish(result)


@click.command("restore")
@click.option("--repo", "repository", default="", help="A repository's name, or its URL.")
@click.option("--as", "into", default="", help="Restore into a new volume of this name.")
@click.option("--to", "folder", default=None, help="Restore into a folder; needs no daemon.")
@click.option("--include", "paths", multiple=True, help="Only this path (repeatable).")
@click.option("--instant", is_flag=True, help="Usable at once; filled in the background.")
@click.option("--rate", default="", help="Limit of the background fill, e.g. 50m (a second).")
@click.option("-y", "--yes", is_flag=True, help="Stop containers that use it, without asking.")
@click.option("--to-time", default="", help="Replay the database's log until this moment.")
@click.option("--undo", is_flag=True, help="Take the last restore over VOLUME back.")
@click.option("--in-place", is_flag=True, help="Change what is in the folder into the snapshot.")
@secret_options
@json_option
@click.argument("point", metavar="VOLUME@POINT|SNAPSHOT")
@pass_session
def restore(
    session: Session,
    point: str,
    repository: str,
    into: str,
    folder: str | None,
    paths: tuple[str, ...],
    instant: bool,
    rate: str,
    yes: bool,
    to_time: str,
    undo: bool,
    in_place: bool,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> int:
    """Bring back a volume (VOLUME@latest, VOLUME@ID, VOLUME@'TIME'), or a folder."""
    if folder is not None:
        return _restore_folder(
            point, repository, folder, list(paths), in_place, (key_file, kit), as_json
        )
    volume, _, moment = point.partition("@")
    if to_time and moment:
        raise InvalidArgument("--to-time says the point: name only the volume")
    stop = bool((undo or not instant) and _may_stop(session, into or volume, yes))
    if undo:
        return _undo(session, volume, stop, as_json)
    body = {
        "volume": volume,
        "stop_users": stop,
        "point": moment or "latest",
        "into": into,
        "repository": repository,
        "instant": instant,
        "rate": parse_bytes(rate) if rate else 0,
        "to_time": to_time,
    }
    done = follow(session, "/restores", body, f"restore {volume}", as_json)
    if as_json:
        output.write_json(done)
    elif done.get("safety"):
        click.echo(f"{done['volume']}: restored; undo with: laz restore --undo {done['volume']}")
    else:
        click.echo(str(done["volume"]))
    return _exit_code({"outcome": cast(Json, done["result"])["outcome"], "result": done["result"]})


def _may_stop(session: Session, volume: str, yes: bool) -> bool:
    """Whether the running containers of a volume may be stopped; a person is asked."""
    from urllib.parse import quote

    if yes:
        return True
    users = session.daemon.ask_list(f"/volumes/{quote(volume, safe='')}/users")
    if not users or not sys.stdin.isatty():
        return False  # the daemon says who is in the way
    names = ", ".join(str(one["name"]) for one in users)
    return click.confirm(f"{volume} is used by {names}; stop and start them again?", err=True)


def _undo(session: Session, volume: str, stop: bool, as_json: bool) -> int:
    from urllib.parse import quote

    path = f"/volumes/{quote(volume, safe='')}/undo"
    done = follow(session, path, {"stop_users": stop}, f"undo {volume}", as_json)
    if as_json:
        output.write_json(done)
    else:
        click.echo(f"{volume}: as before the restore; again to have the restored state back")
    return EXIT_OK


def _restore_folder(
    point: str,
    url: str,
    folder: str,
    paths: list[str],
    in_place: bool,
    secret: tuple[str | None, str | None],
    as_json: bool,
) -> int:
    if not _is_url(url):
        raise InvalidArgument("restore --to needs --repo URL")
    from lazarette.runtime.cli import local

    access = store_access(url, *secret)
    volume, _, moment = point.partition("@")
    with local.opened(access) as opened:
        if moment:
            from lazarette.runtime.protection.restores import choose_point

            snapshot = choose_point(opened.snapshots(volume), moment).id
        else:
            snapshot = opened.snapshot(point).id
    job = RestoreJob(snapshot, os.path.abspath(folder), in_place, paths=paths)
    result = local.perform(job, access, f"restore to {folder}", as_json)
    if as_json:
        output.write_json(result)
    else:
        click.echo(
            f"{snapshot[:12]}  {output.size_text(result.bytes_total)} in "
            f"{output.duration_text(result.duration_ns)}"
        )
    return local.finish(result)


COMMANDS = (backup, restore)
