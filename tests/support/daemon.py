"""A real daemon for tests: its own roots, socket and bridge; nothing left behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from lazarette.fuse import jsontext

LAZ = Path(sys.executable).with_name("laz")
LAZD = Path(sys.executable).with_name("lazd")
_START_S = 60.0


class _Listed(msgspec.Struct, rename={"id": "Id"}):
    """A running container."""

    id: str


@dataclass
class Daemon:
    """One ``lazd`` process on folders of its own.

    Attributes:
        root: folder that holds everything.
        bridge: name of its default bridge; 15 characters at most, unique on the machine.
    """

    root: Path
    bridge: str = field(default_factory=lambda: f"lzt{secrets.token_hex(4)}")
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.root / "lazd.sock"

    @property
    def host(self) -> str:
        return f"unix://{self.socket}"

    @property
    def log(self) -> str:
        return (self.root / "lazd.log").read_text()

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "lazd.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    str(LAZD),
                    "--data-root",
                    str(self.root / "data"),
                    "--exec-root",
                    str(self.root / "exec"),
                    "-H",
                    self.host,
                    "--bridge",
                    self.bridge,
                    *self.arguments,
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self.answers():
            if self.process.poll() is not None:
                raise AssertionError(f"lazd ended with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"lazd does not answer:\n{self.log}")
            time.sleep(0.02)

    def answers(self) -> bool:
        done = subprocess.run(
            [
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "--max-time",
                "2",
                "--unix-socket",
                str(self.socket),
                "http://d/_ping",
            ],
            check=False,
        )
        return done.returncode == 0

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM, as an upgrade: containers go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def end(self) -> None:
        """Stop everything: containers, mounts, networks."""
        if self.process is None:
            return
        if self.process.poll() is not None:
            self.start()
        # nobody waits for what ignores SIGTERM
        running = self.ask("GET", "containers/json") or b"[]"
        for container in jsontext.decode(running, type=list[_Listed]):
            self.ask("POST", f"containers/{container.id}/kill")
        self.ask("POST", "lazarette/v1/shutdown")
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"lazd did not end:\n{self.log[-4000:]}") from None

    def ask(self, method: str, path: str) -> bytes:
        """One request to the daemon's socket; its answer's body, whatever that says."""
        patience = ("--max-time", "60")
        where = ("--unix-socket", str(self.socket), f"http://d/{path}")
        asked = ["curl", "-s", *patience, "-X", method, *where]
        return subprocess.run(asked, check=False, stdout=subprocess.PIPE).stdout

    def laz(
        self,
        *arguments: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ``laz`` against this daemon."""
        return self._run([str(LAZ), "-H", self.host, *arguments], check, env, stdin, timeout)

    def docker(
        self,
        *arguments: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the real docker command line against this daemon."""
        config = self.root / "docker-config"
        config.mkdir(exist_ok=True)
        return self._run(
            ["docker", "-H", self.host, *arguments],
            check,
            {"DOCKER_CONFIG": str(config), **(env or {})},
            stdin,
            timeout,
        )

    def json(self, *arguments: str) -> object:
        """Run ``laz … --json`` and read its answer."""
        return json.loads(self.laz(*arguments, "--json").stdout)

    def _run(
        self,
        argv: Sequence[str],
        check: bool,
        env: Mapping[str, str] | None,
        stdin: bytes,
        timeout: float,
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            check=False,
            env={**os.environ, **(env or {})},
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(argv)} ended with {done.returncode}\n"
                f"stdout: {done.stdout.decode(errors='replace')}\n"
                f"stderr: {done.stderr.decode(errors='replace')}\n"
                f"daemon: {self.log[-4000:]}"
            )
        return done


@contextmanager
def running(root: Path) -> Iterator[Daemon]:
    """A daemon on a new folder, ended with all it made; nothing may stay mounted."""
    if os.geteuid() != 0:
        pytest.skip("the daemon needs root")
    one = Daemon(root)
    one.start()
    yield one
    one.end()
    with open("/proc/self/mountinfo") as mounts:
        points = [line.split()[4] for line in mounts]
    assert not [point for point in points if point.startswith(f"{root}/")], "mounts are left"
