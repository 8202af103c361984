"""Bandwidth and parallelism kept within limits.

Bandwidth is a bucket of tokens, one a byte, holding at most one second's worth: an
operation takes its bytes and, when the bucket is in debt, waits until the debt is paid.
The rate is asked for each time, so that it can differ by the hour.

Parallelism adapts to what the server bears: after :class:`SlowDown` half as many
operations run at once, and with every so many successes one more, up to the limit
(additive increase, multiplicative decrease, as in TCP).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lazarette.backup.stores.contract import BlobInfo, BlobStore, Buffer, SlowDown
from lazarette.backup.stores.wrapper import StoreWrapper
from lazarette.storage.clock import NANOSECONDS, Clock

Rate = Callable[[], int | None]
"""Bytes a second at this moment; None for no limit."""


def unlimited() -> int | None:
    """No limit."""
    return None


class LimitedStore(StoreWrapper):
    """Keeps within limits; goes beneath :class:`RetryStore`, so that it sees ``SlowDown``.

    Args:
        inner: the store.
        clock: for the rates.
        upload: bytes a second.
        download: bytes a second.
        parallel: operations at once.
    """

    def __init__(
        self,
        inner: BlobStore,
        clock: Clock,
        *,
        upload: Rate = unlimited,
        download: Rate = unlimited,
        parallel: int = 32,
    ) -> None:
        super().__init__(inner)
        self._up = Bucket(clock, upload)
        self._down = Bucket(clock, download)
        self._gate = AdaptiveGate(parallel)

    @property
    def parallel(self) -> int:
        """Operations let through at once, as things stand."""
        return self._gate.width

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        self._up.take(memoryview(data).nbytes)
        with self._gate.passage():
            return self.inner.put(name, data, if_absent=if_absent)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        self._up.take(memoryview(data).nbytes)
        with self._gate.passage():
            return self.inner.replace(name, data, tag)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`; the bytes are paid for after they came."""
        with self._gate.passage():
            data = self.inner.get(name, offset, length)
        self._down.take(len(data))
        return data

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        with self._gate.passage():
            return self.inner.stat(name)

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        with self._gate.passage():
            self.inner.delete(name)


class AdaptiveGate:
    """Lets at most ``width`` through at once, where the width follows the server's answers."""

    def __init__(self, limit: int) -> None:
        self.limit = max(limit, 1)
        self.width = self.limit
        self._inside = 0
        self._good = 0
        self._refusals = 0
        self._changed = threading.Condition()

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Wait for a place; leave it at the end of the block."""
        with self._changed:
            while self._inside >= self.width:
                self._changed.wait()
            self._inside += 1
            refusals = self._refusals
        slow = good = False
        try:
            yield
            good = True
        except SlowDown:
            slow = True
            raise
        finally:
            with self._changed:
                self._inside -= 1
                if slow and refusals == self._refusals:
                    self._narrow()
                elif good:
                    self._widen()
                self._changed.notify_all()

    def _narrow(self) -> None:
        """Halve; those let in before this fail for the same reason and do not count."""
        self.width = max(self.width // 2, 1)
        self._refusals += 1
        self._good = 0

    def _widen(self) -> None:
        self._good += 1
        if self._good >= 2 * self.width and self.width < self.limit:
            self.width += 1
            self._good = 0


class Bucket:
    """Tokens that flow in at a rate; takers may go into debt and then wait."""

    def __init__(self, clock: Clock, rate: Rate) -> None:
        self._clock = clock
        self._rate = rate
        self._lock = threading.Lock()
        self._free_ns = clock.monotonic_ns()

    def take(self, count: int) -> None:
        """Take tokens; returns when they are there."""
        rate = self._rate()
        if rate is None or count == 0:
            return
        with self._lock:
            now = self._clock.monotonic_ns()
            begin = max(self._free_ns, now - NANOSECONDS)
            self._free_ns = begin + count * NANOSECONDS // max(rate, 1)
            wait = self._free_ns - now
        if wait > 0:
            self._clock.sleep(wait / NANOSECONDS)
