"""Patches: a chunk stored as pages taken from other chunks plus the pages that are new.

A database block of which one page changed is stored as that page and references to where
the others are stored already.  References name a chunk that really holds the bytes (a
plain chunk, or the new pages of another patch), never one that refers further, so that
reading a patch never takes more than one step.

Payload, little-endian::

    page size u32, plain length u32, sources u16, pages u16
    source id(16) × sources
    (source number u16, page number u16) × pages     number 0xffff: in this payload
    new pages

The plain length is ``pages`` × ``page size``.  The page number counts the pages of a plain
source, or the new pages of a source that is itself a patch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import msgspec

from lazarette.backup.repository.format import ID_SIZE, RepositoryDamaged
from lazarette.backup.stores.contract import Buffer

_HEAD = struct.Struct("<IIHH")
_REFERENCE = struct.Struct("<HH")
HERE = 0xFFFF


class Patch(msgspec.Struct, frozen=True):
    """A parsed payload.

    Attributes:
        page_size: bytes of a page.
        sources: ids of the chunks pages come from.
        references: for each page, number of its source (or ``HERE``) and page in it.
        new_pages: the pages stored here, joined.
    """

    page_size: int
    sources: tuple[bytes, ...]
    references: tuple[tuple[int, int], ...]
    new_pages: Buffer

    @property
    def length(self) -> int:
        """Length of the chunk, bytes."""
        return self.page_size * len(self.references)


def encode(
    page_size: int, places: Sequence[tuple[bytes | None, int]], new_pages: Sequence[Buffer]
) -> tuple[bytes, tuple[bytes, ...]]:
    """Make a payload.

    Args:
        page_size: bytes of a page.
        places: for each page, the chunk that stores it (None: this one) and the page there.
        new_pages: the pages this payload stores, in order.

    Returns:
        The payload, and the ids it needs.
    """
    numbers: dict[bytes, int] = {}
    rows: list[int] = []
    for source, page in places:
        rows.append(HERE if source is None else numbers.setdefault(source, len(numbers)))
        rows.append(page)
    head = _HEAD.pack(page_size, page_size * len(places), len(numbers), len(places))
    references = struct.pack(f"<{len(rows)}H", *rows)
    return b"".join((head, *numbers, references, *new_pages)), tuple(numbers)


def decode(payload: Buffer) -> Patch:
    """Parse a payload.

    Raises:
        RepositoryDamaged: it is malformed.
    """
    view = memoryview(payload)
    if len(view) < _HEAD.size:
        raise RepositoryDamaged("a patch is shorter than its head")
    page_size, length, sources, pages = _HEAD.unpack_from(view)
    rows_at = _HEAD.size + sources * ID_SIZE
    data_at = rows_at + pages * _REFERENCE.size
    if data_at > len(view) or page_size == 0 or page_size * pages != length:
        raise RepositoryDamaged("a patch contradicts itself")
    ids = tuple(bytes(view[at : at + ID_SIZE]) for at in range(_HEAD.size, rows_at, ID_SIZE))
    rows = tuple(_REFERENCE.iter_unpack(view[rows_at:data_at]))
    new_pages = view[data_at:]
    here = len(new_pages) // page_size
    if len(new_pages) % page_size or any(
        (page >= here if source == HERE else source >= sources) for source, page in rows
    ):
        raise RepositoryDamaged("a patch refers to what it does not have")
    return Patch(page_size, ids, rows, new_pages)


def assemble(patch: Patch, pages_of: Callable[[bytes], Buffer]) -> bytes:
    """Put a chunk together.

    Args:
        patch: the parsed payload.
        pages_of: gives the bytes a source holds itself: all of a plain chunk, the new pages
            of a patch.

    Raises:
        RepositoryDamaged: a source is too short.
    """
    size = patch.page_size
    held = [memoryview(pages_of(source)) for source in patch.sources]
    here = memoryview(patch.new_pages)
    parts = []
    for source, page in patch.references:
        part = (here if source == HERE else held[source])[page * size : (page + 1) * size]
        if len(part) != size:
            raise RepositoryDamaged("a patch refers to a page its source does not have")
        parts.append(part)
    return b"".join(parts)
