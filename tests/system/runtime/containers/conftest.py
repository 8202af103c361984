"""One daemon a module, with the busybox image; each test removes its containers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.daemon import Daemon, running
from tests.support.images import busybox_archive


@dataclass
class Host:
    """The daemon, and the containers a test made on it."""

    daemon: Daemon
    made: list[str] = field(default_factory=list)

    def name(self) -> str:
        """A fresh container name, removed after the test."""
        name = f"t{secrets.token_hex(5)}"
        self.made.append(name)
        return name

    def run(self, *arguments: str, **more: Any) -> bytes:
        """``docker run`` in the background; returns the name."""
        name = self.name()
        self.daemon.docker("run", "-d", "--name", name, *arguments, **more)
        return name.encode()

    def start(self, *arguments: str) -> str:
        return self.run(*arguments).decode()

    def inspect(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.daemon.docker("inspect", name).stdout)[0])

    def state(self, name: str) -> dict[str, Any]:
        return dict(self.inspect(name)["State"])

    def out(self, *arguments: str, **more: Any) -> str:
        """Standard output of a docker command."""
        return self.daemon.docker(*arguments, **more).stdout.decode()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("engine") / "d") as one:
        one.docker("load", "-q", "-i", str(busybox_archive()))
        yield one


@pytest.fixture
def host(engine: Daemon) -> Iterator[Host]:
    one = Host(engine)
    yield one
    for name in one.made:
        engine.docker("rm", "-fv", name, check=False)
