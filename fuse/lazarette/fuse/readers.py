"""Threads that read requests: what blocks one leaves another to read.

A request that waits for the disk could be given to a worker; that wakes a second thread for each,
and a database commits as often as that allows.  Done where it was read it wakes nobody, and
meanwhile another thread is in read(2) already.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Readers:
    """Runs a loop of reading in as many threads as are needed for one of them never to block.

    Args:
        most: threads, with the caller's.
        work: the loop; returns when there is nothing more to read.
    """

    def __init__(self, most: int, work: Callable[[], None]) -> None:
        self._most = most
        self._work = work
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._reading = 1
        """Threads that read or soon will."""

    def run(self) -> None:
        """Read in this thread, and return when the others have ended too."""
        try:
            self._work()
        finally:
            with self._lock:
                self._most = 0
                threads = list(self._threads)
            for thread in threads:
                thread.join()

    def enter(self) -> bool:
        """Whether this thread, one of those, may block now: it calls :meth:`leave` afterwards."""
        with self._lock:
            if self._reading > 1:
                self._reading -= 1
                return True
            if len(self._threads) + 1 >= self._most:
                return False
            thread = threading.Thread(target=self._other, name="fuse-reader", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more
                return False
            self._threads.append(thread)
            return True

    def leave(self) -> None:
        """This thread reads again."""
        with self._lock:
            self._reading += 1

    def _other(self) -> None:
        try:
            self._work()
        except Exception:
            log.exception("a thread that read requests ends")
        finally:
            with self._lock:
                self._reading -= 1
