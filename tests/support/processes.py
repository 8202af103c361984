"""Processes of a daemon's, found by what they run and whose they are."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

JOBS = rb"lazarette\.backup\.jobs\.run\0"
SERVERS = rb"lazarette\.fuse\.serve"


def kill_programs(root: Path, pattern: bytes) -> int:
    """SIGKILL what runs a program and names, or has open, something below a daemon's folder.

    Args:
        root: the daemon's folder.
        pattern: regular expression found in the command line.

    Returns:
        How many were killed.
    """
    killed = 0
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if not entry.name.isdigit():
                continue
            said = (entry / "cmdline").read_bytes()
            if re.search(pattern, said) and _belongs(entry, said, str(root)):
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
    return killed


def _belongs(entry: Path, said: bytes, root: str) -> bool:
    return root.encode() in said or any(
        root in os.readlink(one) for one in (entry / "fd").iterdir()
    )
