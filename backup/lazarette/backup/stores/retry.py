"""Trying again, with growing random pauses, what may succeed later.

Only :class:`StoreUnavailable` is tried again, and a damaged answer once (the fault may
have been on the way).  Wrong credentials, a full disk or a missing bucket end at once.

A conditional write that failed without an answer may have been done all the same.  Its
repetition then finds the name taken or the tag changed; the bytes are read back, and if
they are the caller's the write counts as done (S4).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobInfo,
    BlobNotFound,
    BlobStore,
    Buffer,
    DamagedBlob,
    ShortBlob,
    SlowDown,
    StoreUnavailable,
    TagMismatch,
)
from lazarette.backup.stores.wrapper import StoreWrapper
from lazarette.storage.clock import NANOSECONDS, Clock

_Got = TypeVar("_Got")


class RetryPolicy(msgspec.Struct, frozen=True):
    """How long to keep trying; all times in seconds.

    Attributes:
        attempts: at most so many, the first included.
        first_pause: the longest pause before the second attempt; it doubles each time.
        longest_pause: where the doubling ends.
        deadline: no further attempt begins so long after the first.
        silence: an attempt is lost when no byte has come for so long; servers out of space are
            known to hang for ever.
    """

    attempts: int = 8
    first_pause: float = 0.25
    longest_pause: float = 30.0
    deadline: float = 300.0
    silence: float = 60.0


class RetryStore(StoreWrapper):
    """Tries again what ``inner`` could not do for the moment.

    Args:
        inner: the store.
        clock: for pauses and the deadline.
        policy: how long to keep trying.
        noise: numbers in [0, 1) that spread the pauses of many clients.
        on_retry: told of each failure that is tried again.
    """

    def __init__(
        self,
        inner: BlobStore,
        clock: Clock,
        policy: RetryPolicy | None = None,
        noise: Callable[[], float] = random.random,
        on_retry: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(inner)
        self._clock = clock
        self._policy = policy or RetryPolicy()
        self._noise = noise
        self._on_retry = on_retry

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        if not if_absent:
            return self._again(lambda: self.inner.put(name, data))
        return self._conditional(name, data, lambda: self.inner.put(name, data, if_absent=True))

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        return self._conditional(name, data, lambda: self.inner.replace(name, data, tag))

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        return self._again(lambda: self.inner.get(name, offset, length))

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        return self._again(lambda: self.inner.stat(name))

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`; a broken list is begun again and its known part skipped."""
        last = ""
        trial = _Trial(self._clock, self._policy)
        while True:
            try:
                for info in self.inner.list(prefix):
                    if info.name > last:
                        last = info.name
                        yield info
                return
            except StoreUnavailable as failed:
                self._pause(trial, failed)

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        self._again(lambda: self.inner.delete(name))

    def _again(self, operation: Callable[[], _Got]) -> _Got:
        trial = _Trial(self._clock, self._policy)
        doubted = False
        while True:
            try:
                return operation()
            except StoreUnavailable as failed:
                self._pause(trial, failed)
            except (DamagedBlob, ShortBlob) as damaged:
                if doubted:
                    raise
                doubted = True
                self._told(damaged)

    def _conditional(self, name: str, data: Buffer, operation: Callable[[], str]) -> str:
        trial = _Trial(self._clock, self._policy)
        while True:
            try:
                return operation()
            except StoreUnavailable as failed:
                self._pause(trial, failed)
            except (AlreadyThere, TagMismatch):
                if trial.failures == 0:
                    raise
                try:
                    tag = self.stat(name).tag
                    ours = self.get(name) == bytes(data) and self.stat(name).tag == tag
                except BlobNotFound:
                    ours = False
                if not ours:
                    raise
                return tag

    def _pause(self, trial: _Trial, failed: StoreUnavailable) -> None:
        pause = trial.next_pause(self._noise())
        if pause is None:
            raise failed
        self._told(failed)
        asked = failed.retry_after if isinstance(failed, SlowDown) else 0.0
        self._clock.sleep(max(pause, min(asked, self._policy.longest_pause)))

    def _told(self, failed: Exception) -> None:
        if self._on_retry is not None:
            self._on_retry(failed)


class _Trial:
    """The attempts of one operation."""

    def __init__(self, clock: Clock, policy: RetryPolicy) -> None:
        self._clock = clock
        self._policy = policy
        self._end = clock.monotonic_ns() + round(policy.deadline * NANOSECONDS)
        self.failures = 0

    def next_pause(self, noise: float) -> float | None:
        """Seconds until the next attempt; None when there is none."""
        self.failures += 1
        if self.failures >= self._policy.attempts or self._clock.monotonic_ns() >= self._end:
            return None
        longest = self._policy.first_pause * 2.0 ** (self.failures - 1)
        return min(longest, self._policy.longest_pause) * (0.5 + noise / 2)
