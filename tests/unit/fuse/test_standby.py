"""Standbys alone: servers that only die, each followed by the next."""

from __future__ import annotations

import subprocess
import sys

MANY = """
import os, resource, signal, sys
from lazarette.fuse import standby
from lazarette.fuse.journal import Shared

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for _ in range(int(sys.argv[2])):
    os.open("/dev/null", os.O_RDONLY)
shared = Shared.create()
shared.device = shared.fd
while True:
    try:
        shared.keeper = standby.start(shared)
    except standby.Successor as successor:
        shared = successor.shared
        shared.handovers += 1
        shared.failures = 0
        if shared.handovers < int(sys.argv[1]):
            continue
        shared.ended = True
        os.write(1, b"enough")
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _servers(count: int, descriptors: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", MANY, str(count), str(descriptors)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120)


def test_as_many_servers_as_are_killed_follow_one_another() -> None:
    done = _servers(sys.getrecursionlimit() // 2, 0)
    assert (done.stdout, done.stderr) == (b"enough", b"")


def test_servers_with_many_descriptors_are_followed() -> None:
    done = _servers(3, 1100)
    assert (done.stdout, done.stderr) == (b"enough", b"")
