"""SIGKILL of the daemon at random moments of create, start, exec, stop, rm, pull and commit.

Afterwards every container is in a true state and, once all are removed, nothing is left:
no mount, control group, network namespace, layer, blob, folder or monitor.
``LAZ_KILL_ROUNDS=50`` is the whole of it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.registry import Registry, registry
from tests.support.remapped import claimed, remapping
from tests.support.waiting import until

ROUNDS = int(os.environ.get("LAZ_KILL_ROUNDS", "6"))


class Churn:
    """Makes, starts, stops and removes containers and images until told to end; faults are
    fine."""

    def __init__(self, daemon: Daemon, pulled: str, seed: int) -> None:
        self._daemon = daemon
        self._pulled = pulled
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(2)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _docker(self, *arguments: str) -> None:
        try:
            self._daemon.docker(*arguments, check=False, timeout=20)
        except subprocess.TimeoutExpired:
            return

    def _work(self, number: int) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            name = f"churn-{number}-{count}"
            network = self._random.choice(["none", "bridge"])
            self._docker(
                "run", "-d", "--name", name, "--network", network, "-v", "/anon",
                "busybox", "sleep", "1000",
            )  # fmt: skip
            for step in self._random.sample(("exec", "stop", "pause", "commit", "pull"), 3):
                if self._over.is_set():
                    return
                if step == "exec":
                    self._docker("exec", name, "touch", f"/{name}")
                elif step == "commit":
                    self._docker("commit", name, name)
                elif step == "pull":
                    self._docker("rmi", "-f", self._pulled)
                    self._docker("pull", "-q", self._pulled)
                elif step == "stop":
                    self._docker("stop", "-t", "0", name)
                else:
                    self._docker("pause", name)
            if count % 3:
                self._docker("rm", "-fv", name)
            if count % 2:
                self._docker("rmi", "-f", name)


def monitors(daemon: Daemon) -> list[str]:
    """Command lines of monitors below the daemon's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if line.startswith(("/usr/bin/conmon", "conmon")) and str(daemon.root) in line:
                found.append(line)
    return found


def containers(daemon: Daemon) -> list[dict]:
    ids = daemon.docker("ps", "-aq", "--no-trunc").stdout.decode().split()
    if not ids:
        return []
    return list(json.loads(daemon.docker("inspect", *ids).stdout))


def check_states(daemon: Daemon) -> None:
    watched = " ".join(monitors(daemon))
    for one in containers(daemon):
        state = one["State"]
        assert state["Status"] in ("created", "running", "paused", "exited"), state
        assert (one["Id"] in watched) == state["Running"], one["Id"]
        if state["Running"]:
            assert Path(f"/proc/{state['Pid']}/stat").exists()


def left_behind(daemon: Daemon) -> list[str]:
    """Everything of containers that is still there."""
    root = daemon.root
    found = [str(p) for p in (root / "exec" / "containers").iterdir()]
    found += [str(p) for p in (root / "data" / "containers").iterdir()]
    found += [str(p) for p in (root / "exec" / "netns").iterdir()]
    found += [str(p) for p in (root / "exec" / "roots").iterdir()]
    found += [str(p) for p in (root / "exec" / "oci").iterdir()]
    found += [str(p) for p in (root / "data" / "layers").rglob("container-*")]
    with open("/proc/self/mountinfo") as mounts:
        points = [line.split()[4] for line in mounts]
    places = ("/container-", "/exec/containers/", "/exec/roots/")
    found += [p for p in points if p.startswith(f"{root}/") and any(each in p for each in places)]
    instance = [p for p in Path("/sys/fs/cgroup").rglob("lazarette/*/*") if p.is_dir()]
    known = " ".join(monitors(daemon))
    found += [str(p) for p in instance if p.name in _made and p.name not in known]
    return found


_made: set[str] = set()


def images_left(daemon: Daemon) -> list[str]:
    """Layers and blobs that are there though no image is."""
    data = daemon.root / "data"
    found = [path.name for path in (data / "images/sha256").iterdir()]
    for driver in (data / "layers").iterdir():
        found += [path.name for path in driver.glob("layers/*")]
    return found


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Registry]:
    """A registry on loopback."""
    with registry(tmp_path / "registry") as one:
        yield one


