"""Leases between hosts that share nothing but a store: rules one by one, then many schedules."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lazarette.backup.repository import leases
from lazarette.backup.repository._leaseplaces import Holder
from lazarette.backup.repository.leases import (
    Lease,
    LeaseHeld,
    LeaseLost,
    Leases,
    LeaseTerms,
    Mode,
    PlaceOfEntries,
)
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobInfo,
    BlobNotFound,
    Buffer,
    StoreCapabilities,
    TagMismatch,
)
from lazarette.backup.stores.local import LocalStore
from lazarette.storage.clock import NANOSECONDS, FakeClock, SystemClock

SCHEDULES = int(os.environ.get("LAZARETTE_LEASE_SCHEDULES", "200"))
TERMS = LeaseTerms(term=60, margin=10, settle=1, pause=5)


class MemoryStore:
    """The contract in memory; stamps are whole seconds of a clock of its own, as S3's are."""

    url = "memory:"
    capabilities = StoreCapabilities(conditional=True)

    def __init__(self, time: Callable[[], int], step: Callable[[], None] = lambda: None) -> None:
        self._time = time
        self._step = step
        self._count = 0
        self._objects: dict[str, tuple[bytes, str, int]] = {}

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        self._step()
        if if_absent and name in self._objects:
            raise AlreadyThere(name)
        tag = self._set(name, data)
        self._step()
        return tag

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        self._step()
        if name not in self._objects or self._objects[name][1] != tag:
            raise TagMismatch(name)
        new_tag = self._set(name, data)
        self._step()
        return new_tag

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._step()
        if name not in self._objects:
            raise BlobNotFound(name)
        return self._objects[name][0]

    def stat(self, name: str) -> BlobInfo:
        self._step()
        if name not in self._objects:
            raise BlobNotFound(name)
        data, tag, stamp = self._objects[name]
        return BlobInfo(name, len(data), tag, stamp)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        self._step()
        found = [
            BlobInfo(name, len(data), tag, stamp)
            for name, (data, tag, stamp) in sorted(self._objects.items())
            if name.startswith(prefix)
        ]
        self._step()
        return iter(found)

    def delete(self, name: str) -> None:
        self._step()
        self._objects.pop(name, None)

    def close(self) -> None:
        pass

    def _set(self, name: str, data: Buffer) -> str:
        self._count += 1
        stamp = self._time() // NANOSECONDS * NANOSECONDS
        self._objects[name] = (bytes(data), str(self._count), stamp)
        return str(self._count)


