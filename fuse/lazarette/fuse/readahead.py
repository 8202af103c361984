"""How far to read ahead of whoever reads an open file, learnt from what was read of it.

A read that goes on where the one before ended doubles the window; any other halves it, so that
random readers soon cost nothing beyond what they ask for.
"""

from __future__ import annotations

LEAST = 1 << 20
MOST = 16 << 20


class ReadAhead:
    """The window of one open file; for one thread.

    Attributes:
        window: bytes that are to be here ahead of the reader; 0 for a random one.
    """

    def __init__(self) -> None:
        self.window = 0
        self._next = 0
        self._until = 0

    def due(self, offset: int, length: int) -> tuple[int, int]:
        """Note a read; offset and length of what to bring now, of length 0 when nothing is due."""
        goes_on = offset == self._next
        self._next = end = offset + length
        if not goes_on:
            self.window = self.window // 2 if self.window > LEAST else 0
            self._until = end
            return end, 0
        if self._until - end > self.window // 2:
            return end, 0
        self.window = min(max(2 * self.window, LEAST), MOST)
        start = max(self._until, end)
        self._until = end + self.window
        return start, self._until - start