@pytest.fixture(params=["host", "remapped"])
def users(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose containers have the host's users, or others."""
    if os.geteuid() != 0:
        pytest.skip("the daemon needs root")
    with ExitStack() as until:
        one = Daemon(tmp_path / "d")
        if request.param == "remapped":
            one = remapping(tmp_path / "r", until.enter_context(claimed()))
        one.start()
        until.callback(one.end)
        yield one


def publish(daemon: Daemon, source: Registry, folder: Path) -> str:
    """An image of three layers in the registry, and not on the daemon; its name."""
    name = f"{source.host}/pulled"
    folder.mkdir()
    (folder / "Dockerfile").write_text("FROM busybox\nCOPY one /one\nCOPY two /two\n")
    for file in ("one", "two"):
        (folder / file).write_bytes(os.urandom(2_000_000))
    daemon.docker("build", "-q", "-t", name, str(folder), env={"DOCKER_BUILDKIT": "0"})
    daemon.docker("push", "-q", name)
    daemon.docker("rmi", "-f", name)
    daemon.docker("builder", "prune", "-af", env={"DOCKER_BUILDKIT": "0"})
    return name


@pytest.mark.slow
@pytest.mark.timeout(max(1800, 60 * ROUNDS))
def test_killed_at_random_moments(users: Daemon, source: Registry, tmp_path: Path) -> None:
    daemon = users
    daemon.docker("load", "-q", "-i", str(busybox_archive()))
    pulled = publish(daemon, source, tmp_path / "context")
    seed = int(os.environ.get("LAZ_SEED", str(random.randrange(1 << 30))))
    print(f"LAZ_SEED={seed}")
    chance = random.Random(seed)
    for turn in range(ROUNDS):
        churn = Churn(daemon, pulled, seed + turn)
        time.sleep(chance.uniform(0.2, 1.5))
        daemon.kill()
        churn.end()
        daemon.start()
        check_states(daemon)
        _made.update(one["Id"] for one in containers(daemon))
    ids = daemon.docker("ps", "-aq").stdout.decode().split()
    if ids:
        daemon.docker("rm", "-fv", *ids)
    until(lambda: not left_behind(daemon) + monitors(daemon), "something is left behind")
    assert left_behind(daemon) + monitors(daemon) == []
    # those that others were made of go once the others are gone
    while images := set(daemon.docker("images", "-aq", "--no-trunc").stdout.decode().split()):
        daemon.docker("rmi", "-f", *images, check=False)
        left = set(daemon.docker("images", "-aq", "--no-trunc").stdout.decode().split())
        assert left < images, left
    assert images_left(daemon) == []
    volumes = daemon.docker("volume", "ls", "-q").stdout.decode().split()
    daemon.docker("volume", "prune", "-f")
    assert len(volumes) <= 2 * ROUNDS, "volumes of containers that never were are piling up"


@pytest.mark.parametrize("policy", ["always", "unless-stopped"])
def test_policies_go_on(daemon: Daemon, policy: str) -> None:
    daemon.docker("load", "-q", "-i", str(busybox_archive()))
    for name, script in (("ends", "sleep 0.3; exit 1"), ("stays", "sleep 1000")):
        daemon.docker(
            "run", "-d", "--name", name, "--restart", policy, "busybox", "sh", "-c", script
        )
    daemon.docker("run", "-d", "--name", "stopped", "--restart", policy, "busybox", "sleep", "1000")
    daemon.docker("stop", "-t", "0", "stopped")
    daemon.kill()
    time.sleep(1)
    daemon.start()
    time.sleep(1.5)
    states = {one["Name"]: one for one in containers(daemon)}
    assert states["/ends"]["RestartCount"] > 0
    assert states["/stays"]["State"]["Running"]
    assert states["/stays"]["RestartCount"] == 0
    assert states["/stopped"]["State"]["Running"] == (policy == "always")
