"""``laz recover``: a host from a bucket and a recovery kit."""

from __future__ import annotations

from typing import cast

import click
import msgspec

from lazarette.runtime.cli import output
from lazarette.runtime.cli.backup import follow
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.runtime.cli.secrets import secret_options, store_access
from lazarette.storage.errors import EXIT_OK, EXIT_WARNINGS


@click.command("recover")
@click.option("--volume", "volumes", multiple=True, help="Only this volume (repeatable).")
@click.option("--project", "projects", multiple=True, help="Only this compose project.")
@click.option("--name", default="", help="How the daemon calls the repository from now on.")
@click.option("--no-start", is_flag=True, help="Leave the containers stopped.")
@click.option("--full", is_flag=True, help="Copy everything before the containers start.")
@click.option("--dry-run", is_flag=True, help="Only list what would come back.")
@secret_options
@json_option
@click.argument("url")
@pass_session
def recover(
    session: Session,
    url: str,
    volumes: tuple[str, ...],
    projects: tuple[str, ...],
    name: str,
    no_start: bool,
    full: bool,
    dry_run: bool,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> int:
    """Bring back volumes and their containers on an empty host."""
    body = {
        "access": msgspec.to_builtins(store_access(url, key_file, kit)),
        "name": name,
        "volumes": volumes,
        "projects": projects,
        "start": not no_start,
        "instant": not full,
        "dry_run": dry_run,
    }
    done = follow(session, "/recover", body, "recover", as_json)
    if as_json:
        output.write_json(done)
    else:
        output.write_table(
            ("KIND", "NAME", "POINT", "RESULT"),
            [
                (str(one["kind"]), str(one["name"]), str(one["point"]), str(one["result"]))
                for one in cast(list[Json], done["items"])
            ],
        )
    return EXIT_OK if done["outcome"] == "ok" else EXIT_WARNINGS


COMMANDS = (recover,)
