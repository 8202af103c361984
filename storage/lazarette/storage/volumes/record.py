"""What a driver keeps beside a volume's data: one small JSON file a volume or snapshot."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.storage import files
from lazarette.storage.errors import DamagedData
from lazarette.storage.volumes.contract import SnapshotInfo, SnapshotKind


class VolumeRecord(msgspec.Struct, frozen=True):
    """Options a volume was made with, and its limit.

    Attributes:
        options: as given to ``create``.
        limit: size limit, bytes.
        held: bytes charged at the last snapshot; they stay charged when overwritten, so the
            limit in force is wider by them.
    """

    options: dict[str, str] = {}
    limit: int | None = None
    held: int = 0


class SnapshotRecord(msgspec.Struct, frozen=True):
    """What is known of a snapshot beyond its content."""

    created_ns: int
    pause_ns: int
    kind: SnapshotKind

    def info(self, snapshot: str) -> SnapshotInfo:
        """As the contract shows it."""
        return SnapshotInfo(snapshot, self.created_ns, self.pause_ns, self.kind)


def read_volume(path: Path) -> VolumeRecord:
    """Read a volume's record.

    Raises:
        DamagedData: it is not one.
    """
    try:
        return jsontext.decode(path.read_bytes(), type=VolumeRecord)
    except msgspec.MsgspecError as bad:
        raise DamagedData(f"record {path} is damaged: {bad}") from bad


def read_snapshot(path: Path) -> SnapshotRecord:
    """Read a snapshot's record.

    Raises:
        DamagedData: it is not one.
    """
    try:
        return jsontext.decode(path.read_bytes(), type=SnapshotRecord)
    except msgspec.MsgspecError as bad:
        raise DamagedData(f"record {path} is damaged: {bad}") from bad


def write(path: Path, record: VolumeRecord | SnapshotRecord) -> None:
    """Write a record so that a crash leaves the old one or the new one."""
    files.write_atomic(path, msgspec.json.encode(record))
