"""Which snapshots and which log lead to a moment, and what a real PostgreSQL's segments say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lazarette.backup.recovery import wal
from lazarette.backup.recovery.wal import NotRecoverable, Segment, Stored
from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.storage.errors import DamagedData

_SIZE = 16 << 20
_S = 10**9


def _record(number: int, seconds: int, volume: str, meta: bytes = b"") -> SnapshotRecord:
    return SnapshotRecord(
        id=f"{number:032x}",
        time_ns=seconds * _S,
        started_ns=seconds * _S,
        host="h",
        volume=volume,
        root=Entry(b"", Kind.DIRECTORY, 0o755, 0, 0, 0, 0, 1),
        meta=meta,
    )


def base(seconds: int) -> SnapshotRecord:
    return _record(seconds, seconds, "db")


def begins(seconds: int) -> SnapshotRecord:
    return _record(1000 + seconds, seconds, "wal:db", Stored(begins=True).text().encode())


def name(number: int, timeline: int = 1) -> str:
    return f"{timeline:08X}{number // 256:08X}{number % 256:08X}"


def stored(seconds: int, *segments: Segment) -> SnapshotRecord:
    return _record(
        2000 + seconds, seconds, "wal:db", Stored(segments=list(segments)).text().encode()
    )


def segment(number: int, last: int, timeline: int = 1, digest: str = "") -> Segment:
    called = name(number, timeline)
    return Segment(called, digest or called, _SIZE, last * _S)


ARCHIVES = [
    begins(5),
    stored(12, segment(254, 11)),
    stored(22, segment(255, 21)),
    stored(32, segment(256, 29), segment(257, 31)),
    stored(42, segment(258, 41)),
]
BASES = [base(10), base(20), base(40)]


@pytest.mark.parametrize(
    ("moment", "from_", "archives", "reached"),
    [
        (20, 20, [2022], True),
        (25, 20, [2022, 2032], True),
        (30, 20, [2022, 2032], True),
        (31, 20, [2022, 2032, 2042], True),
        (40, 40, [2042], True),
        (41, 40, [2042], False),
    ],
)
def test_the_newest_snapshot_before_and_no_more_log_than_needed(
    moment: int, from_: int, archives: list[int], reached: bool
) -> None:
    found = wal.plan(BASES, ARCHIVES, moment * _S)
    assert found.base.time_ns == from_ * _S
    assert [int(one, 16) for one in found.replay.archives] == archives
    assert found.replay.target_ns == (moment * _S if reached else 0)
    assert not found.replay.warning


def test_beyond_what_is_stored_is_said() -> None:
    assert "stored until 1970-01-01 00:00:42" in wal.plan(BASES, ARCHIVES, 50 * _S).replay.warning
    assert not wal.plan(BASES, ARCHIVES, 50 * _S, known_whole_ns=51 * _S).replay.warning


@pytest.mark.parametrize("missing", [2, 3])
def test_a_gap_is_found_before_anything_is_restored(missing: int) -> None:
    kept = [one for number, one in enumerate(ARCHIVES) if number != missing]
    with pytest.raises(NotRecoverable, match="gap"):
        wal.plan(BASES[:2], kept, 31 * _S)
    if missing == 3:  # what is before the gap can be reached
        wal.plan(BASES[:2], kept, 20 * _S)


def test_a_chain_is_followed_only_from_its_own_snapshots() -> None:
    other = [*ARCHIVES, begins(50), stored(62, segment(256, 61, digest="other"))]
    bases = [*BASES, base(60)]
    assert wal.plan(bases, other, 41 * _S).replay.archives == [f"{2042:032x}"]
    with pytest.raises(NotRecoverable, match="begins anew"):
        wal.plan(bases, other, 55 * _S)
    assert wal.plan(bases, other, 60 * _S).replay.target_ns == 60 * _S
    with pytest.raises(NotRecoverable, match="no log"):
        wal.plan([base(1)], ARCHIVES, 3 * _S)
    with pytest.raises(NotRecoverable, match="as old"):
        wal.plan(BASES, ARCHIVES, 9 * _S)


def test_two_contents_under_one_name_are_refused() -> None:
    twice = [*ARCHIVES, stored(43, segment(258, 42, digest="other"))]
    with pytest.raises(NotRecoverable, match="two segments"):
        wal.plan(BASES, twice, 45 * _S)
    same = [*ARCHIVES, stored(43, segment(258, 41))]
    assert wal.plan(BASES, same, 41 * _S).replay.archives[-1] == f"{2043:032x}"


def test_a_timeline_needs_its_history() -> None:
    history = Segment("00000002.history", "h", 40)
    turned = [*ARCHIVES, stored(52, history, segment(258, 51, timeline=2))]
    assert wal.plan(BASES, turned, 45 * _S).replay.target_ns == 45 * _S
    without = [*ARCHIVES, stored(52, segment(258, 51, timeline=2))]
    with pytest.raises(NotRecoverable, match="gap"):
        wal.plan(BASES, without, 45 * _S)


def test_what_no_kept_snapshot_needs_is_forgotten() -> None:
    assert wal.spent(ARCHIVES, 20 * _S) == []
    assert wal.spent(ARCHIVES, 40 * _S) == [f"{2012:032x}", f"{2022:032x}"]
    left = [one for one in ARCHIVES if one.id not in wal.spent(ARCHIVES, 40 * _S)]
    wal.plan(BASES[2:], left, 41 * _S)


@pytest.mark.parametrize(
    ("called", "kept"),
    [
        ("000000010000000000000001", True),
        ("00000002.history", True),
        ("000000010000000000000001.partial", True),
        ("000000010000000000000001.00000028.backup", True),
        (".000000010000000000000001", False),
        ("../000000010000000000000001", False),
        ("said", False),
    ],
)
def test_names_of_files_of_the_log(called: str, kept: bool) -> None:
    assert wal.is_kept(called) is kept


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(_SIZE)])
def test_what_is_no_segment_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedData):
        wal.last_end_ns(content)


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_waldump"))
    return found[-1].parent if found else None


def test_a_real_segment_says_when_its_last_transaction_ended(tmp_path: Path) -> None:
    programs = _programs()
    if programs is None or os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("no PostgreSQL programs here, or not root")
    data, sockets = tmp_path / "data", tmp_path / "run"
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    for folder in (data, sockets):
        folder.mkdir()
        shutil.chown(folder, "postgres", "postgres")

    def act(*command: str, text: str = "") -> str:
        done = subprocess.run(
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *command],
            input=text, capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    act(str(programs / "initdb"), "-D", str(data), "-A", "trust", "-N")
    options = f"-k {sockets} -c listen_addresses='' -c fsync=off -c wal_keep_size=160MB"
    log = str(sockets / "log")
    act(str(programs / "pg_ctl"), "-D", str(data), "-o", options, "-l", log, "-w", "start")
    try:
        psql = ("psql", "-XqAt", "-h", str(sockets), "-d", "postgres", "-v", "ON_ERROR_STOP=1")
        segments = []
        for statement in (
            "CREATE TABLE t (v text); INSERT INTO t VALUES ('a')",
            "INSERT INTO t SELECT repeat('x', 3000) FROM generate_series(1, 900)",
            "BEGIN; INSERT INTO t VALUES ('b'); ROLLBACK",
        ):
            act(*psql, text=statement)
            act(*psql, text="CHECKPOINT")
            said = act(*psql, text="SELECT pg_walfile_name(pg_current_wal_lsn())")
            act(*psql, text="SELECT pg_switch_wal()")
            segments.append(said.strip())
    finally:
        act(str(programs / "pg_ctl"), "-D", str(data), "-m", "fast", "-w", "stop")
    assert len(set(segments)) == 3
    for one in segments:
        path = data / "pg_wal" / one
        shown = act(str(programs / "pg_waldump"), "--rmgr=Transaction", str(path))
        times = re.findall(r"(?:COMMIT|ABORT) (\d{4}-\S+ \S+) (\w+)", shown)
        assert times and {zone for _, zone in times} == {"UTC"}, shown
        last = max(datetime.fromisoformat(said).replace(tzinfo=UTC) for said, _ in times)
        wanted = int(last.replace(microsecond=0).timestamp()) * _S + last.microsecond * 1000
        assert wal.last_end_ns(path.read_bytes()) == wanted
