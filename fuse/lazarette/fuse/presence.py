"""Which blocks of a partly fetched file are here, safe across SIGKILL and power cuts.

One map file per incomplete file: a header, the *safe* bitmap and the *live* bitmap.

* A block's live bit is written (to the page cache) after its data was (to the page cache),
  and before anyone trusts it.  Both survive the death of every process, and neither
  survives the death of the machine: the live bitmap counts only under the boot it was
  written in.
* The safe bitmap is written after the data was synced, and then synced itself.  It is what
  counts after a reboot.

A bit is never taken back; a block without one is fetched again.  A file of which nothing is
here has no map yet: it can be looked at while the disk is full.
"""

from __future__ import annotations

import contextlib
import errno
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
        name: of the map file in it; made with the first block, emptied if it is of another
            content.
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
        self._content, self._block_size, self._boot = content, block_size, boot
        self._live, self._safe = bytearray(self._bytes), bytearray(self._bytes)
        try:
            self._fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            self._fd = -1
            return
        try:
            self._load()
        except BaseException:
            os.close(self._fd)
            raise

    def _load(self) -> None:
        padded = self._content.ljust(255, b"\0")
        wanted = (_MAGIC, self._blocks, self._block_size, padded, len(self._content))
        head = os.pread(self._fd, _HEADER.size, 0)
        if len(head) == _HEADER.size:
            magic, blocks, size, written_in, owner, length = _HEADER.unpack(head)
            if (magic, blocks, size, owner, length) == wanted:
                safe = bytearray(os.pread(self._fd, self._bytes, _SPACE))
                live = bytearray(os.pread(self._fd, self._bytes, _SPACE + self._bytes))
                if len(safe) == len(live) == self._bytes:
                    if written_in == self._boot:
                        self._live, self._safe = live, safe
                    else:
                        self._live, self._safe = bytearray(safe), safe
                        self._write()
                    return
        os.ftruncate(self._fd, 0)
        self._write()

    def _make(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._name, flags, 0o600, dir_fd=self._folder)
        try:
            self._write()
        except OSError:
            self.remove()
            raise

    def _write(self) -> None:
        """Write the whole map, the header last: it makes the rest count."""
        _write_all(self._fd, self._safe, _SPACE)
        _write_all(self._fd, self._live, _SPACE + self._bytes)
        content = self._content
        padded = content.ljust(255, b"\0")
        head = (_MAGIC, self._blocks, self._block_size, self._boot, padded, len(content))
        _write_all(self._fd, _HEADER.pack(*head), 0)

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
        """Blocks are here: their data has been written before.

        Raises:
            OSError: that cannot be written down, as ENOSPC; they do not count as here then.
        """
        last = min(first + count, self._blocks)
        new = [block for block in range(first, last) if block not in self]
        if not new:
            return
        if self._fd < 0:
            self._make()
        start, end = new[0] >> 3, (new[-1] >> 3) + 1
        bits = self._live[start:end]
        for block in new:
            bits[(block >> 3) - start] |= 1 << (block & 7)
        _write_all(self._fd, bits, _SPACE + self._bytes + start)
        self._live[start:end] = bits

    def snapshot(self) -> bytes:
        """The live bits, to hand to :meth:`settle` once their data is synced."""
        return bytes(self._live)

    def settle(self, bits: bytes) -> None:
        """The data of these blocks is on disk: make that known after a power cut too."""
        if self._fd < 0:
            return  # whole already, and the map gone
        merged = int.from_bytes(bits, "little") | int.from_bytes(self._safe, "little")
        safe = merged.to_bytes(self._bytes, "little")
        _write_all(self._fd, safe, _SPACE)
        os.fdatasync(self._fd)
        self._safe[:] = safe

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


def _write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.ENOSPC, "no room for a presence map")
