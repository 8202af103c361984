"""Chunks read several at once: those that lie in a row in one block, each against its id."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.support.repositories import backup, bring_back, local, reopen

from lazarette.backup.repository import packs
from lazarette.backup.repository.format import PAGE, RepositoryDamaged
from lazarette.backup.repository.ingest import SPAN
from lazarette.backup.repository.repository import Repository

BLOCK = 64 << 10


def _store(repo: Repository, blocks: list[bytes]) -> list[bytes]:
    """Store blocks as paged chunks of one span; their ids."""
    ingest = repo.ingest()
    lane = ingest.lane()
    data = b"".join(blocks)
    ids = repo.crypt.paged_ids(data, [len(one) for one in blocks])
    assert all(map(ingest.claim, ids))
    lane.add_span(ids, [len(one) for one in blocks], memoryview(data), paged=True)
    ingest.finish()
    return ids


def _blocks(count: int, seed: int = 1) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(BLOCK) for _ in range(count)]


def test_a_row_ends_with_its_block(tmp_path: Path) -> None:
    with local(tmp_path) as repo:
        blocks = _blocks(20)
        ids = _store(repo, blocks)
        first = SPAN // BLOCK
        assert repo.reader.get_row(ids) == (first, b"".join(blocks[:first]))
        assert repo.reader.get_row(ids[3:6]) == (3, b"".join(blocks[3:6]))
        assert repo.reader.get_row(ids[first:]) == (20 - first, b"".join(blocks[first:]))


def test_a_row_ends_where_the_next_chunk_is_elsewhere(tmp_path: Path) -> None:
    with local(tmp_path) as repo:
        blocks = _blocks(4)
        ids = _store(repo, blocks)
        assert repo.reader.get_row([ids[0], ids[2]]) == (1, blocks[0])
        assert repo.reader.get_row([ids[1], ids[1]]) == (1, blocks[1])
        assert repo.reader.get_row([ids[2], bytes(16)]) == (1, blocks[2])


def test_a_wrong_chunk_does_not_take_the_others_of_its_row_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local(tmp_path) as repo:
        blocks = _blocks(4)
        ids = _store(repo, blocks)
        opened = packs.open_block

        def flipped(*args: object) -> bytes:
            data = bytearray(opened(*args))  # type: ignore[arg-type]
            data[2 * BLOCK + PAGE] ^= 1
            return bytes(data)

        monkeypatch.setattr("lazarette.backup.repository.chunks.open_block", flipped)
        reader = reopen(repo).reader
        assert reader.get_row(ids) == (1, blocks[0])
        assert reader.get_row(ids[1:]) == (1, blocks[1])
        with pytest.raises(RepositoryDamaged, match=f"chunk {ids[2].hex()} .* not what its id"):
            reader.get_row(ids[2:])
        assert reader.get_row(ids[3:]) == (1, blocks[3])


def test_a_restore_leaves_out_only_the_chunk_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    blocks = _blocks(40)
    (source / "table").write_bytes(b"".join(blocks))
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        wrong = repo.crypt.paged_ids(b"".join(blocks), [BLOCK] * 40)[20]
        location = _place(repo, wrong)
        opened = packs.open_block

        def flipped(cipher: object, name: str, offset: int, *rest: object) -> bytes:
            data = bytearray(opened(cipher, name, offset, *rest))  # type: ignore[arg-type]
            if (name, offset) == (location[0].hex(), location[1]):
                data[location[2]] ^= 1
            return bytes(data)

        monkeypatch.setattr("lazarette.backup.repository.chunks.open_block", flipped)
        report = bring_back(reopen(repo), record, tmp_path / "target", keep_damaged=True)
    (damaged,) = report.damaged
    assert damaged.path == b"table" and f"{BLOCK} bytes at {20 * BLOCK}: " in damaged.text
    blocks[20] = bytes(BLOCK)
    assert (tmp_path / "target" / "table").read_bytes() == b"".join(blocks)


def _place(repo: Repository, chunk: bytes) -> tuple[bytes, int, int]:
    """Pack, offset of the block and place in it of a chunk."""
    found = repo.reader.locate(chunk)
    return found.pack, found.offset, found.start
