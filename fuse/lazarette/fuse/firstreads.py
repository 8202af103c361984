"""What is read first of a tree, remembered so that it comes first the next time.

A database that starts reads much the same each time: its control file, its log's end, its
catalogues.  Whoever brings another state of the same volume here finds that by the paths.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext

SPAN = 1 << 20
"""Bytes that are remembered as one."""
_MOST = 2000
_FOR_S = 60.0

Place = tuple[bytes, int]
"""Path below the root, and which span of the file."""


class FirstReads:
    """The record of one volume, in a file that several mounts may share.

    Args:
        file: where it is kept; None: nothing is remembered.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._until = 0.0
        self._new: dict[Place, None] = {}
        self.known = self._load()

    def _load(self) -> list[Place]:
        """What is remembered, what was read first before; nothing when the file is not whole."""
        if self._file is None:
            return []
        try:
            return jsontext.decode(self._file.read_bytes(), type=list[Place])
        except (OSError, msgspec.MsgspecError):
            return []

    def wants(self) -> bool:
        """Whether what is read now is to be noted: for a minute from the first read on."""
        if self._file is None or len(self._new) >= _MOST:
            return False
        now = self._clock()
        if not self._until:
            self._until = now + _FOR_S
        return now < self._until

    def note(self, path: bytes, offset: int, length: int) -> None:
        """A range of a file was read that was not here."""
        for span in range(offset // SPAN, -(-(offset + length) // SPAN)):
            self._new[path, span] = None

    def save(self) -> None:
        """Add what was noted to the record; a full disk or a lost folder is no error."""
        if self._file is None or not self._new:
            return
        places = list(dict.fromkeys([*self._load(), *self._new]))[:_MOST]
        beside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside.write_bytes(msgspec.json.encode(places))
            beside.rename(self._file)
        except OSError:
            beside.unlink(missing_ok=True)
