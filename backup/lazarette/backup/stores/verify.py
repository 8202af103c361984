"""Checks of the contract that anyone can run on their own store.

``laz repo verify-store URL`` and the test suite run the same list.  Each check works on
names of its own beneath one prefix, and everything it wrote is deleted afterwards.  A
check is named after the semantics it proves (S1-S9 of :mod:`.contract`).
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobNotFound,
    BlobStore,
    Buffer,
    ShortBlob,
    StoreUnavailable,
    TagMismatch,
)
from lazarette.storage.errors import InvalidArgument, LazaretteError

_RACERS = 8
_ROUNDS = 5


class Verdict(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A check's name, verdict, and what was seen when it did not pass."""

    check: Check
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        number: of the semantics it proves, e.g. ``S3``.
        name: unique.
        needs_conditional: only for stores whose conditional writes are exact.
        run: given the store and a prefix of its own; raises when the store is wrong.
    """

    number: str
    name: str
    needs_conditional: bool
    run: Callable[[BlobStore, str], None]


class Broken(AssertionError):
    """The store did not do what the contract says."""


_CHECKS: list[Check] = []


def _check(
    number: str, *, conditional: bool = False
) -> Callable[[Callable[[BlobStore, str], None]], Callable[[BlobStore, str], None]]:
    def register(run: Callable[[BlobStore, str], None]) -> Callable[[BlobStore, str], None]:
        _CHECKS.append(Check(number, run.__name__.lstrip("_"), conditional, run))
        return run

    return register


def checks() -> Sequence[Check]:
    """All of them, in the order they run."""
    return tuple(_CHECKS)


def run_check(store: BlobStore, check: Check, prefix: str) -> CheckResult:
    """Run one check and clean up after it.

    Args:
        store: what to look at.
        check: which.
        prefix: under which it may write; ends in ``/``.
    """
    if check.needs_conditional and not store.capabilities.conditional:
        return CheckResult(check, Verdict.SKIPPED, "the store has no exact conditional writes")
    own = f"{prefix}{check.name.replace('_', '-')}-{secrets.token_hex(4)}/"
    try:
        check.run(store, own)
    except Broken as wrong:
        return CheckResult(check, Verdict.FAILED, str(wrong))
    except LazaretteError as failed:
        return CheckResult(check, Verdict.FAILED, f"{type(failed).__name__}: {failed.message}")
    finally:
        _clean(store, own)
    return CheckResult(check, Verdict.PASSED)


def verify(store: BlobStore, prefix: str = "verify/") -> Iterator[CheckResult]:
    """Run every check, one after the other, whatever the others found."""
    for check in _CHECKS:
        yield run_check(store, check, prefix)


def probe_conditional(store: BlobStore, prefix: str = "probe/") -> bool:
    """Whether conditional writes are exact: found by racing, not believed.

    Run once when a repository is created; the answer is kept in the repository, because
    all its users must lock in the same way.
    """
    own = f"{prefix}{secrets.token_hex(8)}/"
    try:
        for run in (_one_of_many_creates_wins, _counting_by_replace_is_exact):
            run(store, own + run.__name__.strip("_").replace("_", "-") + "/")
    except (Broken, TagMismatch, AlreadyThere):
        return False
    finally:
        _clean(store, own)
    return True


def _clean(store: BlobStore, prefix: str) -> None:
    for info in list(store.list(prefix)):
        store.delete(info.name)


def _expect(kind: type[LazaretteError], action: Callable[[], object], what: str) -> None:
    try:
        action()
    except kind:
        return
    except LazaretteError as other:
        raise Broken(
            f"{what}: {type(other).__name__} instead of {kind.__name__} ({other.message})"
        ) from other
    raise Broken(f"{what}: no error, {kind.__name__} was due")


def _same(seen: object, due: object, what: str) -> None:
    if seen != due:
        raise Broken(f"{what}: {seen!r:.100} instead of {due!r:.100}")


@_check("S1")
def _what_is_put_is_got(store: BlobStore, at: str) -> None:
    for size in (0, 1, 4096, 1_000_001):
        data = os.urandom(size)
        name = f"{at}{size}"
        tag = store.put(name, data)
        _same(store.get(name), data, f"content of {size} bytes")
        info = store.stat(name)
        _same((info.name, info.size, info.tag), (name, size, tag), f"description of {size} bytes")


@_check("S1")
def _large_objects_come_back_whole(store: BlobStore, at: str) -> None:
    block = os.urandom(1 << 20)
    data = block * 17
    store.put(at + "large", data)
    _same(store.get(at + "large") == data, True, "a pack of 17 MiB is the same")
    _same(store.get(at + "large", (16 << 20) - 5, 10), data[(16 << 20) - 5 :][:10], "its middle")


@_check("S1")
def _all_kinds_of_buffers(store: BlobStore, at: str) -> None:
    data = os.urandom(1000)
    large = os.urandom(5_000_000)
    buffers: tuple[Buffer, ...] = (
        data,
        bytearray(data),
        memoryview(data)[10:500],
        large,
        memoryview(large)[1:-1],
    )
    for number, buffer in enumerate(buffers):
        store.put(f"{at}{number}", buffer)
        _same(store.get(f"{at}{number}"), bytes(buffer), type(buffer).__name__)


@_check("S1")
def _put_writes_over(store: BlobStore, at: str) -> None:
    first = store.put(at + "x", b"first")
    second = store.put(at + "x", b"second")
    _same(store.get(at + "x"), b"second", "content after the second put")
    _same(first == second, False, "the tags are the same")


@_check("S1")
def _a_reader_never_sees_half(store: BlobStore, at: str) -> None:
    size = 200_000
    versions = [bytes([number]) * size for number in range(6)]
    store.put(at + "x", versions[0])
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            data = store.get(at + "x")
            if len(data) != size or len(set(data)) != 1:
                wrong.append(f"{len(data)} bytes of {len(set(data))} versions")

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for data in versions:
                store.put(at + "x", data)
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    _same(wrong, [], "readers saw mixtures")


@_check("S2")
def _create_refuses_an_existing_name(store: BlobStore, at: str) -> None:
    store.put(at + "x", b"first", if_absent=True)
    _expect(AlreadyThere, lambda: store.put(at + "x", b"other", if_absent=True), "second create")
    _same(store.get(at + "x"), b"first", "content after the refusal")
    store.delete(at + "x")
    store.put(at + "x", b"third", if_absent=True)
    _same(store.get(at + "x"), b"third", "content created after a delete")


@_check("S2", conditional=True)
def _one_of_many_creates_wins(store: BlobStore, at: str) -> None:
    for number in range(_ROUNDS):
        name = f"{at}{number}"
        start = threading.Barrier(_RACERS)

        def race(racer: int, name: str = name, start: threading.Barrier = start) -> int | None:
            start.wait()
            try:
                store.put(name, str(racer).encode(), if_absent=True)
            except AlreadyThere:
                return None
            except StoreUnavailable:  # it may have won: then it must read so below
                return None
            return racer

        with ThreadPoolExecutor(_RACERS) as pool:
            winners = [racer for racer in pool.map(race, range(_RACERS)) if racer is not None]
        _same(len(winners), 1, "winners of a race to create")
        _same(store.get(name), str(winners[0]).encode(), "the winner's content")


@_check("S3")
def _replace_needs_the_present_tag(store: BlobStore, at: str) -> None:
    old = store.put(at + "x", b"one")
    new = store.replace(at + "x", b"two", old)
    _same(old == new, False, "the tags are the same")
    _expect(TagMismatch, lambda: store.replace(at + "x", b"three", old), "replace by an old tag")
    _same(store.get(at + "x"), b"two", "content after the refusal")
    _same(store.stat(at + "x").tag, new, "tag after replace")
    _same(next(iter(store.list(at))).tag, new, "tag in a list")
    last = store.replace(at + "x", b"three", new)
    store.delete(at + "x")
    _expect(TagMismatch, lambda: store.replace(at + "x", b"four", last), "replace of nothing")


@_check("S3", conditional=True)
def _counting_by_replace_is_exact(store: BlobStore, at: str) -> None:
    name = at + "counter"
    store.put(name, b"0 nobody")
    each = 5

    def count() -> None:
        done = 0
        while done < each:
            tag = store.stat(name).tag
            value = int(store.get(name).split()[0])
            if store.stat(name).tag != tag:
                continue
            try:
                store.replace(name, f"{value + 1} {secrets.token_hex(8)}".encode(), tag)
            except TagMismatch:
                continue
            done += 1

    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(count) for _ in range(4)]:
            running.result()
    _same(int(store.get(name).split()[0]), 4 * each, "increments by four threads")


@_check("S5")
def _ranges_are_exact(store: BlobStore, at: str) -> None:
    data = os.urandom(50_000)
    store.put(at + "x", data)
    for offset, length in ((0, 1), (100, 100), (49_990, 10), (0, 50_000), (17, 0), (50_000, 0)):
        _same(store.get(at + "x", offset, length), data[offset : offset + length], "a range")
    _same(store.get(at + "x", 49_000), data[49_000:], "a range without an end")


@_check("S5")
def _ranges_beyond_the_end_fail(store: BlobStore, at: str) -> None:
    store.put(at + "x", b"0123456789")
    for offset, length in ((5, 6), (10, 1), (11, 0), (100, 10)):
        _expect(ShortBlob, lambda o=offset, n=length: store.get(at + "x", o, n), "beyond the end")  # type: ignore[misc]


@_check("S6")
def _lists_are_complete_and_ordered(store: BlobStore, at: str) -> None:
    names = sorted(
        at + name for name in ("a/b", "a/bc", "a/c/d-e", "a/c/d.f", "a0", "ab/c", "b-c", "b_c")
    )
    for name in reversed(names):
        store.put(name, name.encode())
    found = list(store.list(at))
    _same([info.name for info in found], names, "names")
    _same([info.size for info in found], [len(name) for name in names], "sizes")
    for prefix in ("a", "a/", "a/b", "a/c/", "zzz", "a/c/d-"):
        due = [name for name in names if name.startswith(at + prefix)]
        _same(
            [info.name for info in store.list(at + prefix)], due, f"names that begin with {prefix}"
        )


@_check("S6")
def _lists_see_every_finished_put(store: BlobStore, at: str) -> None:
    for number in range(30):
        store.put(f"{at}{number:03}", b"x")
        _same(len(list(store.list(at))), number + 1, "objects listed after a put")


@_check("S6")
def _long_lists_are_paged(store: BlobStore, at: str) -> None:
    names = [f"{at}{number % 7}/{number:05}" for number in range(1_100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b"x"), names))
    _same([info.name for info in store.list(at)], sorted(names), "names of 1,100 objects")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(store.delete, names))
    _same(list(store.list(at)), [], "objects after all were deleted")


@_check("S7")
def _delete_is_idempotent(store: BlobStore, at: str) -> None:
    store.delete(at + "never")
    store.put(at + "x", b"1")
    store.delete(at + "x")
    store.delete(at + "x")
    _expect(BlobNotFound, lambda: store.get(at + "x"), "get after a delete")
    _expect(BlobNotFound, lambda: store.stat(at + "x"), "stat after a delete")


@_check("S8")
def _missing_objects_are_said_to_be_missing(store: BlobStore, at: str) -> None:
    _expect(BlobNotFound, lambda: store.get(at + "x"), "get")
    _expect(BlobNotFound, lambda: store.get(at + "x", 5, 5), "get of a range")
    _expect(BlobNotFound, lambda: store.stat(at + "x"), "stat")
    _same(list(store.list(at)), [], "list")


@_check("S8")
def _wrong_names_are_refused(store: BlobStore, at: str) -> None:
    for name in ("", "/x", "x/", "a//b", "../x", "a/../b", "A", "a b", "ü", "x" * 201):
        _expect(InvalidArgument, lambda n=name: store.put(n, b""), f"put of {name[:20]!r}")  # type: ignore[misc]


@_check("S9")
def _many_threads_at_once(store: BlobStore, at: str) -> None:
    def work(worker: int) -> None:
        for number in range(5):
            name = f"{at}{worker}/{number}"
            data = f"{worker} {number} ".encode() * 5000
            store.put(name, data)
            _same(store.get(name) == data, True, f"content of {name}")
        _same(len(list(store.list(f"{at}{worker}/"))), 5, "own objects")

    with ThreadPoolExecutor(8) as pool:
        for running in [pool.submit(work, worker) for worker in range(8)]:
            running.result()
