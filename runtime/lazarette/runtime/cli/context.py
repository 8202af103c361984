"""What every command shares: the daemon it talks to and how it answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import ParamSpec, TypeVar

import click

from lazarette.runtime.cli.client import Daemon

P = ParamSpec("P")
R = TypeVar("R")


class Session:
    """One run of the command line.

    Args:
        host: the daemon's address; it is only connected to when a command needs it.
    """

    def __init__(self, host: str) -> None:
        self.host = host

    @cached_property
    def daemon(self) -> Daemon:
        """The daemon.

        Raises:
            Unavailable: nobody listens at the address.
        """
        return Daemon(self.host)


pass_session = click.make_pass_decorator(Session)


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """``--json``: the answer as one JSON document."""
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")(command)
