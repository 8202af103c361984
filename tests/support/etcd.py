"""A real etcd of one member, in a network namespace."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import requests
from tests.support.netns import inside

from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.process import spawn


class Etcd:
    """Runs in ``where`` and listens on ``address``.

    Args:
        folder: for its data.
        where: the namespace.
        address: its own there.
    """

    def __init__(self, folder: Path, where: NetNamespace, address: str) -> None:
        self._folder = folder
        self._where = where
        self._address = address
        self.url = f"http://{address}:2379"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        peer = f"http://{self._address}:2380"
        argv = [
            "etcd",
            "--data-dir",
            str(self._folder),
            "--listen-client-urls",
            self.url,
            "--advertise-client-urls",
            self.url,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"default={peer}",
        ]
        with self._where.entered():
            self._process = spawn(argv)
        deadline = time.monotonic() + 20
        while not inside(self._where, self._healthy):
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.05)

    def _healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=1).json()["health"] == "true"
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """As a crash would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Etcd:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
