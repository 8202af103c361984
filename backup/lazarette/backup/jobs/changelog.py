"""Change records on their way from the daemon, which asks the driver, to the job.

A stream of msgpack values, one a record, so that neither side holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from lazarette.storage.changes import ByteRange, Change, ChangeKind

_LENGTH = 4
_BUFFER = 1 << 20


class _Record(msgspec.Struct, array_like=True):
    kind: str
    path: bytes
    origin: bytes | None
    ranges: list[tuple[int, int]] | None


def write_changes(path: Path, changes: Iterable[Change]) -> None:
    """Write records; each is its length (4 bytes, big-endian) and its msgpack form."""
    encode = msgspec.msgpack.Encoder().encode
    with open(path, "wb", buffering=_BUFFER) as out:
        for change in changes:
            ranges = change.ranges
            record = encode(
                _Record(
                    change.kind.value,
                    change.path,
                    change.origin,
                    None if ranges is None else [(one.offset, one.length) for one in ranges],
                )
            )
            out.write(len(record).to_bytes(_LENGTH, "big"))
            out.write(record)


def read_changes(path: Path) -> Iterator[Change]:
    """Read what :func:`write_changes` wrote, record by record."""
    decode = msgspec.msgpack.Decoder(_Record).decode
    with open(path, "rb", buffering=_BUFFER) as source:
        while head := source.read(_LENGTH):
            record = decode(source.read(int.from_bytes(head, "big")))
            yield Change(
                ChangeKind(record.kind),
                record.path,
                record.origin,
                None
                if record.ranges is None
                else tuple(ByteRange(offset, length) for offset, length in record.ranges),
            )
