"""Memory in which packs are put together, used again for pack after pack.

A pack is written, sent and forgotten every fraction of a second.  Memory that was in use before
costs nothing; memory that the kernel gives anew costs as much as compressing what is put there.
"""

from __future__ import annotations

import threading

from lazarette.backup.memory import buffer
from lazarette.backup.stores.contract import Buffer

_GROWTH = 4 << 20


class PackMemory:
    """The bytes of one pack, from the first to the last; used by one thread.

    They begin at a page of memory, so that a store can hand them to direct I/O.

    Args:
        room: bytes for which there is room at first.

    Attributes:
        size: bytes there are.
    """

    def __init__(self, room: int) -> None:
        self._view = buffer(room)
        self.size = 0

    def reserve(self, length: int) -> memoryview:
        """The next ``length`` bytes, for the caller to fill."""
        start, end = self.size, self.size + length
        if end > len(self._view):
            larger = buffer(end + _GROWTH)
            larger[:start] = self._view[:start]
            self._view = larger
        self.size = end
        return self._view[start:end]

    def append(self, data: Buffer) -> None:
        """Add bytes at the end."""
        self.reserve(len(data))[:] = data

    def part(self, start: int, end: int) -> memoryview:
        """Some of the bytes; only until :meth:`clear`."""
        return self._view[start:end]

    def clear(self) -> None:
        """Begin anew."""
        self.size = 0


class PackMemories:
    """Memory that is not in use now; safe in several threads.

    Args:
        room: bytes of each at first.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._spare: list[PackMemory] = []

    def take(self) -> PackMemory:
        """Memory with nothing in it."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return PackMemory(self._room)

    def give_back(self, memory: PackMemory) -> None:
        """Let others have memory that nobody looks at any more."""
        memory.clear()
        with self._lock:
            self._spare.append(memory)
