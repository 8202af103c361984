"""Threads for what may block: a pool that costs less than the work it is given.

That of :mod:`concurrent.futures` makes a future, two locks and a semaphore for each task; an fsync
that the disk answers at once took three times as long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVarTuple, Unpack

log = logging.getLogger(__name__)

_Ts = TypeVarTuple("_Ts")


class Workers:
    """Runs tasks in the order they come, as many at a time as there are threads.

    Args:
        most: threads; each is started when a task comes and no other is free.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._free = 0
        """Threads without a task, less tasks without a thread."""

    def submit(self, function: Callable[[Unpack[_Ts]], None], *arguments: *_Ts) -> None:
        """Have ``function`` called with ``arguments``; what it raises is logged."""
        with self._lock:
            self._free -= 1
            grow = self._free < 0 and len(self._threads) < self._most
            if grow:
                self._free += 1
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
        self._tasks.put(lambda: function(*arguments))
        if grow:
            thread.start()

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            try:
                task()
            except Exception:
                log.exception("a task failed")
            del task  # and what it holds
            with self._lock:
                self._free += 1

    def shutdown(self) -> None:
        """Wait until all tasks are done; none may come any more."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join()
