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

import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash
from blake3 import blake3

from lazarette.backup.repository import patches
from lazarette.backup.repository.format import PAGE

if TYPE_CHECKING:
    from lazarette.backup.pagemapfile import PageMapFile

_HASH = 16
_PLACE = struct.Struct("<16sB")
MOST_NEW = 0.5
"""Share of new pages beyond which a block is stored whole."""


class PageMap(msgspec.Struct, frozen=True):
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
        return self.hashes + b"".join([_PLACE.pack(*place) for place in self.places])

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
    """The maps of a repository's blocks on this host; safe in several threads.

    Args:
        file: where they are kept, see :class:`lazarette.backup.pagemapfile.PageMapFile`.
        chunk_id_key: of the repository.
    """

    def __init__(self, file: Path, chunk_id_key: bytes) -> None:
        seed = blake3(b"lazarette/pages", key=chunk_id_key).digest(length=8)
        self._seed = int.from_bytes(seed, "little")
        self._lock = threading.Lock()
        self._fresh: dict[bytes, bytes] = {}
        self._path = file
        self._file: PageMapFile | None = None

    def hashes(self, block: memoryview) -> bytes:
        """Hashes of a block's pages."""
        digest, seed = xxhash.xxh3_128_digest, self._seed
        return b"".join([digest(block[at : at + PAGE], seed) for at in range(0, len(block), PAGE)])

    def find_all(self, blocks: Sequence[tuple[bytes, int]]) -> dict[bytes, PageMap]:
        """The maps of blocks stored before, of which so many pages each are known.

        Args:
            blocks: their chunks and numbers of pages; at most some thousands.
        """
        stored = self._opened().find_all([chunk for chunk, _ in blocks])
        found = {}
        for chunk, pages in blocks:
            data = self._fresh.get(chunk) or stored.get(chunk)
            known = None if data is None else PageMap.unpack(chunk, data, pages)
            if known is not None:
                found[chunk] = known
        return found

    def note(self, chunk: bytes, pages: PageMap) -> None:
        """Remember the map of a block, once :meth:`flush` is called."""
        self._fresh[chunk] = pages.pack(chunk)

    def note_plain(self, chunk: bytes, hashes: bytes) -> None:
        """:meth:`note` for a block that is stored whole."""
        self._fresh[chunk] = hashes

    def flush(self, replaced: Sequence[bytes] = ()) -> None:
        """Write what was noted, and drop maps of blocks that are no file's any more."""
        fresh, self._fresh = self._fresh, {}
        if fresh or replaced:
            self._opened().write(fresh, replaced)

    def _opened(self) -> PageMapFile:
        """The file: a run that reads no database does not open it."""
        from lazarette.backup.pagemapfile import PageMapFile

        with self._lock:
            if self._file is None:
                self._file = PageMapFile(self._path)
            return self._file

    def finish(self) -> None:
        """Write what was noted and close the file."""
        self.flush()
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Delta(msgspec.Struct, frozen=True):
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


def changed_pages(hashes: bytes, base: PageMap, whole: Callable[[bytes], bool]) -> list[int] | None:
    """Which pages of a block a patch against an earlier one has to bring; None for too many.

    Args:
        hashes: of all the block's pages.
        base: the earlier block's map.
        whole: whether a chunk is stored whole; pages are taken from such chunks only.
    """
    places, known = base.places, base.hashes
    usable = set(filter(whole, {source for source, _ in places}))
    changed = [
        number
        for number, at in enumerate(range(0, len(hashes), _HASH))
        if hashes[at : at + _HASH] != known[at : at + _HASH] or places[number][0] not in usable
    ]
    return None if len(changed) > len(places) * MOST_NEW else changed


def delta(hashes: bytes, base: PageMap, changed: Sequence[int], holder: bytes, new: bytes) -> Delta:
    """A block as a patch against an earlier one.

    The new pages become a chunk of their own.  Held in the patch they could not be named by
    the next one: another host may store the same block as another patch at the same time.

    Args:
        hashes: of all its pages.
        base: the earlier block's map.
        changed: from :func:`changed_pages`.
        holder: id of the chunk ``new``.
        new: the changed pages, joined.
    """
    places = list(base.places)
    for position, number in enumerate(changed):
        places[number] = holder, position
    payload, needs = patches.encode(PAGE, places, ())
    return Delta(payload, needs, PageMap(hashes, tuple(places)), holder, new)
