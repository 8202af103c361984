"""Ranges of packs from a far store, several blocks with one request."""

from __future__ import annotations

import threading
from collections import OrderedDict

from lazarette.backup.repository.format import pack_name
from lazarette.backup.stores.contract import BlobStore, Buffer, DamagedBlob, ShortBlob

MOST = 4 << 20
"""Most bytes read at once beyond what was asked for."""
_GROWTH = 4
_WINDOWS = 4
_TAILS = 64


class PackReads:
    """Stored blocks by place; safe in several threads.

    A block that begins where the one read before it in its pack ended makes the request four
    times as long as what was read in a row so far, up to :data:`MOST`: a restore then asks
    once for dozens of blocks, and whoever looks at one file still reads one.
    At most four times :data:`MOST` is held in memory.

    Args:
        store: where packs are.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._distant = store.capabilities.distant
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._tails: OrderedDict[tuple[bytes, int], int] = OrderedDict()

    def get(self, pack: bytes, offset: int, length: int, size: int) -> Buffer:
        """Bytes of a pack.

        Args:
            pack: its id.
            offset: first byte.
            length: how many.
            size: of the whole pack.

        Raises:
            BlobNotFound, ShortBlob, DamagedBlob, StoreUnavailable: see :class:`BlobStore`.
        """
        name = pack_name(pack)
        if not self._distant:
            return self._store.get(name, offset, length)
        end = offset + length
        with self._lock:
            row = self._tails.pop((pack, offset), 0)
            self._tails[pack, end] = row + length
            while len(self._tails) > _TAILS:
                self._tails.popitem(last=False)
            for (other, start), data in self._windows.items():
                if other == pack and start <= offset and end <= start + len(data):
                    self._windows.move_to_end((other, start))
                    return memoryview(data)[offset - start : end - start]
        longer = min(max(length, min(_GROWTH * row, MOST)), size - offset)
        if longer <= length:
            return self._store.get(name, offset, length)
        try:
            data = self._store.get(name, offset, longer)
        except (ShortBlob, DamagedBlob):
            return self._store.get(name, offset, length)
        with self._lock:
            self._windows[pack, offset] = data
            while len(self._windows) > _WINDOWS:
                self._windows.popitem(last=False)
        return memoryview(data)[:length]
