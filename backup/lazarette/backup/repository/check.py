"""Checking a repository: its structure, and as much of its data as wished.

Structure: every index object and snapshot opens, every pack the index names is there with
its size, every page and chunk that snapshots refer to is known.  Data: packs are read
whole, verified by their checksums, decrypted, and every chunk compared with its id.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec

from lazarette.backup import native
from lazarette.backup.repository import indexes, snapshots
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import Kind
from lazarette.backup.repository.format import (
    ID_SIZE,
    PACKS,
    PAGE,
    SNAPSHOTS,
    Crypt,
    RepositoryDamaged,
    id_of,
    pack_name,
    pieces,
)
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.packs import (
    LENGTH_MASK,
    PAGED_BIT,
    PATCH_BIT,
    PackRecord,
    open_block,
    pack_cipher,
    read_foot,
    read_list,
    verify_pack,
)
from lazarette.backup.repository.references import References
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.contract import BlobNotFound, BlobStore, Buffer
from lazarette.storage.errors import Cancelled, DamagedData

_SHOWN_FILES = 1000


class Problem(msgspec.Struct, frozen=True):
    """Something that is not as it should be.

    Attributes:
        object: name of the store object.
        text: what is wrong with it.
        chunks: ids of chunks lost by it.
    """

    object: str
    text: str
    chunks: frozenset[bytes] = frozenset()


class Affected(msgspec.Struct, frozen=True):
    """A file or directory a snapshot cannot give back whole."""

    snapshot: str
    path: bytes


class CheckReport(msgspec.Struct):
    """What a check found.

    Attributes:
        problems: damage.
        affected: what it costs; at most 1,000 are listed.
        affected_snapshots: ids of snapshots that are not whole.
        unused_packs: packs no index names: left by a killed run, or being written.
        snapshots: how many were gone through.
        packs: how many the index names.
        packs_read: how many were read whole.
        bytes_read: their bytes.
    """

    problems: list[Problem] = []
    affected: list[Affected] = []
    affected_snapshots: list[str] = []
    unused_packs: list[bytes] = []
    snapshots: int = 0
    packs: int = 0
    packs_read: int = 0
    bytes_read: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def lost_chunks(self) -> set[bytes]:
        """Ids of all chunks that cannot be had."""
        return {chunk for problem in self.problems for chunk in problem.chunks}


class _Loaded(msgspec.Struct):
    index: Index
    records: dict[bytes, PackRecord]


def run(
    store: BlobStore,
    crypt: Crypt,
    read_data: float = 0.0,
    threads: int = 2,
    cancelled: Callable[[], bool] = lambda: False,
    seed: int | None = None,
) -> CheckReport:
    """Check a repository from the store alone, without any local copy.

    Args:
        store: where it is.
        crypt: its keys.
        read_data: share of packs to read whole, 0 to 1.
        threads: readers.
        cancelled: asked for every pack and page.
        seed: which packs a share picks; None picks anew each time.

    Raises:
        Cancelled: as asked.
        StoreUnavailable: the store does not answer.
    """
    native.keep_memory()
    report = CheckReport()
    loaded = _load_index(store, crypt, report)
    present = _check_packs(store, loaded, report)
    wanted = [pack for pack in loaded.records if pack in present]
    if read_data < 1.0:
        chosen = random.Random(seed)
        wanted = chosen.sample(
            wanted, min(len(wanted), -(-int(len(wanted) * read_data * 1e6) // 10**6))
        )
    _read_packs(store, crypt, loaded, wanted, threads, report, cancelled)
    _check_snapshots(store, crypt, loaded.index, report, cancelled)
    return report


def _load_index(store: BlobStore, crypt: Crypt, report: CheckReport) -> _Loaded:
    loaded = _Loaded(Index(), {})
    for name in indexes.names(store):
        try:
            records = indexes.read(store, crypt, name, None)
        except DamagedData as bad:
            report.problems.append(Problem(name, str(bad)))
            continue
        for record in records or ():
            loaded.records.setdefault(record.pack, record)
        loaded.index.add(records or ())
    report.packs = len(loaded.records)
    return loaded


def _check_packs(store: BlobStore, loaded: _Loaded, report: CheckReport) -> set[bytes]:
    sizes = {}
    for info in store.list(PACKS):
        try:
            sizes[id_of(info.name)] = info.size
        except RepositoryDamaged as bad:
            report.problems.append(Problem(info.name, str(bad)))
    for pack, record in loaded.records.items():
        size = sizes.get(pack)
        if size != record.size:
            text = "is missing" if size is None else f"has {size} bytes instead of {record.size}"
            lost = _lost(loaded, pack, record.chunk_ids()) if size is None else frozenset()
            report.problems.append(Problem(pack_name(pack), f"pack {text}", lost))
    report.unused_packs = [pack for pack in sizes if pack not in loaded.records]
    return {pack for pack in sizes if pack in loaded.records}


def _lost(loaded: _Loaded, pack: bytes, chunks: Sequence[bytes]) -> frozenset[bytes]:
    """Of the chunks of a pack those that no other pack has."""
    return frozenset(chunk for chunk in chunks if loaded.index.pack_of(chunk) == pack)


def _read_packs(
    store: BlobStore,
    crypt: Crypt,
    loaded: _Loaded,
    wanted: Sequence[bytes],
    threads: int,
    report: CheckReport,
    cancelled: Callable[[], bool],
) -> None:
    # On use: it brings logging, and a repository is opened for other work more often.
    from concurrent.futures import ThreadPoolExecutor

    reader = ChunkReader(store, crypt, loaded.index)

    def one(pack: bytes) -> tuple[int, list[Problem]]:
        if cancelled():
            raise Cancelled("check was cancelled")
        return check_pack(store, crypt, reader, loaded.records[pack])

    damaged = {problem.object for problem in report.problems}
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        for pack, (size, problems) in zip(wanted, pool.map(one, wanted), strict=True):
            report.packs_read += 1
            report.bytes_read += size
            for problem in problems:
                lost = _lost(loaded, pack, list(problem.chunks))
                if problem.object in damaged:
                    report.problems = [
                        old for old in report.problems if old.object != problem.object
                    ]
                report.problems.append(Problem(problem.object, problem.text, lost))


def check_pack(
    store: BlobStore, crypt: Crypt, reader: ChunkReader, record: PackRecord
) -> tuple[int, list[Problem]]:
    """Read a pack whole and compare every chunk with its id.

    Returns:
        Bytes read, and what is wrong: at most one problem naming every chunk lost.
    """
    name = pack_name(record.pack)
    try:
        data = store.get(name)
    except BlobNotFound:
        return 0, [Problem(name, "pack is missing", frozenset(record.chunk_ids()))]
    except DamagedData as bad:
        return 0, [Problem(name, str(bad), frozenset(record.chunk_ids()))]
    texts = []
    try:
        for offset, length in verify_pack(name, data):
            texts.append(f"{length} bytes at {offset} fail their checksum")
        foot = read_foot(name, data, len(data))
        listing = data[foot.list_at : foot.list_at + foot.list_length]
        if read_list(crypt, record.pack, listing, len(data)) != record:
            texts.append("the pack's own list differs from the index")
    except DamagedData as bad:
        texts.append(str(bad))
    lost = []
    cipher = pack_cipher(crypt, record)
    lengths = [length for _, length in record.chunk_rows()]
    ids = b"".join(record.chunk_ids())
    number = 0
    for offset, stored, plain, count in record.block_rows():
        block = ids[number * ID_SIZE : (number + count) * ID_SIZE]
        try:
            sealed = memoryview(data)[offset : offset + stored]
            opened = memoryview(open_block(cipher, name, offset, sealed, plain))
            lost += _wrong_chunks(crypt, reader, opened, block, lengths[number : number + count])
        except DamagedData as bad:
            lost += [block[at : at + ID_SIZE] for at in range(0, len(block), ID_SIZE)]
            texts.append(str(bad))
        number += count
    if not texts and not lost:
        return len(data), []
    texts = texts or [f"{len(lost)} chunks are not what their ids say"]
    return len(data), [Problem(name, "; ".join(dict.fromkeys(texts)), frozenset(lost))]


def _wrong_chunks(
    crypt: Crypt, reader: ChunkReader, block: memoryview, ids: bytes, lengths: list[int]
) -> list[bytes]:
    chunks = [ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE)]
    sizes = [length & LENGTH_MASK for length in lengths]
    if all(length & PAGED_BIT and not length & (PATCH_BIT | PAGE - 1) for length in lengths):
        found = crypt.paged_ids(block, sizes)
        return [chunk for chunk, one in zip(chunks, found, strict=True) if one != chunk]
    payloads = pieces(block, sizes)
    plain = [n for n, length in enumerate(lengths) if not length & (PATCH_BIT | PAGED_BIT)]
    found = crypt.chunk_ids([payloads[number] for number in plain])
    names: dict[int, bytes | None] = dict(zip(plain, found, strict=True))
    for number in set(range(len(chunks))) - names.keys():
        names[number] = _name_of(crypt, reader, payloads[number], lengths[number])
    return [chunk for number, chunk in enumerate(chunks) if names[number] != chunk]


def _name_of(crypt: Crypt, reader: ChunkReader, payload: Buffer, length: int) -> bytes | None:
    """Id of what a patch or a paged chunk is, None when it cannot be put together."""
    try:
        data = reader.assemble(payload) if length & PATCH_BIT else payload
    except DamagedData:
        return None
    return crypt.id_of(data, bool(length & PAGED_BIT))


def _check_snapshots(
    store: BlobStore,
    crypt: Crypt,
    index: Index,
    report: CheckReport,
    cancelled: Callable[[], bool],
) -> None:
    lost = report.lost_chunks
    reader = ChunkReader(store, crypt, index)
    clean: set[bytes] = set()
    for info in store.list(SNAPSHOTS):
        try:
            record = snapshots.parse(crypt, info.name, store.get(info.name))
        except BlobNotFound:
            continue
        except DamagedData as bad:
            report.problems.append(Problem(info.name, str(bad)))
            continue
        report.snapshots += 1
        if not _whole(record, reader, index, lost, clean, cancelled):
            report.affected_snapshots.append(record.id)
            _list_affected(record, reader, index, lost, report)


def _whole(
    record: SnapshotRecord,
    reader: ChunkReader,
    index: Index,
    lost: set[bytes],
    clean: set[bytes],
    cancelled: Callable[[], bool],
) -> bool:
    walk = References(reader, None, clean)
    try:
        for _, ids in walk.of(record.root):
            if cancelled():
                raise Cancelled("check was cancelled")
            if not all(index.known(ids)) or (lost and _touches(ids, lost, index)):
                break
        else:
            return True
    except DamagedData:
        pass
    clean.difference_update(walk.added)
    return False


def _touches(ids: bytes, lost: set[bytes], index: Index) -> bool:
    for at in range(0, len(ids), ID_SIZE):
        chunk = ids[at : at + ID_SIZE]
        if chunk in lost or any(need in lost for need in index.needs(chunk)):
            return True
    return False


def _list_affected(
    record: SnapshotRecord,
    reader: ChunkReader,
    index: Index,
    lost: set[bytes],
    report: CheckReport,
) -> None:
    bad_pages: list[bytes] = []
    missing: list[bytes] = []

    def damaged(path: bytes, chunk: bytes, bad: RepositoryDamaged) -> None:
        if index.find(chunk) is None:
            missing.append(chunk)
        bad_pages.append(path)

    walk = References(reader, damaged)
    named: set[bytes] = set()
    for path, entry in walk.entries(record.root):
        if entry.kind != Kind.FILE:
            continue
        whole = path + b"/" + entry.name if path else entry.name
        before = len(bad_pages)
        ids = References(reader, damaged).file(path, entry)
        unknown = [
            ids[number * ID_SIZE : (number + 1) * ID_SIZE]
            for number, known in enumerate(index.known(ids))
            if not known
        ]
        missing += unknown
        if unknown or len(bad_pages) > before or _touches(ids, lost, index):
            del bad_pages[before:]
            named.add(whole)
    named.update(bad_pages)
    room = _SHOWN_FILES - len(report.affected)
    report.affected += [Affected(record.id, path) for path in sorted(named)[: max(room, 0)]]
    if missing:
        text = f"{len(missing)} chunks it refers to are in no pack"
        report.problems.append(Problem(snapshots.name_of(record.id), text, frozenset(missing)))
