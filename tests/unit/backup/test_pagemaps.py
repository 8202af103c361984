from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe

from lazarette.backup.archive import Outcome
from lazarette.backup.pagemaps import Delta, PageMap, PageMaps, changed_pages, delta
from lazarette.backup.repository import patches, prune
from lazarette.backup.repository.format import PAGE, RepositoryDamaged

BLOCK = 64 << 10


def _delta(
    block: bytes, hashes: bytes, base: PageMap, whole: Callable[[bytes], bool]
) -> Delta | None:
    changed = changed_pages(hashes, base, whole)
    if changed is None:
        return None
    new = b"".join([block[page * PAGE : (page + 1) * PAGE] for page in changed])
    return delta(hashes, base, changed, blake3(new).digest(16), new)


def _touch(path: Path, chance: random.Random, pages: int) -> None:
    count = path.stat().st_size // PAGE
    with open(path, "r+b") as file:
        for number in chance.sample(range(count), pages):
            file.seek(number * PAGE + chance.randrange(PAGE - 100))
            file.write(chance.randbytes(100))


def test_light_changes_send_pages_not_blocks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    chance = random.Random(1)
    table = source / "16384"
    table.write_bytes(chance.randbytes(32 << 20))
    with local(tmp_path) as repo:
        snapshots = [backup(repo, source).snapshot]
        states = [describe(source)]
        for _ in range(6):
            _touch(table, chance, 60)
            done = backup(reopen(repo), source, snapshots[-1])
            assert done.stats.bytes_sent < 60 * PAGE * 1.5
            snapshots.append(done.snapshot)
            states.append(describe(source))
        for number, (snapshot, state) in enumerate(zip(snapshots, states, strict=True)):
            target = tmp_path / f"t{number}"
            report = bring_back(reopen(repo), snapshot, target)
            assert report.outcome is Outcome.OK
            assert describe(target) == state
        assert repo.check(1.0).clean
        repo.forget([snapshot.id for snapshot in snapshots[:-1]])
        prune.run(repo, prune.PruneOptions(max_unused=0.0))
        assert repo.check(1.0).clean
        bring_back(reopen(repo), snapshots[-1], tmp_path / "last")
        assert describe(tmp_path / "last") == states[-1]


def test_without_a_cache_whole_blocks_are_sent(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    chance = random.Random(2)
    (source / "t").write_bytes(chance.randbytes(4 << 20))
    with local(tmp_path, cache=False) as repo:
        first = backup(repo, source).snapshot
        _touch(source / "t", chance, 3)
        done = backup(repo, source, first)
        assert 2 * BLOCK < done.stats.bytes_sent < 4 * BLOCK


def test_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "pages.sqlite"
    file.write_bytes(b"rubbish" * 1000)
    maps = PageMaps(file, bytes(32))
    block = memoryview(os.urandom(BLOCK))
    hashes = maps.hashes(block)
    maps.note(b"c" * 16, PageMap.plain(b"c" * 16, hashes))
    maps.flush()
    chunk = b"c" * 16
    assert maps.find_all([(chunk, 8)]) == {chunk: PageMap.plain(chunk, hashes)}
    assert maps.find_all([(chunk, 4)]) == {}
    maps.close()


def test_delta_of_a_delta_refers_to_where_the_pages_are(tmp_path: Path) -> None:
    maps = PageMaps(tmp_path / "pages.sqlite", bytes(32))
    chance = random.Random(3)
    whole = b"0" * 16
    stored = {whole: chance.randbytes(BLOCK)}
    block = bytearray(stored[whole])
    known = PageMap.plain(whole, maps.hashes(memoryview(block)))
    for generation, page in enumerate((3, 5, 3, 0, 7, 1), 1):
        block[page * PAGE : page * PAGE + 10] = chance.randbytes(10)
        hashes = maps.hashes(memoryview(bytes(block)))
        found = _delta(bytes(block), hashes, known, stored.__contains__)
        assert found is not None and len(found.new) == PAGE and len(found.payload) < 300
        assert patches.decode(found.payload).new_pages == b""
        stored[found.holder] = found.new
        name = b"%d" % generation * 16
        assert PageMap.unpack(name, found.pages.pack(name), 8) == found.pages
        assert patches.assemble(patches.decode(found.payload), stored.__getitem__) == bytes(block)
        again = _delta(bytes(block), hashes, known, lambda chunk: chunk == whole)
        if again is not None:
            assert set(again.needs) == {whole, again.holder}, "what is not whole is stored again"
        known = found.pages
    assert again is None, "more than half of it would be"
    maps.close()


@pytest.mark.parametrize("cut", [0, 5, 11, 20, 40, 100])
def test_cut_payload_is_refused(cut: int) -> None:
    payload, needs = patches.encode(PAGE, [(b"s" * 16, 3), (None, 0)], [bytes(PAGE)])
    assert needs == (b"s" * 16,)
    with pytest.raises(RepositoryDamaged):
        patches.decode(payload[:cut])
