"""``laz branch``: a writable volume of any restore point."""

from __future__ import annotations

import click

from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Session, json_option, pass_session


@click.command("branch")
@click.option("--repo", "repository", default="", help="Name of a repository the daemon knows.")
@click.option("--ephemeral", is_flag=True, help="Goes with the last container that uses it.")
@click.option("--fill", is_flag=True, help="Bring everything here in the background.")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@click.argument("source", metavar="VOLUME[@POINT]")
@click.argument("name")
@json_option
@pass_session
def branch(
    session: Session,
    source: str,
    name: str,
    repository: str,
    ephemeral: bool,
    fill: bool,
    labels: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a writable volume NAME of VOLUME as it is, or as it was at POINT.

    POINT is latest, a time, or the id of a backup or of a snapshot here.
    """
    made = session.daemon.ask(
        "POST",
        "/branches",
        {
            "source": source,
            "name": name,
            "repository": repository,
            "ephemeral": ephemeral,
            "fill": fill,
            "labels": {key: value for key, _, value in (one.partition("=") for one in labels)},
        },
    )
    if as_json:
        output.write_json(made)
    else:
        click.echo(name)


COMMANDS = (branch,)
