import bz2
import gzip
import io
import lzma
import subprocess

import pytest
import zstandard

from lazarette.runtime.images.compression import Encoding, Unpacked, UnpackLimits
from lazarette.runtime.images.errors import BadArchive
from lazarette.runtime.images.push import gzip_members

PLAIN = b"".join(b"line %d\n" % n for n in range(200_000))
PACKED = {
    Encoding.NONE: PLAIN,
    Encoding.GZIP: gzip.compress(PLAIN),
    Encoding.ZSTD: zstandard.compress(PLAIN),
    Encoding.XZ: lzma.compress(PLAIN),
    Encoding.BZIP2: bz2.compress(PLAIN),
}


@pytest.mark.parametrize("encoding", list(Encoding))
def test_every_encoding_is_recognised_and_read(encoding: Encoding) -> None:
    with Unpacked(io.BytesIO(PACKED[encoding])) as stream:
        assert stream.encoding is encoding
        assert stream.read() == PLAIN
        assert stream.count == len(PLAIN)


@pytest.mark.parametrize("encoding", [e for e in Encoding if e is not Encoding.NONE])
def test_concatenated_members_are_one_stream(encoding: Encoding) -> None:
    with Unpacked(io.BytesIO(PACKED[encoding] * 2)) as stream:
        assert stream.read() == PLAIN * 2


@pytest.mark.parametrize("encoding", [Encoding.GZIP, Encoding.XZ, Encoding.BZIP2])
def test_a_stream_cut_short_is_refused(encoding: Encoding) -> None:
    with Unpacked(io.BytesIO(PACKED[encoding][:-9])) as stream, pytest.raises(BadArchive):
        stream.finish()


@pytest.mark.parametrize("encoding", [e for e in Encoding if e is not Encoding.NONE])
def test_a_flipped_bit_is_refused(encoding: Encoding) -> None:
    broken = bytearray(PACKED[encoding])
    broken[len(broken) // 2] ^= 4
    with Unpacked(io.BytesIO(bytes(broken))) as stream:
        try:
            assert stream.read() != PLAIN  # zstd without a checksum: the digest tells
        except BadArchive:
            pass


def test_a_bomb_is_refused_before_it_unfolds() -> None:
    bomb = gzip.compress(bytes(8 << 20))
    limits = UnpackLimits(ratio=100, ratio_from=1 << 20)
    with Unpacked(io.BytesIO(bomb), limits) as stream, pytest.raises(BadArchive, match="times"):
        stream.finish()
    assert stream.count < 3 << 20
    small = UnpackLimits(size=1 << 20)
    with Unpacked(io.BytesIO(bomb), small) as stream, pytest.raises(BadArchive, match="more than"):
        stream.finish()


def test_gzip_packed_in_parallel_is_one_plain_gzip_file() -> None:
    plain = PLAIN * 8
    packed = b"".join(gzip_members(io.BytesIO(plain)))
    assert gzip.decompress(packed) == plain
    assert packed == b"".join(gzip_members(io.BytesIO(plain)))
    checked = subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True)
    assert checked.stdout == plain
