"""Writing records of a journal into memory that outlives the process.

It is the C module's when that was built, and :class:`RegionPlain` otherwise (see
:mod:`lazarette.fuse.native`).
"""

from __future__ import annotations

import mmap
import os
import struct

try:
    if os.environ.get("LAZ_NO_NATIVE"):
        raise ImportError("not wanted")
    from lazarette.fuse import _records
except ImportError:
    _records = None  # type: ignore[assignment]

NODE, HANDLE = 2, 8
"""Kinds of the records that :class:`Region` knows from the inside."""

NODE_RECORD = struct.Struct("=IBQQqIIiIQQQiiI")
NAME_RECORD = struct.Struct("=QI")
HANDLE_RECORD = struct.Struct("=IBQQIiI")


class RegionPlain:
    """Records of a journal: written behind its head, which one store of a word moves.

    A record is its length (32 bits), its kind (8 bits) and a body.  One for which there is no
    room is left out, and with it all that follow.

    Args:
        data: the region's memory.
        words: 64-bit integers.
        word: which of them says where the head is.
        start: what that counts from.
        length: bytes of records that are there already.
    """

    _ONE = struct.Struct("=IBQ")
    _PAIR = struct.Struct("=IBQQ")

    def __init__(
        self, data: mmap.mmap | bytearray, words: memoryview, word: int, start: int, length: int, /
    ) -> None:
        self._data, self._words = memoryview(data), words
        self._word, self._start = word, start
        self._head = self._at = length

    def one(self, kind: int, number: int, /) -> None:
        """A record of one number."""
        self.put(self._ONE.pack(13, kind, number))

    def pair(self, kind: int, first: int, second: int, /) -> None:
        """A record of two numbers."""
        self.put(self._PAIR.pack(21, kind, first, second))

    def text(self, kind: int, number: int, body: bytes, /) -> None:
        """A record of a number and bytes."""
        self.put(self._ONE.pack(13 + len(body), kind, number) + body)

    def file(
        self,
        number: int,
        ino: int,
        lookups: int,
        kind: int,
        flags: int,
        backing: int,
        backing_flags: int,
        device: int,
        real: int,
        orphan: int,
        parent: int,
        name: bytes,
        /,
    ) -> None:
        """A record of a file with one name, or with none where ``parent`` is 0."""
        tail = NAME_RECORD.pack(parent, len(name)) + name if parent else b""
        fields = (number, ino, lookups, kind, flags, backing, backing_flags, 0, device, real)
        length = NODE_RECORD.size + len(tail)
        self.put(NODE_RECORD.pack(length, NODE, *fields, orphan, -1, 1 if parent else 0) + tail)

    def handle(self, number: int, node: int, flags: int, fd: int, through: bool, /) -> None:
        """A record of an open file."""
        self.put(HANDLE_RECORD.pack(HANDLE_RECORD.size, HANDLE, number, node, flags, fd, through))

    def put(self, record: bytes, /) -> None:
        """A record as it is."""
        end = self._at + len(record)
        if end > len(self._data):
            self._at = len(self._data) + 1
        else:
            self._data[self._at : end] = record
            self._at = end

    def commit(self, /) -> bool:
        """Make what was put since the last commit count; False: something was left out."""
        if self._at > len(self._data):
            return False
        if self._at != self._head:
            self._head = self._at
            self._words[self._word] = self._start + self._at
        return True

    def close(self, /) -> None:
        """Let go of the memory; everything is left out from now on."""
        self._data = memoryview(b"")
        self._at = 1


Region: type[RegionPlain] = RegionPlain
if _records is not None:
    Region = _records.Region  # type: ignore[assignment]
