"""Memory for the large buffers of backups and restores."""

from __future__ import annotations

import contextlib
import mmap


def buffer(size: int) -> memoryview:
    """Zeroed memory that begins at a page, in large pages where the kernel has them.

    A buffer of a few MiB that all bytes go through is found by the processor at once when it lies
    in few pages, and is faulted in with few faults.

    Args:
        size: bytes, above 0.
    """
    made = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without them
        made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)
