from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazarette.backup.stores.cache import CachedStore
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobNotFound,
    DamagedBlob,
    ReadOnlyStore,
    ShortBlob,
    SlowDown,
    StoreUnavailable,
    TagMismatch,
)
from lazarette.backup.stores.faults import Fault, FaultKind, FaultStore, NeverFired
from lazarette.backup.stores.limit import AdaptiveGate, LimitedStore
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.readonly import ReadingStore
from lazarette.backup.stores.retry import RetryPolicy, RetryStore
from lazarette.storage.clock import NANOSECONDS, FakeClock
from lazarette.storage.errors import NoSpace

EVERY = ("put", "replace", "get", "stat", "list", "delete")


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    folder = tmp_path / "store"
    folder.mkdir()
    store = LocalStore(str(folder))
    yield store
    store.close()


def test_retries_pause_longer_each_time_and_end(local: LocalStore) -> None:
    clock = FakeClock()
    pauses: list[float] = []

    class Watched(FakeClock):
        def sleep(self, seconds: float) -> None:
            pauses.append(seconds)
            super().sleep(seconds)

    clock = Watched()
    faults = FaultStore(local, [Fault(FaultKind.UNAVAILABLE, ("get",), times=100)])
    store = RetryStore(faults, clock, RetryPolicy(6, 1.0, 5.0, 1000.0), noise=lambda: 1.0)
    with pytest.raises(StoreUnavailable):
        store.get("x")
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert len(faults.calls) == 6


def test_retries_end_at_the_deadline(local: LocalStore) -> None:
    clock = FakeClock()
    faults = FaultStore(local, [Fault(FaultKind.UNAVAILABLE, ("get",), times=100)])
    store = RetryStore(faults, clock, RetryPolicy(100, 10.0, 10.0, 25.0), noise=lambda: 1.0)
    with pytest.raises(StoreUnavailable):
        store.get("x")
    assert len(faults.calls) == 4


@pytest.mark.parametrize("kind", [FaultKind.NO_SPACE, FaultKind.EXPIRED])
def test_some_failures_are_not_retried(local: LocalStore, kind: FaultKind) -> None:
    faults = FaultStore(local, [Fault(kind, ("put",))])
    with pytest.raises(Exception, match="injected"):
        RetryStore(faults, FakeClock()).put("x", b"")
    assert len(faults.calls) == 1


def test_asked_pauses_are_kept() -> None:
    clock = FakeClock()

    class Slow:
        calls = 0

        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            self.calls += 1
            if self.calls == 1:
                raise SlowDown("slow", retry_after=7.0)
            return b"x"

    store = RetryStore(Slow(), clock)  # type: ignore[arg-type]
    assert store.get("x") == b"x"
    assert clock.monotonic_ns() == 7 * NANOSECONDS


@pytest.mark.parametrize("operation", ["put", "replace"])
def test_a_lost_answer_to_a_conditional_write(local: LocalStore, operation: str) -> None:
    faults = FaultStore(local, [Fault(FaultKind.LOST_REPLY, (operation,))])
    store = RetryStore(faults, FakeClock())
    if operation == "put":
        assert store.put("x", b"mine", if_absent=True) == local.stat("x").tag
    else:
        old = local.put("x", b"old")
        assert store.replace("x", b"mine", old) == local.stat("x").tag
    faults.check_fired()
    assert local.get("x") == b"mine"


def test_a_conditional_write_lost_to_another(local: LocalStore) -> None:
    faults = FaultStore(local, [Fault(FaultKind.UNAVAILABLE, ("put", "replace"), times=2)])
    store = RetryStore(faults, FakeClock())
    tag = local.put("x", b"theirs")
    local.put("x", b"theirs again")
    with pytest.raises(TagMismatch):
        store.replace("x", b"mine", tag)
    with pytest.raises(AlreadyThere):
        store.put("x", b"mine", if_absent=True)


def test_reading_only(local: LocalStore) -> None:
    tag = local.put("x", b"1")
    store = ReadingStore(local)
    for change in (
        lambda: store.put("x", b""),
        lambda: store.replace("x", b"", tag),
        lambda: store.delete("x"),
    ):
        with pytest.raises(ReadOnlyStore):
            change()
    assert store.get("x") == b"1"
    assert [info.name for info in store.list()] == ["x"]


def test_bandwidth_follows_the_hour(local: LocalStore) -> None:
    clock = FakeClock()
    rate: list[int | None] = [1000]
    store = LimitedStore(local, clock, upload=lambda: rate[0])
    clock.advance(10)

    def seconds(size: int) -> float:
        before = clock.monotonic_ns()
        store.put("x", bytes(size))
        return (clock.monotonic_ns() - before) / NANOSECONDS

    assert seconds(1000) == 0  # a second's worth is saved up, not ten
    assert seconds(5000) == pytest.approx(5)
    rate[0] = 10_000
    assert seconds(5000) == pytest.approx(0.5)
    rate[0] = None
    assert seconds(1_000_000) == 0


