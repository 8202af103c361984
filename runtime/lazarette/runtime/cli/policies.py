"""Commands for policies and the state of protection."""

from __future__ import annotations

import click

from lazarette.runtime.cli import output
from lazarette.runtime.cli.client import Json
from lazarette.runtime.cli.context import Session, json_option, pass_session


@click.group("policy")
def policy() -> None:
    """When volumes are backed up, and what is kept."""


@policy.command("set")
@click.option("--every", default="", help="An interval, e.g. 20s, 15m, 1h.")
@click.option("--cron", default="", help="A cron line, e.g. '30 2 * * *'.")
@click.option("--zone", default="", help="Time zone of the cron line, e.g. Europe/Berlin.")
@click.option("--keep", default="", help="E.g. last=3 or hourly=24,daily=7,weekly=4.")
@click.option("--repo", "repository", default="", help="Name of a repository.")
@click.option("--consistency", default="", help="auto, crash, application, pause or stop.")
@json_option
@click.argument("volume")
@pass_session
def set_(
    session: Session,
    volume: str,
    every: str,
    cron: str,
    zone: str,
    keep: str,
    repository: str,
    consistency: str,
    as_json: bool,
) -> None:
    """Give a volume a policy."""
    shown = session.daemon.ask(
        "PUT",
        f"/policies/{volume}",
        {
            "every": every,
            "cron": cron,
            "zone": zone,
            "keep": keep,
            "repository": repository,
            "consistency": consistency,
        },
    )
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
        ("VOLUME", "STATE", "LAST BACKUP", "NEXT", "LAST RUN"),
        [
            (
                str(one["volume"]),
                str(one["state"]),
                str(one["last_backup"] or "never"),
                str(one["next_run"] or "-"),
                str(one["last_outcome"] or "-"),
            )
            for one in found
        ],
    )


COMMANDS = (policy, status)
