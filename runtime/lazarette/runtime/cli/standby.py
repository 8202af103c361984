"""Commands for warm standbys: volumes that follow another host's backups."""

from __future__ import annotations

from typing import cast

import click

from lazarette.backup.policy.durations import parse_duration
from lazarette.runtime.cli import output
from lazarette.runtime.cli.backup import follow as follow_work
from lazarette.runtime.cli.backup import when
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.storage.errors import EXIT_OK, EXIT_WARNINGS


@click.group("standby")
def standby() -> None:
    """Follow another host's volumes, and take them over."""


@standby.command("follow")
@click.option("--repo", "repository", default="", help="Name of a repository the daemon knows.")
@click.option("--every", default="10s", show_default=True, help="How often to look.")
@click.option("--over", is_flag=True, help="Change a volume of that name that is here.")
@json_option
@click.argument("volume")
@pass_session
def follow(
    session: Session, volume: str, repository: str, every: str, over: bool, as_json: bool
) -> None:
    """Keep a volume as its newest snapshot in a repository."""
    body = {
        "volume": volume,
        "repository": repository,
        "every_ns": parse_duration(every),
        "over": over,
    }
    made = session.daemon.ask("POST", "/standbys", body)
    if as_json:
        output.write_json(made)
    else:
        click.echo(f"{volume} follows repository {made['repository']} every {every}")


@standby.command("ls")
@json_option
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the volumes that follow."""
    found = session.daemon.ask_list("/standbys")
    if as_json:
        output.write_json(found)
    else:
        _table(found)


@standby.command("status")
@json_option
@click.argument("volume")
@pass_session
def status(session: Session, volume: str, as_json: bool) -> int:
    """Show how far a volume has followed; ends with 3 when the last look failed."""
    one = session.daemon.ask("GET", f"/standbys/{volume}")
    if as_json:
        output.write_json(one)
    else:
        _table([one])
    return EXIT_WARNINGS if one["error"] else EXIT_OK


@standby.command("stop")
@json_option
@click.argument("volume")
@pass_session
def stop(session: Session, volume: str, as_json: bool) -> None:
    """Follow no more; the volume stays as the last whole snapshot."""
    session.daemon.call("DELETE", f"/standbys/{volume}")
    output.answer(as_json, {"volume": volume})


@standby.command("promote")
@click.option("--no-start", is_flag=True, help="Leave the containers stopped.")
@json_option
@click.argument("volume")
@pass_session
def promote(session: Session, volume: str, no_start: bool, as_json: bool) -> int:
    """Take a volume over: fence its old owner, apply what is newest, start its containers."""
    body = {"start": not no_start}
    done = follow_work(session, f"/standbys/{volume}/promote", body, f"promote {volume}", as_json)
    if as_json:
        output.write_json(done)
    else:
        click.echo(f"{volume} is owned by this host now")
        output.write_table(
            ("KIND", "NAME", "RESULT"),
            [
                (str(one["kind"]), str(one["name"]), str(one["result"]))
                for one in cast(list[Json], done["items"])
            ],
        )
    return EXIT_OK if done["outcome"] == "ok" else EXIT_WARNINGS


@standby.command("fences")
@json_option
@pass_session
def fences(session: Session, as_json: bool) -> None:
    """List volumes of this host that another took over."""
    found = session.daemon.ask_list("/fences")
    if as_json:
        output.write_json(found)
    else:
        output.write_table(
            ("VOLUME", "REPOSITORY", "TAKEN BY", "NOTICED"),
            [
                (
                    str(one["volume"]),
                    str(one["repository"]),
                    str(one["host"]),
                    when(cast(int, one["noticed_ns"])),
                )
                for one in found
            ],
        )


def _state(one: Json) -> str:
    if one["promoted"]:
        return "taken over, starting"
    return str(one["error"] or ("applying" if one["applying"] else "follows"))


def _table(found: list[Json]) -> None:
    output.write_table(
        ("VOLUME", "REPOSITORY", "APPLIED", "OF", "LOOKED", "STATE"),
        [
            (
                str(one["volume"]),
                str(one["repository"]),
                str(one["applied"])[:12] or "-",
                when(cast(int, one["applied_time_ns"])),
                when(cast(int, one["checked_ns"])),
                _state(one),
            )
            for one in found
        ],
    )


COMMANDS = (standby,)
