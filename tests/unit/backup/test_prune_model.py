"""The prune protocol as a model (case A17), run over many random schedules.

Every actor is a generator that yields before each operation on the store; a schedule picks
who goes next, who dies, and whose lease runs out.  The rules are those of
``lazarette.backup.repository.prune``; leaving one out must be noticed.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import pytest

SCHEDULES = int(os.environ.get("LAZ_TEST_SCHEDULES", "12000"))
Steps = Generator[None, None, None]


@dataclass
class Mark:
    packs: dict[int, frozenset[str]]
    considered: frozenset[int]
    waits_for: frozenset[int] | None


@dataclass
class World:
    """A store, and which rules are followed."""

    packs: dict[int, frozenset[str]] = field(default_factory=dict)
    index: dict[int, frozenset[int]] = field(default_factory=dict)
    contents: dict[int, frozenset[str]] = field(default_factory=dict)
    marks: dict[int, Mark] = field(default_factory=dict)
    snapshots: dict[int, frozenset[str]] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    pruning: set[int] = field(default_factory=set)
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    without: str = ""

    def new_pack(self, chunks: frozenset[str]) -> int:
        pack = next(self.ids)
        self.packs[pack] = self.contents[pack] = chunks
        return pack

    def listed(self) -> set[int]:
        return {pack for packs in self.index.values() for pack in packs}

    def chunk_is_safe(self, chunk: str) -> bool:
        marked = {pack for mark in self.marks.values() for pack in mark.packs}
        return any(
            chunk in chunks and (pack in self.listed() or pack in marked)
            for pack, chunks in self.packs.items()
        )


def _read_index(world: World) -> Generator[None, None, set[int]]:
    """List index objects, then open one after the other; again if one was merged meanwhile."""
    seen: dict[int, frozenset[int]] = {}
    while True:
        yield
        names = list(world.index)
        whole = True
        for name in names:
            if name not in seen:
                yield
                if name in world.index:
                    seen[name] = world.index[name]
                else:
                    whole = False
        if whole:
            return {pack for packs in seen.values() for pack in packs}


def backup(world: World, chance: random.Random, lease: int, base: int | None) -> Steps:
    yield
    world.leases.add(lease)
    yield
    condemned = {pack for mark in world.marks.values() for pack in mark.packs}
    known = yield from _read_index(world)
    if world.without != "P1":
        known -= condemned
    have = {chunk for pack in known for chunk in world.contents[pack]}
    kept: frozenset[str] = frozenset()
    if base is not None:
        yield
        if base in world.snapshots or world.without == "base":
            content = world.snapshots.get(base) or world.contents.get(-base, frozenset())
            if not condemned or content <= have or world.without == "P1":
                kept = frozenset(chance.sample(sorted(content), chance.randint(0, len(content))))
    wanted = kept | frozenset(chance.sample("abcdefgh", chance.randint(1, 5)))
    packs = []
    for chunk in sorted(wanted - kept):
        if chunk not in have:
            yield
            packs.append(world.new_pack(frozenset(chunk)))
            have.add(chunk)
    if packs:
        yield
        if lease not in world.leases and world.without != "P7":
            return
        world.index[next(world.ids)] = frozenset(packs)
    yield
    if lease not in world.leases:
        return
    yield  # a stall between the last look at the lease and the write
    snapshot = next(world.ids)
    world.snapshots[snapshot] = wanted
    world.contents[-snapshot] = wanted
    if lease not in world.leases:
        world.unsure.add(snapshot)  # written too late; its writer is about to see that
    yield
    if lease not in world.leases and world.without != "P6":
        listed = yield from _read_index(world)
        if not all(any(chunk in world.contents[pack] for pack in listed) for chunk in wanted):
            yield
            world.snapshots.pop(snapshot, None)
    yield
    world.leases.discard(lease)


def restore(world: World, chance: random.Random, lease: int) -> Steps:
    yield
    world.leases.add(lease)
    yield
    sure = sorted(world.snapshots.keys() - world.unsure)
    if not sure:
        return
    snapshot = chance.choice(sure)
    content = world.snapshots[snapshot]
    known = yield from _read_index(world)
    yield
    marked = {pack for mark in world.marks.values() for pack in mark.packs}
    firm = {chunk for pack in known - marked for chunk in world.contents[pack]}
    known |= marked
    for chunk in sorted(content):
        again = yield from _read_index(world)
        if lease not in world.leases:
            return
        if chunk not in firm and snapshot not in world.snapshots:
            continue  # see P3: very young, and forgotten while it was restored
        assert any(chunk in world.packs.get(pack, ()) for pack in known | again), (
            f"a restore lost chunk {chunk}"
        )
    world.leases.discard(lease)


def prune(world: World, chance: random.Random, lease: int) -> Steps:
    yield
    world.leases.add(lease)
    world.pruning.add(lease)
    yield
    if world.pruning & world.leases - {lease}:
        world.leases.discard(lease)
        return
    yield from _sweep_all(world, lease)
    yield
    present = set(world.packs)
    yield
    marked = {pack for mark in world.marks.values() for pack in mark.packs}
    yield
    objects = dict(world.index)
    listed = {pack for packs in objects.values() for pack in packs}
    yield
    considered = frozenset(world.snapshots)
    live = {chunk for one in considered for chunk in world.snapshots.get(one, ())}
    keep: dict[str, int] = {}
    for pack in sorted(listed):
        for chunk in world.contents[pack] & live:
            keep.setdefault(chunk, pack)
    dead = {pack for pack in listed if pack not in keep.values()}
    rewrite = {pack for pack in listed - dead if chance.random() < 0.3}
    fresh = set()
    for pack in sorted(rewrite):
        yield
        fresh.add(world.new_pack(frozenset(c for c, home in keep.items() if home == pack)))
    gone = dead | rewrite
    stale = {name for name, packs in objects.items() if packs & gone}
    moved = {pack for name in stale for pack in objects[name]} - gone | fresh
    if moved:
        yield
        if lease not in world.leases and world.without != "P7":
            return
        world.index[next(world.ids)] = frozenset(moved)
    orphans = present - listed - marked
    condemned = {pack: world.contents[pack] for pack in gone | orphans}
    if condemned:
        yield
        if lease not in world.leases:
            return
        name = next(world.ids)
        world.marks[name] = Mark(condemned, considered, None)
        yield
        _note(world, lease, name)
    for name in stale:
        yield
        if lease not in world.leases:
            return
        world.index.pop(name, None)
    yield from _sweep_all(world, lease)
    world.leases.discard(lease)


def _note(world: World, lease: int, name: int) -> None:
    if name in world.marks:
        world.marks[name].waits_for = frozenset(world.leases - {lease})


def _sweep_all(world: World, lease: int) -> Steps:
    yield
    for name, mark in list(world.marks.items()):
        if mark.waits_for is None:
            yield
            _note(world, lease, name)
        yield
        if mark.waits_for and mark.waits_for & world.leases and world.without != "P3":
            continue
        yield
        young = [one for one in world.snapshots if one not in mark.considered]
        listed = yield from _read_index(world)
        have = {chunk for pack in listed for chunk in world.contents[pack]}
        needed = {
            pack
            for one in young
            for chunk in world.snapshots.get(one, frozenset()) - have
            for pack, chunks in mark.packs.items()
            if chunk in chunks
        }
        if needed and world.without != "P4":
            yield
            world.index[next(world.ids)] = frozenset(needed)
        listed = yield from _read_index(world)
        for pack in mark.packs:
            if pack not in listed or world.without == "P5":
                yield
                if lease not in world.leases:
                    return
                world.packs.pop(pack, None)
        yield
        world.marks.pop(name, None)


def forget(world: World, chance: random.Random) -> Steps:
    for _ in range(3):
        for _ in range(chance.randint(0, 25)):
            yield
        if world.snapshots:
            del world.snapshots[chance.choice(sorted(world.snapshots))]


def _world(chance: random.Random, without: str) -> World:
    world = World(without=without)
    for _ in range(chance.randint(1, 3)):
        chunks = frozenset(chance.sample("abcdefgh", chance.randint(1, 4)))
        have = {chunk for pack in world.listed() for chunk in world.contents[pack]}
        if chunks - have:
            pack = world.new_pack(chunks - have)
            world.index[next(world.ids)] = frozenset({pack})
        snapshot = next(world.ids)
        world.snapshots[snapshot] = world.contents[-snapshot] = chunks
    if chance.random() < 0.5:
        world.new_pack(frozenset("z"))
    return world


def _schedule(seed: int, without: str = "") -> None:
    chance = random.Random(seed)
    world = _world(chance, without)
    lease = itertools.count(1000)
    bases: list[int | None] = [None, *world.snapshots]
    makers: list[Callable[[], Steps]] = [
        lambda: backup(world, chance, next(lease), chance.choice(bases)),
        lambda: backup(world, chance, next(lease), chance.choice(bases)),
        lambda: prune(world, chance, next(lease)),
        lambda: prune(world, chance, next(lease)),
        lambda: restore(world, chance, next(lease)),
        lambda: forget(world, chance),
    ]
    actors = [make() for make in makers if chance.random() < 0.9]
    sluggish = chance.random()
    while actors:
        weights = [1.0 if number % 2 else sluggish + 0.02 for number in range(len(actors))]
        (actor,) = chance.choices(actors, weights)
        if chance.random() < 0.004:
            actors.remove(actor)  # killed; its lease runs out some time later
            continue
        if world.leases and chance.random() < 0.006:
            world.leases.discard(chance.choice(sorted(world.leases)))
        try:
            next(actor)
        except StopIteration:
            actors.remove(actor)
    _verify(world)
    world.leases.clear()
    for _ in prune(world, chance, next(lease)):
        pass
    _verify(world)
    assert not world.marks
    assert set(world.packs) == world.listed()


def _verify(world: World) -> None:
    for snapshot, chunks in world.snapshots.items():
        for chunk in chunks:
            assert world.chunk_is_safe(chunk), f"snapshot {snapshot} lost chunk {chunk}"


@pytest.mark.timeout(max(300, SCHEDULES // 40))
def test_no_schedule_loses_a_chunk() -> None:
    for seed in range(SCHEDULES):
        try:
            _schedule(seed)
        except AssertionError as lost:
            raise AssertionError(f"schedule {seed}: {lost}") from lost


@pytest.mark.parametrize(
    ("rule", "first"),
    # where to begin: the loss without P1 or P6 needs a rare interleaving (1 in 70,000)
    [("P1", 72_700), ("P3", 0), ("P4", 0), ("P5", 0), ("P6", 61_300), ("P7", 8_000), ("base", 0)],
)
def test_every_rule_is_needed(rule: str, first: int) -> None:
    with pytest.raises(AssertionError):
        for seed in range(first, first + SCHEDULES):
            _schedule(seed, rule)
