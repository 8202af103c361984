"""Holes in files that exist."""

from __future__ import annotations

import os

from lazarette.backup import scan


def clear(descriptor: int, offset: int, length: int) -> None:
    """Make a run of an existing file a hole, or zeros where there are no holes."""
    end = min(offset + length, os.fstat(descriptor).st_size)
    for start, stop in scan.data_ranges(descriptor, end):
        first = max(start, offset)
        if first >= stop:
            continue
        if not punch(descriptor, first, stop - first):
            for at in range(first, stop, 1 << 20):
                os.pwrite(descriptor, bytes(min(1 << 20, stop - at)), at)


def punch(descriptor: int, offset: int, length: int) -> bool:
    """Deallocate a run of a file; False when the filesystem does not do that."""
    import ctypes  # on use: few restores punch holes

    keep_size_punch = 0x01 | 0x02
    done = ctypes.CDLL(None).fallocate(
        descriptor, keep_size_punch, ctypes.c_longlong(offset), ctypes.c_longlong(length)
    )
    return int(done) == 0
