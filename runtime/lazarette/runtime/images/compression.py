"""Reading and writing compressed layers as streams, with a limit on what they unpack to.

The encoding is recognised by its first bytes, never by a name or media type.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, BinaryIO, cast

import zstandard

from lazarette.runtime.images.errors import BadArchive

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 256 * 1024
HEAD = 8


class Encoding(Enum):
    """How a layer's tar is compressed."""

    NONE = "tar"
    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"
    BZIP2 = "bzip2"


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """What one compressed stream may unpack to.

    Attributes:
        size: bytes at most.
        ratio: times its compressed size at most, once ``ratio_from`` bytes are out.
            gzip reaches 1,032 on zeros; a layer of files stays below 50.
        ratio_from: bytes unpacked before the ratio is looked at.
    """

    size: int = 256 << 30
    ratio: int = 400
    ratio_from: int = 1 << 30


_MAGIC = (
    (b"\x1f\x8b", Encoding.GZIP),
    (b"\x28\xb5\x2f\xfd", Encoding.ZSTD),
    (b"\xfd7zXZ\x00", Encoding.XZ),
    (b"BZh", Encoding.BZIP2),
)


def sniff(head: bytes) -> Encoding:
    """The encoding of a stream that begins with ``head`` (at least :data:`HEAD` bytes)."""
    for magic, encoding in _MAGIC:
        if head.startswith(magic):
            return encoding
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a zstd skippable frame
        return Encoding.ZSTD
    return Encoding.NONE


class _Zlib:
    """zlib with the interface of lzma and bz2: input left over is kept inside."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


_DECODERS: dict[Encoding, Callable[[], object]] = {
    Encoding.GZIP: _Zlib,
    Encoding.XZ: lzma.LZMADecompressor,
    Encoding.BZIP2: bz2.BZ2Decompressor,
}


class _Members(io.RawIOBase):
    """The plain bytes of a stream of one or more gzip, xz or bzip2 members."""

    def __init__(self, source: BinaryIO, make: Callable[[], object]) -> None:
        super().__init__()
        self._source = source
        self._make = make
        self._decoder = cast(lzma.LZMADecompressor, make())
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer, /) -> int:
        view = memoryview(target)
        while not self._ended:
            data = self._source.read(CHUNK) if self._decoder.needs_input else b""
            if not data and self._decoder.needs_input:
                raise BadArchive("compressed stream ends too early")
            out = self._decoder.decompress(data, len(view))
            if self._decoder.eof:
                self._next_member()
            if out:
                view[: len(out)] = out
                return len(out)
        return 0

    def _next_member(self) -> None:
        left = self._decoder.unused_data or self._source.read(CHUNK)
        left = left.lstrip(b"\0")  # padding after the last member
        if not left:
            self._ended = not self._source.read(1)
            if not self._ended:
                raise BadArchive("garbage after the end of a compressed stream")
            return
        self._decoder = cast(lzma.LZMADecompressor, self._make())
        self._source = cast(BinaryIO, Chained(left, self._source))


class Chained(io.RawIOBase):
    """Some bytes, then a stream."""

    def __init__(self, first: bytes, rest: BinaryIO) -> None:
        super().__init__()
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; an empty result is the end."""
        if self._first:
            if size < 0:
                size = len(self._first)
            out, self._first = self._first[:size], self._first[size:]
            return out
        return self._rest.read(size)


class _Counting(io.RawIOBase):
    """A source that counts what is read from it."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__()
        self._source = source
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self.count += len(data)
        return data

    def readinto(self, target: WriteableBuffer, /) -> int:
        data = self.read(len(memoryview(target)))
        memoryview(target)[: len(data)] = data
        return len(data)


class Unpacked(io.RawIOBase):
    """The plain bytes of a stream in any encoding; raises on a bomb or a broken stream.

    Args:
        source: the stream, at its beginning.
        limits: what it may unpack to.

    Attributes:
        encoding: what it was recognised as.
        count: plain bytes given out so far.
    """

    def __init__(self, source: BinaryIO, limits: UnpackLimits | None = None) -> None:
        super().__init__()
        self._limits = limits or UnpackLimits()
        head = read_up_to(source, HEAD)
        self.encoding = sniff(head)
        self.count = 0
        self._packed = _Counting(cast(BinaryIO, Chained(head, source)))
        packed = cast(BinaryIO, self._packed)
        if self.encoding is Encoding.NONE:
            self._plain = packed
        elif self.encoding is Encoding.ZSTD:
            self._plain = cast(
                BinaryIO,
                zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
                    packed, read_size=CHUNK, read_across_frames=True, closefd=False
                ),
            )
        else:
            self._plain = cast(BinaryIO, _Members(packed, _DECODERS[self.encoding]))

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: WriteableBuffer, /) -> int:
        """Fill ``target`` as far as one step goes.

        Raises:
            BadArchive: broken, or larger than the limits allow.
        """
        data = self.read(len(memoryview(target)))
        memoryview(target)[: len(data)] = data
        return len(data)

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` plain bytes.

        Raises:
            BadArchive: broken, or larger than the limits allow.
        """
        if size < 0:
            return self.readall()
        try:
            data = self._plain.read(size)
        except (zlib.error, lzma.LZMAError, OSError, zstandard.ZstdError) as bad:
            raise BadArchive(f"compressed stream is broken: {bad}") from bad
        self.count += len(data)
        if self.count > self._limits.size:
            raise BadArchive(f"stream unpacks to more than {self._limits.size} bytes")
        if (
            self.encoding is not Encoding.NONE
            and self.count > self._limits.ratio_from
            and self.count > self._limits.ratio * self._packed.count
        ):
            raise BadArchive(
                f"stream unpacks to more than {self._limits.ratio} times its size",
                hint="if it is meant to, load it uncompressed",
            )
        return data

    def finish(self) -> None:
        """Read what is left (the padding after a tar), so that all bytes were seen."""
        while self.read(CHUNK):
            pass


def read_up_to(source: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or fewer at the end of the stream only."""
    parts: list[bytes] = []
    while size > 0 and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
