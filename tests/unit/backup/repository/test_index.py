from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from lazarette.backup.repository import index as index_module
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.packs import PATCH_BIT, PackRecord
from lazarette.backup.repository.segments import BLOCK_DTYPE, CHUNK_DTYPE, PATCH_DTYPE

FRESH_LIMIT = 4000


def record(chance: random.Random, blocks: int, each: int) -> PackRecord:
    """A record of random chunks."""
    chunks = np.empty(blocks * each, CHUNK_DTYPE)
    chunks["id"] = np.frombuffer(chance.randbytes(16 * len(chunks)), "V16")
    chunks["length"] = [chance.randrange(1, 1000) for _ in range(len(chunks))]
    rows = np.empty(blocks, BLOCK_DTYPE)
    rows["offset"] = np.arange(blocks) * 5000 + 30
    rows["stored"] = 4000
    rows["plain"] = chunks["length"].reshape(blocks, each).sum(axis=1)
    rows["chunks"] = each
    size = 5000 * blocks + 100
    return PackRecord(
        chance.randbytes(16), 0, b"\0\0", size, rows.tobytes(), chunks.tobytes(), b"", 0
    )


def places(found: PackRecord) -> dict[bytes, tuple[bytes, int, int, int]]:
    """Pack, block, start and length of each chunk, worked out one by one."""
    wanted = {}
    rows = found.chunk_rows()
    for offset, _, _, count in found.block_rows():
        start = 0
        for _ in range(count):
            chunk, length = next(rows)
            wanted[chunk] = (found.pack, offset, start, length)
            start += length
    return wanted


@pytest.mark.parametrize("each", [1, 7])
def test_every_chunk_is_found_where_it_is(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FRESH_LIMIT", FRESH_LIMIT)
    chance = random.Random(each)
    index = Index()
    wanted: dict[bytes, tuple[bytes, int, int, int]] = {}
    sizes = [1, 300, 2 * FRESH_LIMIT // each, 5, 5000, FRESH_LIMIT // each + 1, 20]
    for blocks in sizes:
        added = record(chance, blocks, each)
        index.add([added])
        wanted |= places(added)
    assert len(index) == len(wanted)
    for chunk in chance.sample(sorted(wanted), 2000):
        found = index.find(chunk)
        assert found is not None
        assert (found.pack, found.offset, found.start, found.length) == wanted[chunk]
        assert chunk in index and index.pack_of(chunk) == found.pack
    absent = chance.randbytes(16)
    assert index.find(absent) is None and absent not in index
    some = chance.sample(sorted(wanted), 50)
    assert index.known(b"".join([*some, absent])) == [True] * 50 + [False]
    assert set(index.ids()) == wanted.keys()
    assert index.resident_bytes <= 48 * len(index)
    index.consolidate()
    rows = index.rows(b"".join([*some, absent]))
    assert rows[-1] == -1 and index.row_ids(rows[:-1]) == b"".join(some)
    assert [index.packs()[n].pack for n in index.row_packs()[rows[:-1]]] == [
        wanted[chunk][0] for chunk in some
    ]


def test_ids_that_share_their_first_half() -> None:
    chunks = np.empty(40, CHUNK_DTYPE)
    ids = [b"same----" + bytes([n]) * 8 for n in random.Random(1).sample(range(40), 40)]
    chunks["id"] = np.frombuffer(b"".join(ids), "V16")
    chunks["length"] = range(1, 41)
    rows = np.array([(30, 900, sum(range(1, 41)), 40)], BLOCK_DTYPE)
    added = PackRecord(b"p" * 16, 0, b"\0\0", 1000, rows.tobytes(), chunks.tobytes(), b"", 0)
    index = Index()
    index.add([added])
    index.consolidate()
    wanted = places(added)
    for chunk in ids:
        found = index.find(chunk)
        assert found is not None and (found.start, found.length) == wanted[chunk][2:]
    assert index.known(b"".join(ids)) == [True] * 40
    assert index.row_ids(index.rows(b"".join(ids))) == b"".join(ids)


def test_patches_know_what_they_need() -> None:
    chance = random.Random(2)
    plain = record(chance, 2, 2)
    chunks = np.frombuffer(plain.chunks, CHUNK_DTYPE).copy()
    chunks["length"][1] |= PATCH_BIT
    needs = np.array([(1, np.void(b"n" * 16))], PATCH_DTYPE)
    index = Index()
    index.add(
        [
            PackRecord(
                plain.pack, 0, b"\0\0", plain.size, plain.blocks, chunks.tobytes(),
                needs.tobytes(), 0,
            )
        ]
    )  # fmt: skip
    patch = chunks["id"][1].tobytes()
    found = index.find(patch)
    assert found is not None and found.patch
    assert found.length == list(plain.chunk_rows())[1][1]
    assert index.needs(patch) == (b"n" * 16,)
    assert index.needs(chunks["id"][0].tobytes()) == ()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("plain_first", [False, True])
def test_the_whole_form_of_a_chunk_goes_before_its_patches(
    plain_first: bool, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts stored the same chunk at once: one whole, two as different patches."""
    monkeypatch.setattr(index_module, "FRESH_LIMIT", 10 if many else FRESH_LIMIT)
    chance = random.Random(8)
    chunk = chance.randbytes(16)

    def form(need: bytes) -> PackRecord:
        made = record(chance, 1, 7)
        chunks = np.frombuffer(made.chunks, CHUNK_DTYPE).copy()
        chunks["id"][3] = np.void(chunk)
        patched = np.empty(1 if need else 0, PATCH_DTYPE)
        if need:
            chunks["length"][3] |= PATCH_BIT
            patched["chunk"], patched["source"] = 3, np.void(need)
        return msgspec.structs.replace(made, chunks=chunks.tobytes(), patches=patched.tobytes())

    patches, whole = [form(b"n" * 16), form(b"m" * 16)], form(b"")
    order = [whole, *patches] if plain_first else [*patches, whole]
    index = Index()
    for one in order:
        index.add([one])
    found = index.find(chunk)
    assert found is not None and (found.pack, found.patch) == (whole.pack, False)
    assert set(index.needs(chunk)) == {b"n" * 16, b"m" * 16}, "what any form needs is kept"
    index.consolidate()
    [row] = index.rows(chunk)
    assert index.packs()[index.row_packs()[row]].pack == whole.pack


@pytest.mark.parametrize("field", ["pack", "blocks", "chunks", "patches", "key"])
def test_contradicting_records_are_refused(field: str) -> None:
    good = record(random.Random(3), 2, 2)
    good.validate()
    values = {name: getattr(good, name) for name in good.__struct_fields__}
    values[field] = values[field] + b"x"
    with pytest.raises(RepositoryDamaged):
        PackRecord(**values).validate()
    values = {name: getattr(good, name) for name in good.__struct_fields__}
    values["size"] = 10
    with pytest.raises(RepositoryDamaged):
        PackRecord(**values).validate()
