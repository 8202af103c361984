"""Commands for the daemon itself."""

from __future__ import annotations

from typing import cast

import click
import msgspec

from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.runtime.cli.dialing import dial_stdio


@click.command("info")
@json_option
@pass_session
def info(session: Session, as_json: bool) -> None:
    """Describe the daemon and its host."""
    found = session.daemon.info()
    if as_json:
        output.write_json(found)
        return
    for key in (
        "ServerVersion",
        "Containers",
        "ContainersRunning",
        "Images",
        "Driver",
        "DefaultRuntime",
        "CgroupVersion",
        "KernelVersion",
        "OperatingSystem",
        "NCPU",
        "DockerRootDir",
        "Name",
    ):
        click.echo(f"{key}: {found.get(key)}")
    for pair in found.get("DriverStatus") or []:
        click.echo(f"  {pair[0]}: {pair[1]}")
    for warning in found.get("Warnings") or []:
        click.echo(f"WARNING: {warning}", err=True)


@click.command("version")
@json_option
@pass_session
def version(session: Session, as_json: bool) -> None:
    """Show the versions of both sides."""
    found = session.daemon.version(api_version=False)
    if as_json:
        output.write_json(found)
    else:
        click.echo(f"lazarette {found['Version']}, API {found['ApiVersion']}")


@click.command("events")
@click.option("--since", type=int, default=None, help="Seconds since the epoch.")
@click.option("--until", type=int, default=None, help="Seconds since the epoch.")
@json_option
@pass_session
def events(session: Session, since: int | None, until: int | None, as_json: bool) -> None:
    """Follow what happens."""
    for event in session.daemon.events(since=since, until=until, decode=True):
        if as_json:
            click.echo(msgspec.json.encode(event).decode())
        else:
            actor = cast(Json, event["Actor"])
            click.echo(f"{event['time']} {event['Type']} {event['Action']} {actor['ID']}")


@click.group("system")
def system() -> None:
    """The daemon's space."""


@system.command("df")
@json_option
@pass_session
def df(session: Session, as_json: bool) -> None:
    """Show the space images, containers and volumes take."""
    found = session.daemon.df()
    if as_json:
        output.write_json(found)
        return
    rows = []
    for title, key, size in (
        ("Images", "Images", "Size"),
        ("Containers", "Containers", "SizeRw"),
        ("Volumes", "Volumes", ""),
    ):
        items = cast(list[Json], found.get(key) or [])
        total = sum(
            cast(int, item.get(size) or 0)
            if size
            else cast(int, cast(Json, item.get("UsageData") or {}).get("Size") or 0)
            for item in items
        )
        rows.append((title, str(len(items)), output.size_text(max(total, 0))))
    output.write_table(("TYPE", "TOTAL", "SIZE"), rows)


@system.command("dial-stdio")
@pass_session
def dial(session: Session) -> None:
    """Pass standard input and output to the daemon's socket, for docker -H ssh://."""
    dial_stdio(session.host)


@click.command("shutdown")
@json_option
@pass_session
def shutdown(session: Session, as_json: bool) -> None:
    """Stop all containers (their stop timeouts honoured), unmount everything, end the daemon."""
    session.daemon.call("POST", "/shutdown")
    output.answer(as_json, {"status": "ending"})


COMMANDS = (info, version, events, system, shutdown)
