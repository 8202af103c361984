"""Which snapshot a person means by VOLUME@POINT."""

from datetime import UTC, datetime

import pytest

from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.runtime.protection.recovery import newest_points
from lazarette.runtime.protection.restores import choose_point
from lazarette.storage.errors import InvalidArgument, SnapshotNotFound


def _record(number: int, moment: str, volume: str = "pgdata") -> SnapshotRecord:
    at = int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()) * 10**9
    return SnapshotRecord(
        id=f"{number:032x}"[::-1],
        time_ns=at,
        started_ns=at,
        host="h",
        volume=volume,
        root=Entry(b"", Kind.DIRECTORY, 0o755, 0, 0, 0, 0, 1),
    )


RECORDS = [
    _record(0xA1, "2026-11-25 10:00:00"),
    _record(0xA2, "2026-11-25 10:04:30"),
    _record(0xB3, "2026-11-25 10:05:00"),
]


@pytest.mark.parametrize(
    ("point", "chosen"),
    [
        ("latest", 2),
        ("", 2),
        ("2026-11-25 10:04:30", 1),
        ("2026-11-25 10:04:59", 1),
        ("2026-11-25T11:04:31+01:00", 1),
        ("1a00", 0),
        ("3b00", 2),
    ],
)
def test_point(point: str, chosen: int) -> None:
    assert choose_point(RECORDS, point) is RECORDS[chosen]


@pytest.mark.parametrize("point", ["2026-11-25 09:59:59", "ffff", "yesterday"])
def test_no_such_point(point: str) -> None:
    with pytest.raises(SnapshotNotFound):
        choose_point(RECORDS, point)


def test_nothing_to_choose_from() -> None:
    with pytest.raises(SnapshotNotFound):
        choose_point([], "latest")


def test_ambiguous_id() -> None:
    same = [_record(0x0A1B2, "2026-01-01"), _record(0x1A1B2, "2026-01-02")]
    with pytest.raises(InvalidArgument, match="2 snapshots"):
        choose_point(same, "2b1a")


def test_newest_of_each_volume_and_no_folders_or_images() -> None:
    records = [
        *RECORDS,
        _record(1, "2026-11-24", "other"),
        _record(2, "2026-11-26", "/srv/data"),
        _record(3, "2026-11-26", "image:sha256:00"),
    ]
    assert [(one.volume, one.id) for one in newest_points(records)] == [
        ("other", records[3].id),
        ("pgdata", RECORDS[2].id),
    ]
    assert [one.volume for one in newest_points(records, ["other"])] == ["other"]
