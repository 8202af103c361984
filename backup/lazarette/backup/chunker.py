"""Cutting files into chunks.

Ordinary files are cut where their content says so: a rolling (gear) hash over the last 32
bytes, whose table comes from the repository's key, so that the sizes of chunks tell an
outsider nothing about known files.  Cuts depend on the content near them only: an insertion
moves them along.  Between ``MIN_SIZE`` and ``AVERAGE_SIZE`` a stricter mask is asked for
than after it (normalised chunking, as FastCDC does), which narrows the spread of sizes.

Files changed in place (databases, disk images) are cut into blocks on a fixed grid.

The C module cuts; :mod:`lazarette.backup.chunker_plain` is the reference and gives the same cuts.
"""

from __future__ import annotations

from blake3 import blake3

from lazarette.backup import native
from lazarette.backup.stores.contract import Buffer

MIN_SIZE = 128 << 10
AVERAGE_SIZE = 512 << 10
MAX_SIZE = 2 << 20

_STRICT_BITS = 21
_LOOSE_BITS = 17
STRICT_MASK = ((1 << _STRICT_BITS) - 1) << (32 - _STRICT_BITS)
LOOSE_MASK = ((1 << _LOOSE_BITS) - 1) << (32 - _LOOSE_BITS)


def gear_table(chunk_id_key: bytes) -> bytes:
    """256 random 32-bit numbers from the repository's key, little-endian."""
    return blake3(b"lazarette/gear", key=chunk_id_key).digest(length=1024)


class Chunker:
    """Content-defined cuts with one repository's table."""

    def __init__(self, chunk_id_key: bytes) -> None:
        self.table = gear_table(chunk_id_key)

    def cuts(self, data: Buffer, final: bool) -> list[int]:
        """Lengths of the chunks at the start of ``data``.

        Args:
            data: content from the last cut on.
            final: nothing follows; the rest becomes a chunk too.

        Returns:
            Lengths, in order; what is left over (if not ``final``) is to be given again with
            more behind it.
        """
        if native.cuts is not None:
            return native.cuts(
                data, self.table, MIN_SIZE, AVERAGE_SIZE, MAX_SIZE, STRICT_MASK, LOOSE_MASK, final
            )
        return self.cuts_plain(data, final)

    def cuts_plain(self, data: Buffer, final: bool) -> list[int]:
        """:meth:`cuts` without the C module."""
        # On use: numpy takes as long to import as a small backup.
        from lazarette.backup import chunker_plain

        return chunker_plain.cuts(self.table, data, final)