def test_parallelism_halves_and_grows_again() -> None:
    gate = AdaptiveGate(16)

    def refuse() -> None:
        with pytest.raises(SlowDown), gate.passage():
            raise SlowDown("slow")

    refuse()
    assert gate.width == 8
    refuse()
    refuse()
    refuse()
    refuse()
    assert gate.width == 1
    for _ in range(400):
        with gate.passage():
            pass
    assert gate.width == 16


def test_one_burst_of_refusals_counts_once() -> None:
    gate = AdaptiveGate(16)
    inside = [gate.passage() for _ in range(10)]
    for passage in inside:
        passage.__enter__()
    for passage in inside:
        error = SlowDown("slow")
        assert not passage.__exit__(SlowDown, error, None)
    assert gate.width == 8


def test_cache_answers_without_the_store(local: LocalStore, tmp_path: Path) -> None:
    counted = FaultStore(local)
    store = CachedStore(counted, str(tmp_path / "cache"), ["index/"])
    local.put("index/a", b"0123456789")
    assert store.get("index/a") == b"0123456789"
    assert store.get("index/a", 2, 3) == b"234"
    assert len(counted.calls) == 1
    again = CachedStore(counted, str(tmp_path / "cache"), ["index/"])
    assert again.get("index/a") == b"0123456789"
    with pytest.raises(ShortBlob):
        again.get("index/a", 5, 6)
    assert len(counted.calls) == 1
    assert (again.counts.hits, again.counts.misses) == (2, 0)


def test_cache_notices_damage_and_fetches_again(local: LocalStore, tmp_path: Path) -> None:
    store = CachedStore(local, str(tmp_path / "cache"), ["index/"])
    store.put("index/a", b"content")
    [file] = (tmp_path / "cache").iterdir()
    for damage in (b"", file.read_bytes()[:-1], file.read_bytes()[:-1] + b"X"):
        file.write_bytes(damage)
        assert store.get("index/a") == b"content"
        assert store.get("index/a") == b"content"
    assert store.counts.damaged == 3


def test_cache_keeps_its_size_and_drops_what_was_used_longest_ago(
    local: LocalStore, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    store = CachedStore(local, str(folder), ["index/"], max_bytes=10_000)
    for number in range(40):
        store.put(f"index/{number}", os.urandom(1000))
        for file in folder.iterdir():  # make the order of use certain
            status = file.stat()
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - NANOSECONDS))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000
    store.get("index/39")
    assert store.counts.hits == 1
    store.put("index/big", os.urandom(5000))
    assert store.get("index/big") == local.get("index/big")


def test_cache_forgets_what_is_deleted_or_replaced(local: LocalStore, tmp_path: Path) -> None:
    store = CachedStore(local, str(tmp_path / "cache"), ["index/"])
    tag = store.put("index/a", b"1")
    store.replace("index/a", b"2", tag)
    assert store.get("index/a") == b"2"
    store.delete("index/a")
    with pytest.raises(BlobNotFound):
        store.get("index/a")


def test_faults_that_never_fire_fail_the_test(local: LocalStore) -> None:
    store = FaultStore(local, [Fault(FaultKind.NO_SPACE, ("put",), match="packs/", skip=1)])
    store.put("packs/a", b"")
    with pytest.raises(NeverFired):
        store.check_fired()
    with pytest.raises(NoSpace):
        store.put("packs/b", b"")
    store.check_fired()


def test_damage_by_faults(local: LocalStore) -> None:
    local.put("a", bytes(100))
    local.put("b", bytes(100))
    store = FaultStore(local)
    store.plan(Fault(FaultKind.TRUNCATED, ("get",)))
    assert store.get("a") == bytes(50)
    store.plan(Fault(FaultKind.FLIPPED, ("get",)))
    assert sum(store.get("a")) == 1
    store.plan(Fault(FaultKind.STALE_LIST, ("list",)))
    assert len(list(store.list())) == 1
    store.plan(Fault(FaultKind.HALF_STORED, ("put",)))
    with pytest.raises(StoreUnavailable):
        store.put("c", bytes(10))
    assert local.stat("c").size == 5
    assert len(list(store.list())) == 3


def test_a_damaged_answer_is_asked_for_once_more() -> None:
    class Damaged:
        calls = 0

        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            self.calls += 1
            raise DamagedBlob("damaged")

    inner = Damaged()
    with pytest.raises(DamagedBlob):
        RetryStore(inner, FakeClock()).get("x")  # type: ignore[arg-type]
    assert inner.calls == 2
