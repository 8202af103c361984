"""Which pages the blocks of databases are made of, remembered on this host only.

For a block stored before, a map has the hash of each page and the chunk that holds it.  When
the block changes, the pages that did not are taken from there, and only the others are sent
(:mod:`lazarette.backup.repository.patches`), without reading the old block again.  Losing
the maps costs bytes sent, nothing else.

The hashes are those that a paged chunk's id is made of, so a map proves itself against the id.
Of blocks from repositories of version 1, whose ids are made of the whole block, they are XXH3-128
with a secret seed from the repository's key: whoever can write pages into a database does not
know it and so cannot make two pages that pass for one another.
"""

from __future__ import annotations

import sqlite3
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from blake3 import blake3

from lazarette.backup.repository import patches
from lazarette.backup.repository.format import PAGE

_HASH = 16
_LARGEST = 2 << 30
"""Size of the database, bytes, beyond which it is made anew."""
_PLACE = struct.Struct("<16sB")
MOST_NEW = 0.5
"""Share of new pages beyond which a block is stored whole."""


@dataclass(frozen=True, slots=True)
class PageMap:
    """Pages of one block.

    Attributes:
        hashes: 16 bytes a page, joined.
        places: for each page the chunk that holds it and its number there.
    """

    hashes: bytes
    places: tuple[tuple[bytes, int], ...]

    @classmethod
    def plain(cls, chunk: bytes, hashes: bytes) -> PageMap:
        """Of a block that is stored whole."""
        return cls(hashes, tuple((chunk, page) for page in range(len(hashes) // _HASH)))

    def pack(self, chunk: bytes) -> bytes:
        """Stored form; a block stored whole needs no places."""
        if all(place == (chunk, number) for number, place in enumerate(self.places)):
            return self.hashes
        return self.hashes + b"".join(_PLACE.pack(*place) for place in self.places)

    @classmethod
    def unpack(cls, chunk: bytes, data: bytes, pages: int) -> PageMap | None:
        """Undo :meth:`pack`; None when it is of another number of pages."""
        hashes = data[: pages * _HASH]
        if len(data) == pages * _HASH:
            return cls.plain(chunk, hashes)
        if len(data) != pages * (_HASH + _PLACE.size):
            return None
        return cls(hashes, tuple(_PLACE.iter_unpack(data[pages * _HASH :])))


class PageMaps:
    """The maps of a repository's blocks, in a small database; safe in several threads.

    Args:
        file: where they are kept; made anew if it is damaged.
        chunk_id_key: of the repository.
    """

    def __init__(self, file: Path, chunk_id_key: bytes) -> None:
        seed = blake3(b"lazarette/pages", key=chunk_id_key).digest(length=8)
        self._seed = int.from_bytes(seed, "little")
        self._lock = threading.Lock()
        self._fresh: dict[bytes, bytes] = {}
        if file.exists() and file.stat().st_size > _LARGEST:
            file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._db = self._open(file)
        except sqlite3.DatabaseError:
            file.unlink(missing_ok=True)
            self._db = self._open(file)

    @staticmethod
    def _open(file: Path) -> sqlite3.Connection:
        db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=1.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")
            db.execute(
                "CREATE TABLE IF NOT EXISTS maps (chunk BLOB PRIMARY KEY, map BLOB) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def hashes(self, block: memoryview) -> bytes:
        """Hashes of a block's pages."""
        digest, seed = xxhash.xxh3_128_digest, self._seed
        return b"".join([digest(block[at : at + PAGE], seed) for at in range(0, len(block), PAGE)])

    def find(self, chunk: bytes, pages: int) -> PageMap | None:
        """The map of a block stored before."""
        data = self._fresh.get(chunk)
        if data is None:
            with self._lock:
                try:
                    row = self._db.execute(
                        "SELECT map FROM maps WHERE chunk = ?", (chunk,)
                    ).fetchone()
                except sqlite3.DatabaseError:
                    return None
            if row is None:
                return None
            data = row[0]
        return PageMap.unpack(chunk, data, pages)

    def note(self, chunk: bytes, pages: PageMap) -> None:
        """Remember the map of a block, once :meth:`flush` is called."""
        self._fresh[chunk] = pages.pack(chunk)

    def flush(self, replaced: Sequence[bytes] = ()) -> None:
        """Write what was noted, and drop maps of blocks that are no file's any more."""
        fresh, self._fresh = self._fresh, {}
        rows = sorted(fresh.items())  # in the order of the table, which is several times faster
        with self._lock:
            try:
                self._db.execute("BEGIN")
                self._db.executemany("DELETE FROM maps WHERE chunk = ?", [(c,) for c in replaced])
                self._db.executemany("INSERT OR REPLACE INTO maps VALUES (?, ?)", rows)
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()


@dataclass(frozen=True, slots=True)
class Delta:
    """A block as a patch.

    Attributes:
        payload: what is stored.
        needs: chunks it takes pages from.
        pages: its map.
        holder: id of a chunk of the new pages, which is stored beside it.
        new: the new pages, joined.
    """

    payload: bytes
    needs: tuple[bytes, ...]
    pages: PageMap
    holder: bytes
    new: bytes


def delta(
    page_of: Callable[[int], memoryview],
    hashes: bytes,
    base: PageMap,
    whole: Callable[[bytes], bool],
    name_of: Callable[[bytes], bytes],
) -> Delta | None:
    """A block as a patch against an earlier one; None when too much of it is new.

    The new pages become a chunk of their own.  Held in the patch they could not be named by
    the next one: another host may store the same block as another patch at the same time.

    Args:
        page_of: gives a page of the block, by its number.
        hashes: of all its pages.
        base: the earlier block's map.
        whole: whether a chunk is stored whole; pages are taken from such chunks only.
        name_of: gives the id of a chunk.
    """
    usable = set(filter(whole, {source for source, _ in base.places}))
    places: list[tuple[bytes, int]] = []
    new: list[memoryview] = []
    most = len(hashes) // _HASH * MOST_NEW
    for number, at in enumerate(range(0, len(hashes), _HASH)):
        same = hashes[at : at + _HASH] == base.hashes[at : at + _HASH]
        if same and base.places[number][0] in usable:
            places.append(base.places[number])
        elif len(new) >= most:
            return None
        else:
            places.append((b"", len(new)))
            new.append(page_of(number))
    if len(new) == len(places):
        return None
    data = b"".join(new)
    holder = name_of(data)
    found = tuple((source or holder, page) for source, page in places)
    payload, needs = patches.encode(PAGE, found, ())
    return Delta(payload, needs, PageMap(hashes, found), holder, data)
