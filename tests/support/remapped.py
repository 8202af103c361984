"""Daemons whose containers have other users on the host, and ranges of ids for them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.daemon import Daemon

USERS = ("daemon", "bin", "sys", "games", "man", "lp", "mail", "news")
"""Users that every host has."""
FILES = (Path("/etc/subuid"), Path("/etc/subgid"))
COUNT = 65_536


@dataclass(frozen=True)
class Ranges:
    """A user of the host, and what its subordinate ids begin with."""

    user: str
    uid: int
    gid: int

    @property
    def lines(self) -> dict[Path, str]:
        firsts = zip(FILES, (self.uid, self.gid), strict=True)
        return {file: f"{self.user}:{first}:{COUNT}\n" for file, first in firsts}

    def write(self, there: bool) -> None:
        """Put the lines into the files, once, or take them away."""
        for file, line in self.lines.items():
            before = file.read_text() if file.exists() else ""
            kept = [each for each in before.splitlines(True) if each != line]
            file.write_text("".join([*kept, *([line] if there else [])]))


@contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that all test runs on this machine share; False if it is not to be had."""
    path = Path(tempfile.gettempdir()) / "lazarette-tests" / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def require_mapped_layers() -> None:
    """Skip where no layers can be mounted with mapped owners."""
    if os.geteuid() != 0:
        pytest.skip("the daemon needs root")
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if version < (6, 15):
        pytest.skip("Linux before 6.15 mounts no overlay layers with mapped owners")


@contextmanager
def claimed() -> Iterator[Ranges]:
    """Ranges of ids for a user that no other run of tests on this machine gives any to."""
    require_mapped_layers()
    with ExitStack() as until:
        number = next(
            number
            for number, user in enumerate(USERS)
            if until.enter_context(locked(f"subuid-{user}", wait=user == USERS[-1]))
        )
        first = 1_900_000_000 + number * COUNT
        made = Ranges(USERS[number], first, first + 100_000_000)
        with locked("subuid"):
            made.write(there=True)
        try:
            yield made
        finally:
            with locked("subuid"):
                made.write(there=False)


def remapping(root: Path, ranges: Ranges) -> Daemon:
    """A daemon with remapped users, who can reach its exec root."""
    root.mkdir()
    for folder in (root, *root.parents):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o011)
    return Daemon(root / "d", arguments=("--userns-remap", ranges.user))
