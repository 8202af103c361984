"""Bodies of uploads, sent from where they lie."""

from __future__ import annotations

import io
import os
from typing import IO, cast

from lazarette.backup.stores.contract import Buffer

_STEP = 1 << 20
_WORTH_IT = 1 << 20


class Body(io.RawIOBase):
    """A buffer as the file that botocore wants of what is not ``bytes``.

    A read gives a view of up to a MiB, however little is asked for: the HTTP client asks for
    16 KiB at a time, and sends what it gets.

    Args:
        data: must not change while it is sent.
    """

    def __init__(self, data: Buffer) -> None:
        super().__init__()
        self._view = memoryview(data).cast("B")
        self._at = 0

    def __len__(self) -> int:
        return len(self._view)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: a request that is redirected is sent again."""
        return True

    def read(self, size: int = -1) -> memoryview:
        """The next bytes; none at the end."""
        end = len(self._view) if size < 0 else min(self._at + _STEP, len(self._view))
        start, self._at = self._at, end
        return self._view[start:end]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go elsewhere; where that is."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        self._at = min(max(origin + offset, 0), len(self._view))
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at


def body_of(data: Buffer) -> bytes | IO[bytes]:
    """What boto3 is given: the bytes, or a file of them where a copy would take much memory."""
    if isinstance(data, bytes):
        return data
    return cast("IO[bytes]", Body(data)) if len(data) >= _WORTH_IT else bytes(data)