@pytest.fixture(params=PlaceOfEntries, ids=lambda place: place.value)
def place(request: pytest.FixtureRequest) -> PlaceOfEntries:
    found: PlaceOfEntries = request.param
    return found


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock.now_ns)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders look as if they were on other hosts, whose processes cannot be seen."""
    monkeypatch.setattr(Holder, "place_of_this_process", staticmethod(lambda: ""))


def make(store: MemoryStore, clock: FakeClock, place: PlaceOfEntries) -> Leases:
    return Leases(store, clock, place=place, terms=TERMS)


def test_shared_leases_go_together(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries
) -> None:
    some = make(store, clock, place)
    with (
        some.acquire(Mode.SHARED, "backup"),
        make(store, clock, place).acquire(Mode.SHARED, "restore"),
    ):
        assert sorted(holder.purpose for holder in some.holders()) == ["backup", "restore"]
    assert some.holders() == []


def test_an_exclusive_lease_goes_alone(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries
) -> None:
    one, two = make(store, clock, place), make(store, clock, place)
    for first, second in (
        (Mode.SHARED, Mode.EXCLUSIVE),
        (Mode.EXCLUSIVE, Mode.SHARED),
        (Mode.EXCLUSIVE, Mode.EXCLUSIVE),
    ):
        with one.acquire(first, "prune of a") as lease:
            with pytest.raises(LeaseHeld) as held:
                two.acquire(second, "other")
            assert "prune of a" in held.value.message
            lease.confirm()
        two.acquire(second, "other").release()


def test_a_waiting_exclusive_lease_lets_no_new_shared_one_begin(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries
) -> None:
    one, two, three = (make(store, clock, place) for _ in range(3))
    shared = one.acquire(Mode.SHARED, "long backup")
    seen: list[str] = []

    def waiting(against: list[Holder]) -> None:
        seen.append(against[0].purpose)
        with pytest.raises(LeaseHeld):
            three.acquire(Mode.SHARED, "new backup")
        if len(seen) == 3:
            shared.release()

    with two.acquire(Mode.EXCLUSIVE, "prune", wait=120, on_wait=waiting):
        assert seen == ["long backup"] * 3


def test_renewal_keeps_it_for_ever(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries
) -> None:
    one, two = make(store, clock, place), make(store, clock, place)
    lease = one.acquire(Mode.EXCLUSIVE, "prune")
    for _ in range(20):
        clock.advance(30)
        lease.renew_if_due()
        lease.check()
        with pytest.raises(LeaseHeld):
            two.acquire(Mode.SHARED, "backup")
    lease.release()
    lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_a_dead_holder_is_removed_and_knows(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries
) -> None:
    one, two = make(store, clock, place), make(store, clock, place)
    lease = one.acquire(Mode.EXCLUSIVE, "prune")
    clock.advance(45)
    lease.check()
    clock.advance(6)
    with pytest.raises(LeaseLost):
        lease.check()
    with pytest.raises(LeaseHeld):  # it stops before anyone else may go on
        two.acquire(Mode.EXCLUSIVE, "other")
    clock.advance(15)
    other = two.acquire(Mode.EXCLUSIVE, "other")
    with pytest.raises(LeaseLost):
        lease.confirm()
    lease.release()
    other.confirm()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("step", [-7200.0, 7200.0])
def test_clocks_set_by_hand(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries, step: float
) -> None:
    """The store's clock jumps: a dead holder still goes within about a term."""
    one, two = make(store, clock, place), make(store, clock, place)
    one.acquire(Mode.EXCLUSIVE, "prune")
    clock.step(step)
    lease = two.acquire(Mode.EXCLUSIVE, "other", wait=90)
    lease.release()


