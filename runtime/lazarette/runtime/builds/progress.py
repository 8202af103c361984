"""The messages of a build, in the order of the file even when stages run side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

Emit = Callable[[Mapping[str, object]], None]


class Ordered:
    """Sends the messages of the first unfinished stage; holds back those of later ones.

    Args:
        emit: where messages go; called by one thread at a time.
        stages: numbers in the order of the file.
    """

    def __init__(self, emit: Emit, stages: list[int]) -> None:
        self._emit = emit
        self._order = list(stages)
        self._held: dict[int, list[Mapping[str, object]]] = {n: [] for n in stages}
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def channel(self, stage: int) -> Channel:
        """The channel of one stage."""
        return Channel(lambda message: self._send(stage, message))

    def finish(self, stage: int) -> None:
        """A stage is done: the next one's turn."""
        with self._lock:
            self._done.add(stage)
            while self._order and self._order[0] in self._done:
                self._order.pop(0)
                if self._order:
                    for message in self._held.pop(self._order[0], []):
                        self._emit(message)

    def _send(self, stage: int, message: Mapping[str, object]) -> None:
        with self._lock:
            if not self._order or self._order[0] == stage or stage not in self._held:
                self._emit(message)
            else:
                self._held[stage].append(message)


class Channel:
    """Messages of one stage."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def text(self, line: str) -> None:
        """A line for people, as ``stream``."""
        self._emit({"stream": line})

    def output(self, data: bytes) -> None:
        """What a step's process wrote."""
        self._emit({"stream": data.decode("utf-8", "replace")})

    def status(self, message: Mapping[str, object]) -> None:
        """Progress of a pull, as it comes."""
        self._emit(message)

    def aux(self, image_id: str) -> None:
        """The id of a finished stage."""
        self._emit({"aux": {"ID": image_id}})
