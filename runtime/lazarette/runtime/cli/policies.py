"""Commands for policies and the state of protection."""

from __future__ import annotations

from typing import cast

import click

from lazarette.backup.policy.durations import format_duration
from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import InvalidArgument

_COLOURS = {"bad": "red", "warning": "yellow"}


@click.group("policy")
def policy() -> None:
    """When volumes are backed up, and what is kept."""


@policy.command("set")
@click.option("--every", default="", help="An interval, e.g. 20s, 15m, 1h.")
@click.option("--cron", default="", help="A cron line, e.g. '30 2 * * *', or @daily.")
@click.option("--zone", default="", help="Time zone of the cron line, e.g. Europe/Berlin.")
@click.option("--keep", default="", help="E.g. last=3 or hourly=24,daily=7,weekly=4.")
@click.option("--repo", "repository", default="", help="Name or URL of a known repository.")
@click.option("--copy", "copies", multiple=True, help="Another one that gets a copy (repeatable).")
@click.option("--copy-keep", default="", help="What the copies keep; all by default.")
@click.option("--consistency", default="", help="crash, auto, application or a profile's name.")
@click.option("--mode", default="", help="snapshot, pause or stop.")
@click.option("--before", multiple=True, help="'CONTAINER: command' or 'host: command'.")
@click.option("--after", multiple=True, help="Likewise; run in any case.")
@click.option("--window", "windows", multiple=True, help="When runs may begin.")
@click.option("--jitter", default="", help="Begin up to so much late, e.g. 5m.")
@click.option("--upload", default="", help="Bandwidth, also by time of day.")
@click.option("--read", default="", help="What is read of the volume a second, likewise.")
@click.option("--rpo", default="", help="The oldest the last good backup may be.")
@click.option("--rto", default="", help="The longest a restore may take.")
@click.option("--wal", is_flag=True, help="Keep PostgreSQL's log: recovery to any moment.")
@click.option("--drill", default="", help="When restores are rehearsed, e.g. '@weekly'.")
@click.option("--drill-command", default="", help="What proves a rehearsed restore.")
@json_option
@click.argument("volume")
@pass_session
def set_(
    session: Session, /, volume: str, every: str, cron: str, as_json: bool, **given: object
) -> None:
    """Give a volume a policy; what is left out keeps its default."""
    if bool(every) == bool(cron):
        raise InvalidArgument(
            f"the policy of {volume} needs one schedule",
            hint="--every 15m, or --cron '30 2 * * *'",
        )
    words = {name: value for name, value in given.items() if value}
    words["schedule"] = f"every {every}" if every else cron
    shown = session.daemon.ask("PUT", f"/policies/{volume}", {"words": words})
    if as_json:
        output.write_json(shown)
    else:
        _show(shown)


@policy.command("show")
@json_option
@click.argument("volume", required=False)
@pass_session
def show(session: Session, volume: str | None, as_json: bool) -> None:
    """Show what applies, from where, and the next run."""
    if volume is None:
        found = session.daemon.ask_list("/policies")
    else:
        found = [session.daemon.ask("GET", f"/policies/{volume}")]
    if as_json:
        output.write_json(found)
    else:
        for one in found:
            _show(one)


@policy.command("rm")
@click.argument("volume")
@json_option
@pass_session
def rm(session: Session, volume: str, as_json: bool) -> None:
    """Take a volume's policy away; its backups stay."""
    session.daemon.call("DELETE", f"/policies/{volume}")
    output.answer(as_json, {"volume": volume})


def _show(one: Json) -> None:
    click.echo(
        f"{one['volume']}: {one['schedule']}, keep {one['keep']}, "
        f"to {one['repository'] or 'the default repository'} ({one['origin']})"
    )
    for name, value in cast(dict[str, object], one["details"]).items():
        said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if said:
            click.echo(f"  {name.replace('_', ' ')}: {output.printable(said)}")
    click.echo(f"  next run {one['next_run'] or 'never'}")


@click.command("status")
@json_option
@pass_session
def status(session: Session, as_json: bool) -> None:
    """Show how safe each volume is."""
    found = session.daemon.ask_list("/status")
    if as_json:
        output.write_json(found)
        return
    output.write_table(
        ("VOLUME", "STATE", "LAST BACKUP", "RPO/TARGET", "RTO/TARGET", "VERIFIED", "NEXT"),
        [
            (
                str(one["volume"]),
                "overdue" if one["overdue"] else str(one["state"]),
                str(one["last_backup"] or "never"),
                _against(one.get("rpo_ns"), one.get("rpo_target_ns")),
                _against(one.get("rto_ns"), one.get("rto_target_ns")),
                _when(one.get("last_verified_ns")),
                str(one["next_run"] or "-"),
            )
            for one in found
        ],
        [_COLOURS.get(str(one["level"]), "") for one in found],
    )
    for one in found:
        if one["error"]:
            output.write_error(
                f"{one['volume']}: {one['error']}", f"laz backup history {one['volume']}"
            )


def _against(now: object, target: object) -> str:
    """A duration beside its target; what is not known or not set is a dash."""
    said = [
        format_duration(value) if isinstance(value, int) and value else "-"
        for value in (now, target)
    ]
    return "/".join(said)


def _when(ns: object) -> str:
    return rfc3339(ns) if isinstance(ns, int) and ns else "never"


COMMANDS = (policy, status)
