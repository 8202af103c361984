"""Which blocks of a partly fetched file are here, safe across SIGKILL and power cuts.

One map file per incomplete file: a header, the *safe* bitmap and the *live* bitmap.

* A block's live bit is written (to the page cache) after its data was (to the page cache),
  and before anyone trusts it.  Both survive the death of every process, and neither
  survives the death of the machine: the live bitmap counts only under the boot it was
  written in.
* The safe bitmap is written after the data was synced, and then synced itself.  It is what
  counts after a reboot.

A bit is never taken back; a block without one is fetched again.
"""

from __future__ import annotations

import contextlib
import os
import struct

_HEADER = struct.Struct("=8sII16s255sB")
_SPACE = 512
_MAGIC = b"LAZMAP01"


def boot_id() -> bytes:
    """Sixteen bytes that are new with every boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return bytes.fromhex(stream.read().strip().replace("-", ""))


class PresenceMap:
    """The map of one file; not thread-safe: the owner locks.

    Args:
        folder: descriptor of the folder of maps.
        name: of the map file in it; made if missing, emptied if it is of another content.
        content: the source's id of the content.
        blocks: how many blocks the content has.
        block_size: bytes of one.
        boot: see :func:`boot_id`.
    """

    def __init__(
        self, folder: int, name: bytes, content: bytes, blocks: int, block_size: int, boot: bytes
    ) -> None:
        self._folder = folder
        self._name = name
        self._blocks = blocks
        self._bytes = (blocks + 7) // 8
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(name, flags, 0o600, dir_fd=folder)
        try:
            self._live, self._safe = self._load(content, block_size, boot)
        except BaseException:
            os.close(self._fd)
            raise

    def _load(self, content: bytes, block_size: int, boot: bytes) -> tuple[bytearray, bytearray]:
        empty = bytearray(self._bytes)
        padded = content.ljust(255, b"\0")
        wanted = (_MAGIC, self._blocks, block_size, padded, len(content))
        head = os.pread(self._fd, _HEADER.size, 0)
        if len(head) == _HEADER.size:
            magic, blocks, size, written_in, owner, length = _HEADER.unpack(head)
            if (magic, blocks, size, owner, length) == wanted:
                safe = bytearray(os.pread(self._fd, self._bytes, _SPACE))
                live = bytearray(os.pread(self._fd, self._bytes, _SPACE + self._bytes))
                if len(safe) == len(live) == self._bytes:
                    if written_in == boot:
                        return live, safe
                    self._write(content, block_size, boot, bytes(safe), bytes(safe))
                    return bytearray(safe), safe
        os.ftruncate(self._fd, 0)
        self._write(content, block_size, boot, bytes(empty), bytes(empty))
        return bytearray(empty), empty

    def _write(
        self, content: bytes, block_size: int, boot: bytes, live: bytes, safe: bytes
    ) -> None:
        """Write the whole map, the header last: it makes the rest count."""
        os.pwrite(self._fd, safe, _SPACE)
        os.pwrite(self._fd, live, _SPACE + self._bytes)
        padded = content.ljust(255, b"\0")
        head = _HEADER.pack(_MAGIC, self._blocks, block_size, boot, padded, len(content))
        os.pwrite(self._fd, head, 0)

    def __contains__(self, block: int) -> bool:
        return block >= self._blocks or bool(self._live[block >> 3] & 1 << (block & 7))

    def missing(self, blocks: int) -> int:
        """How many of the first ``blocks`` blocks are not here."""
        mask = (1 << blocks) - 1
        return blocks - (int.from_bytes(self._live, "little") & mask).bit_count()

    @property
    def unsafe(self) -> bool:
        """Whether blocks are here that a power cut would make unknown."""
        return self._live != self._safe

    def add(self, first: int, count: int) -> None:
        """Blocks are here: their data has been written before."""
        last = min(first + count, self._blocks)
        new = [block for block in range(first, last) if block not in self]
        if not new:
            return
        for block in new:
            self._live[block >> 3] |= 1 << (block & 7)
        start, end = new[0] >> 3, (new[-1] >> 3) + 1
        os.pwrite(self._fd, self._live[start:end], _SPACE + self._bytes + start)

    def snapshot(self) -> bytes:
        """The live bits, to hand to :meth:`settle` once their data is synced."""
        return bytes(self._live)

    def settle(self, bits: bytes) -> None:
        """The data of these blocks is on disk: make that known after a power cut too."""
        if self._fd < 0:
            return  # whole already, and the map gone
        merged = int.from_bytes(bits, "little") | int.from_bytes(self._safe, "little")
        self._safe[:] = merged.to_bytes(self._bytes, "little")
        os.pwrite(self._fd, self._safe, _SPACE)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the map file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close and delete it."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
