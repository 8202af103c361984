"""Builds whose bases come from a real registry, with docker's command line and our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.registry import PASSWORD, USER, Registry, registry

CLASSIC = {"DOCKER_BUILDKIT": "0"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry"), login=True) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("bases"))
    made.start()
    try:
        yield made
    finally:
        made.end()


class Client:
    """Docker's command line with a configuration folder of its own, logged in."""

    def __init__(self, daemon: Daemon, folder: Path, host: str) -> None:
        self.daemon = daemon
        self.environment = {**CLASSIC, "DOCKER_CONFIG": str(folder)}
        login = ("login", "-u", USER, "--password-stdin", host)
        daemon.docker(*login, env=self.environment, stdin=PASSWORD.encode())

    def __call__(self, *arguments: str, check: bool = True) -> str:
        done = self.daemon.docker(*arguments, env=self.environment, check=check)
        return (done.stdout + done.stderr).decode()


@pytest.fixture
def client(daemon: Daemon, locked: Registry, tmp_path: Path) -> Client:
    made = Client(daemon, tmp_path / "config", locked.host)
    daemon.laz("load", "-i", str(busybox_archive()))
    return made


def _publish(client: Client, ref: str, content: str, folder: Path) -> None:
    """Push an image with a file ``/said`` and forget it here."""
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text(f"FROM busybox\nRUN echo {content} > /said\n")
    client("build", "-t", ref, str(folder))
    client("push", ref)
    client("rmi", ref)


def test_bases_are_pulled_with_the_clients_login(
    client: Client, locked: Registry, tmp_path: Path
) -> None:
    base, other = f"{locked.host}/team/base:1", f"{locked.host}/team/other:1"
    _publish(client, base, "base", tmp_path / "a")
    _publish(client, other, "other", tmp_path / "b")
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(
        f"FROM {base}\nCOPY --from={other} /said /other\nCMD cat /said /other\n"
    )
    said = client("build", "-t", "derived", str(context))
    assert "Successfully built" in said
    assert client("run", "--rm", "derived") == "base\nother\n"
    assert " ---> Using cache" in client("build", "-t", "derived", str(context))


def test_pull_follows_a_tag_that_moved(client: Client, locked: Registry, tmp_path: Path) -> None:
    ref = f"{locked.host}/team/moving:latest"
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {ref}\nRUN cp /said /copied\nCMD cat /copied\n")
    _publish(client, ref, "old", tmp_path / "a")
    client("build", "-t", "follower", str(context))
    here = client("image", "inspect", "-f", "{{.Id}}", ref)
    _publish(client, ref, "new", tmp_path / "b")
    client("build", "--pull", "-t", "follower", str(context))
    assert client("run", "--rm", "follower") == "new\n"
    assert client("image", "inspect", "-f", "{{.Id}}", ref) != here


def test_bases_that_cannot_be_had(
    client: Client, daemon: Daemon, locked: Registry, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(f"\nFROM {locked.host}/team/missing:9\n")
    said = client("build", str(tmp_path), check=False)
    assert f"{locked.host}/team/missing:9" in said
    assert "Dockerfile:2" in said
    ref = f"{locked.host}/team/secret:1"
    _publish(client, ref, "secret", tmp_path / "a")
    (tmp_path / "Dockerfile").write_text(f"FROM {ref}\n")
    nobody = {**CLASSIC, "DOCKER_CONFIG": str(tmp_path / "nobody")}
    refused = daemon.docker("build", str(tmp_path), env=nobody, check=False)
    assert refused.returncode != 0
    assert b"Dockerfile:1" in refused.stderr
