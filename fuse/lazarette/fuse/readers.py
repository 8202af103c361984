"""Threads that read requests: what blocks one leaves another to read.

A request that waits for the disk could be given to a worker; that wakes a second thread for each,
and a database commits as often as that allows.  Done where it was read it wakes nobody, and
meanwhile another thread is in read(2) already.  But threads that read get in each other's way (one
holds the interpreter when the other has read), so those not needed for a while rest.
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
        self._called = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._main = 0
        self._reading = 1
        """Threads that read or soon will."""
        self._resting = 0
        self._calls = 0
        """Those that are to read again and do not know it yet."""

    def run(self) -> None:
        """Read in this thread, and return when the others have ended too."""
        self._main = threading.get_ident()
        try:
            self._work()
        finally:
            with self._lock:
                self._most = 0
                self._called.notify_all()
                threads = list(self._threads)
            for thread in threads:
                thread.join()

    def enter(self) -> bool:
        """Whether this thread, one of those, may block now: it calls :meth:`leave` afterwards."""
        with self._lock:
            if self._reading > 1:
                self._reading -= 1
                return True
            if self._resting:
                self._resting -= 1
                self._calls += 1
                self._called.notify()
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

    def rest(self) -> None:
        """This thread was not needed for a while: wait until it is, if another one reads."""
        with self._lock:
            if threading.get_ident() == self._main or self._reading == 1:
                return
            self._reading -= 1
            self._resting += 1
            self._called.wait_for(lambda: self._calls or not self._most)
            self._calls -= 1

    def _other(self) -> None:
        try:
            self._work()
        except Exception:
            log.exception("a thread that read requests ends")
        finally:
            with self._lock:
                self._reading -= 1
