"""What every command shares: the daemon it talks to and how it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from lazarette.runtime.config import DEFAULT_HOST

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon

P = ParamSpec("P")
R = TypeVar("R")
Json = Mapping[str, object]


def default_host() -> str:
    """``LAZ_HOST``, else ``DOCKER_HOST``, else the daemon's own default socket."""
    return os.environ.get("LAZ_HOST") or os.environ.get("DOCKER_HOST") or DEFAULT_HOST


def parse_bytes(size: str) -> int:
    """Bytes of a size as docker writes them, e.g. ``64m``.

    Raises:
        DockerException: it is none.
    """
    from docker.utils import parse_bytes as parse  # on use: docker-py is most of a short command

    return int(parse(size))


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
        from lazarette.runtime.cli.client import Daemon  # on use: not all commands need it

        return Daemon(self.host)


pass_session = click.make_pass_decorator(Session)


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """``--json``: the answer as one JSON document."""
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")(command)