def test_a_process_that_is_no_more_here_is_dead_at_once(
    store: MemoryStore, clock: FakeClock, place: PlaceOfEntries, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make(store, clock, place), make(store, clock, place)
    child = os.fork()
    if child == 0:
        os._exit(0)
    monkeypatch.setattr(os, "getpid", lambda: child)
    one.acquire(Mode.EXCLUSIVE, "prune")
    monkeypatch.undo()
    os.waitpid(child, 0)
    two.acquire(Mode.EXCLUSIVE, "other").release()


def test_the_place_is_decided_once(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    assert Leases(store, SystemClock()).place is PlaceOfEntries.LISTED
    assert Leases.create(store) is PlaceOfEntries.TABLE
    made = Leases(store, SystemClock())
    assert made.place is PlaceOfEntries.TABLE
    with made.acquire(Mode.EXCLUSIVE, "prune").kept() as lease:
        lease.confirm()
        assert [holder.purpose for holder in made.holders()] == ["prune"]
    assert [info.name for info in store.list()] == ["leases/protocol", "leases/table"]
    store.close()


def test_a_renewal_that_comes_too_late_does_not_count(
    clock: FakeClock, place: PlaceOfEntries
) -> None:
    slow = [0.0]
    store = MemoryStore(clock.now_ns, lambda: clock.advance(slow[0]))
    lease = make(store, clock, place).acquire(Mode.EXCLUSIVE, "prune")
    slow[0] = 30.0
    with pytest.raises(LeaseLost):
        lease.confirm()
    with pytest.raises(LeaseLost):
        lease.check()


# Many schedules: threads that run one at a time, from one touch of the store or the clock
# to the next, in an order, with pauses and deaths, drawn from a seed.


@dataclass
class Actor:
    """A host under the scheduler's baton."""

    number: int
    go: threading.Event = field(default_factory=threading.Event)
    wake_ns: int = 0
    lease: Lease | None = None
    done: bool = False
    killed: bool = False
    acquired: int = 0


class Killed(BaseException):
    """The host lost its power."""


class Scheduler:
    """Runs hosts against one store; checks after every step that no conflict is lived."""

    def __init__(self, seed: int, place: PlaceOfEntries, hosts: int) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.back = threading.Event()
        self.local = threading.local()
        self.store = MemoryStore(self.clock.now_ns, self.step)
        self.place = place
        self.actors = [Actor(number) for number in range(hosts)]
        self.failure: BaseException | None = None

    def step(self) -> None:
        """Give the baton back and wait for it."""
        actor: Actor = self.local.actor
        self.back.set()
        actor.go.wait()
        actor.go.clear()
        if actor.killed:
            raise Killed

    def sleep(self, seconds: float) -> None:
        self.local.actor.wake_ns = self.clock.monotonic_ns() + round(seconds * NANOSECONDS)
        self.step()

    def run(self) -> None:
        threads = [threading.Thread(target=self._live, args=(actor,)) for actor in self.actors]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3000):
                waiting = [actor for actor in self.actors if not actor.done]
                if not waiting:
                    break
                self._turn(waiting)
        finally:
            for actor in self.actors:
                actor.killed = True
                while not actor.done:
                    self._pass(actor)
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure

    def _turn(self, waiting: list[Actor]) -> None:
        ready = [actor for actor in waiting if actor.wake_ns <= self.clock.monotonic_ns()]
        if not ready:
            soonest = min(actor.wake_ns for actor in waiting)
            self.clock.advance((soonest - self.clock.monotonic_ns()) / NANOSECONDS)
            return
        roll = self.random.random()
        if roll < 0.30:
            self.clock.advance(self.random.choice((0.01, 0.3, 2.0)))
        elif roll < 0.32:
            self.clock.advance(self.random.uniform(20, 90))
        actor = self.random.choice(ready)
        if self.random.random() < 0.003:
            actor.killed = True
        self._pass(actor)
        self._check()

    def _pass(self, actor: Actor) -> None:
        self.back.clear()
        actor.go.set()
        self.back.wait()

    def _check(self) -> None:
        alive = [
            actor.lease.holder
            for actor in self.actors
            if actor.lease is not None and not actor.done and actor.lease.remaining_ns > 0
        ]
        if len(alive) > 1:
            assert all(holder.mode is Mode.SHARED for holder in alive), alive

    def _live(self, actor: Actor) -> None:
        self.local.actor = actor
        clock = SteppedClock(self)
        try:
            actor.go.wait()
            actor.go.clear()
            self._work(actor, clock)
        except Killed:
            pass
        except BaseException as failed:  # noqa: BLE001
            self.failure = failed
        finally:
            actor.done = True
            self.back.set()

    def _work(self, actor: Actor, clock: SteppedClock) -> None:
        choice = random.Random(self.random.random())
        mine = Leases(self.store, clock, place=self.place, terms=TERMS, randomness=choice)
        for _ in range(3):
            mode = choice.choice((Mode.SHARED, Mode.EXCLUSIVE))
            try:
                lease = mine.acquire(mode, f"{actor.number}", wait=choice.choice((0, 30, 200)))
            except (LeaseHeld, LeaseLost):
                continue
            actor.lease = lease
            actor.acquired += 1
            try:
                for _ in range(choice.randrange(6)):
                    clock.sleep(choice.choice((0.1, 15, 35)))
                    lease.renew_if_due()
            except LeaseLost:
                pass
            actor.lease = None
            lease.release()


class SteppedClock(FakeClock):
    """An actor's view of the scheduler's clock."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def now_ns(self) -> int:
        return self._scheduler.clock.now_ns()

    def monotonic_ns(self) -> int:
        return self._scheduler.clock.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        self._scheduler.sleep(seconds)


@pytest.mark.usefixtures("elsewhere")
def test_no_schedule_lets_conflicting_holders_live(place: PlaceOfEntries) -> None:
    acquired = 0
    for seed in range(SCHEDULES):
        scheduler = Scheduler(seed, place, hosts=2 + seed % 3)
        try:
            scheduler.run()
        except BaseException as failed:
            raise AssertionError(f"schedule {seed}: {failed!r}") from failed
        acquired += sum(actor.acquired for actor in scheduler.actors)
    assert acquired > SCHEDULES  # the schedules do get somewhere


def test_errors_have_exit_codes() -> None:
    assert leases.LeaseHeld.exit_code != leases.LeaseLost.exit_code
