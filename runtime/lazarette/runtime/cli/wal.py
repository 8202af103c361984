"""Commands for the logs of databases: recovery to any moment between two backups."""

from __future__ import annotations

from typing import cast

import click

from lazarette.runtime.cli import output
from lazarette.runtime.cli.backup import follow, when
from lazarette.runtime.cli.context import Session, json_option, pass_session
from lazarette.storage.errors import EXIT_OK, EXIT_WARNINGS

_HINTS = {
    "restart": "restart its container: the database archives from its next start on",
    "failed": "laz policy show",
}


@click.group("wal")
def wal() -> None:
    """PostgreSQL's log, kept by volumes whose policy says --wal."""


@wal.command("ls")
@json_option
@pass_session
def ls(session: Session, as_json: bool) -> int:
    """List the logs that are kept and until when; ends with 3 when one is not kept."""
    found = session.daemon.ask_list("/wal")
    if as_json:
        output.write_json(found)
    else:
        output.write_table(
            ("VOLUME", "STATE", "STORED", "LAST TRANSACTION", "SEGMENT"),
            [
                (
                    str(one["volume"]),
                    str(one["state"]),
                    when(cast(int, one["stored_ns"])),
                    when(cast(int, one["until_ns"])),
                    str(one["segment"] or "-"),
                )
                for one in found
            ],
        )
        for one in found:
            if one["state"] in _HINTS:
                said = f"{one['volume']}: {one['error'] or one['state']}"
                output.write_error(said, _HINTS[str(one["state"])])
    return EXIT_WARNINGS if any(one["state"] in _HINTS for one in found) else EXIT_OK


@wal.command("flush")
@json_option
@click.argument("volume")
@pass_session
def flush(session: Session, volume: str, as_json: bool) -> int:
    """Store all that a volume's database has written by now."""
    done = follow(session, f"/volumes/{volume}/wal", None, f"log of {volume}", as_json)
    if as_json:
        output.write_json(done)
    else:
        click.echo(f"{volume}: all is stored until {when(cast(int, done['until_ns']))}")
    return EXIT_OK


COMMANDS = (wal,)
