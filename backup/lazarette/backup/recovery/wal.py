"""PostgreSQL's write-ahead log kept beside a volume's snapshots: recovery to any moment.

PostgreSQL hands each finished segment to its archive command.  What was handed over is stored,
a few segments at a time, as snapshots of ``wal:VOLUME``; their ``meta`` says what they hold
(:class:`Stored`).  A volume is brought to a moment by the newest snapshot before it, and the
segments stored after that snapshot; what was written before is in the snapshot itself.

A *chain* is what one database wrote without being set back.  It begins with a record that
``begins``; after a restore over the volume, and on another host, another one begins.  Segments
of two chains may have the same names and not the same content, so a snapshot is only followed
by its own chain.

The formats are those of ``access/xlog_internal.h``, ``access/xlogrecord.h`` and
``access/xact.h``, the same from PostgreSQL 12 to 18.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec

from lazarette.backup import beneath, restore
from lazarette.backup.jobs.model import Replay
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.fuse import jsontext
from lazarette.storage.errors import DamagedData, SnapshotNotFound, Unsupported

FOLDER = b"lazarette.wal"
"""In the cluster's folder: what waits to be stored, and what is to be replayed."""
READY, REPLAY = b"ready", b"replay"
OLDEST_VERSION = 12

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_HISTORY = re.compile(r"[0-9A-F]{8}\.history")
_PARTIAL = re.compile(r"[0-9A-F]{24}\.partial")
_BACKUP = re.compile(r"[0-9A-F]{24}\.[0-9A-F]{8}\.backup")
_DEPTH = 3
_2000_NS = 946_684_800 * 10**9
_LONG_HEADER, _SHORT_HEADER = 40, 24
_PAGE = struct.Struct("<HHIQI")
_SIZES = struct.Struct("<II")
_RECORD = struct.Struct("<IIQBB")
_RECORD_HEADER = 24
_TIME = struct.Struct("<q")
_XACT = 1
_OPERATION = 0x70
_ENDS = (0x00, 0x20, 0x30, 0x40)  # commit, abort, and both of prepared transactions
_DATA_SHORT, _DATA_LONG, _ORIGIN, _TOP = 255, 254, 253, 252


class NotRecoverable(SnapshotNotFound):
    """The log that leads to a moment is not there, or not whole."""

    number = 232


class NoCluster(SnapshotNotFound):
    """A folder holds no PostgreSQL cluster, or several."""

    number = 233


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """One stored file of the log.

    Attributes:
        name: as PostgreSQL calls it.
        digest: SHA-256 of its content.
        size: bytes.
        last_ns: when the last transaction in it ended; 0 when none did.
    """

    name: str
    digest: str
    size: int
    last_ns: int = 0


class Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a snapshot of a log holds; its ``meta``.

    Attributes:
        format: 1.
        begins: a chain begins here; it holds nothing else.
        segments: files, by name.
    """

    format: int = 1
    begins: bool = False
    segments: list[Segment] = []

    @classmethod
    def of(cls, record: SnapshotRecord) -> Stored:
        """What a snapshot holds.

        Raises:
            DamagedData: it is no log.
        """
        try:
            return jsontext.decode(record.meta, type=cls)
        except msgspec.MsgspecError as bad:
            raise DamagedData(f"snapshot {record.id[:12]} describes no log: {bad}") from bad

    def text(self) -> str:
        """JSON."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True)
class Plan:
    """How a moment is reached: from which snapshot, by what."""

    base: SnapshotRecord
    replay: Replay


def is_kept(name: str) -> bool:
    """Whether a file name is one that PostgreSQL gives to its archive command."""
    return any(kind.fullmatch(name) for kind in (_SEGMENT, _HISTORY, _BACKUP, _PARTIAL))


# ---- what is in a segment


def last_end_ns(content: bytes) -> int:
    """When the last transaction in a segment ended, wall clock; 0 when none did.

    Pages are looked at from the last, so that seldom more than one is read.

    Raises:
        DamagedData: it is no segment.
    """
    if len(content) < _LONG_HEADER:
        raise DamagedData("a log segment is too short")
    size, page_size = _SIZES.unpack_from(content, 32)
    if size != len(content) or page_size < 1024 or size % page_size:
        raise DamagedData("a log segment does not begin as one")
    own = _PAGE.unpack_from(content, 0)[3]
    for page in range(size - page_size, -1, -page_size):
        magic, _, _, address, left = _PAGE.unpack_from(content, page)
        if magic == 0 or address != own + page:
            continue  # never written, or of the segment this file was before
        header = _SHORT_HEADER if page else _LONG_HEADER
        begin = page + header + _aligned(left)
        found = max(_ends(content, begin, page + page_size, page_size), default=0)
        if found:
            return found
    return 0


def _ends(content: bytes, begin: int, end: int, page_size: int) -> Iterator[int]:
    """The times of the transactions that end in the records that begin in a page."""
    position = begin
    while position < end:
        head = _read(content, position, 64, page_size)
        if len(head) < _RECORD_HEADER:
            return
        length, _, _, info, manager = _RECORD.unpack_from(head)
        if length < _RECORD_HEADER:
            return
        if manager == _XACT and info & _OPERATION in _ENDS:
            data = _main_data(head)
            if data is not None and len(head) >= data + _TIME.size:
                yield _2000_NS + _TIME.unpack_from(head, data)[0] * 1000
        position += _aligned(length)


def _main_data(head: bytes) -> int | None:
    """Where a record without blocks has its data."""
    at = _RECORD_HEADER
    while at < len(head):
        kind = head[at]
        if kind == _DATA_SHORT:
            return at + 2
        if kind == _DATA_LONG:
            return at + 5
        if kind not in (_ORIGIN, _TOP):
            return None
        at += 3 if kind == _ORIGIN else 5
    return None


def _read(content: bytes, position: int, count: int, page_size: int) -> bytes:
    """Bytes of a record, without the page headers between."""
    page_end = (position // page_size + 1) * page_size
    got = content[position : min(position + count, page_end)]
    if len(got) < count:
        got += content[page_end + _SHORT_HEADER : page_end + _SHORT_HEADER + count - len(got)]
    return got


def _aligned(length: int) -> int:
    return -(-length // 8) * 8


# ---- which segments lead to a moment


def plan(
    bases: Sequence[SnapshotRecord],
    archives: Sequence[SnapshotRecord],
    moment_ns: int,
    known_whole_ns: int = 0,
) -> Plan:
    """How a volume is brought to a moment.

    Args:
        bases: the volume's snapshots, oldest first.
        archives: those of its log, oldest first.
        moment_ns: wall clock.
        known_whole_ns: when all that was written until then is known to be stored.

    Raises:
        NotRecoverable: no snapshot is as old, the log was not kept from it on, or a part of
            it is missing.
    """
    said = when(moment_ns)
    before = [one for one in bases if one.time_ns <= moment_ns]
    if not before:
        raise NotRecoverable(f"no backup is as old as {said}", hint="laz backup ls")
    base = before[-1]
    chain = _chain(base, archives, moment_ns)
    stored = [(one, Stored.of(one)) for one in chain]
    after: list[SnapshotRecord] = []
    seen: list[Segment] = []
    reached = False
    for record, holds in stored:
        seen += holds.segments
        if record.time_ns <= base.time_ns:
            continue
        after.append(record)
        reached = any(one.last_ns > moment_ns for one in holds.segments)
        if reached:
            break
    _require_whole(seen, base.volume)
    whole_ns = max(known_whole_ns, after[-1].time_ns if after else base.time_ns)
    warning = ""
    if not reached and whole_ns < moment_ns:
        warning = f"the log is stored until {when(whole_ns)} only, not until {said}"
    replay = Replay([one.id for one in after], moment_ns if reached else 0, warning)
    return Plan(base, replay)


def _chain(
    base: SnapshotRecord, archives: Sequence[SnapshotRecord], moment_ns: int
) -> list[SnapshotRecord]:
    """What was stored of the base's chain: the last before the base, and all after it."""
    begun: SnapshotRecord | None = None
    chain: list[SnapshotRecord] = []
    for record in archives:
        if not Stored.of(record).begins:
            if record.time_ns <= base.time_ns:
                chain = []
            chain.append(record)
        elif record.time_ns <= base.time_ns:
            begun, chain = record, []
        elif record.time_ns <= moment_ns:
            raise NotRecoverable(
                f"the log of {base.volume} begins anew at {when(record.time_ns)}, and the newest"
                f" backup before {when(moment_ns)} is of {when(base.time_ns)}",
                hint="name a moment before that, or after the next backup: laz backup ls",
            )
        else:
            break
    if begun is None:
        raise NotRecoverable(
            f"no log of {base.volume} is kept since its backup of {when(base.time_ns)}",
            hint="laz policy set VOLUME --wal keeps it from now on",
        )
    return chain


def _require_whole(segments: Sequence[Segment], volume: str) -> None:
    """No segment may be missing between two others, nor be there with two contents."""
    known: dict[str, Segment] = {}
    for one in segments:
        if known.setdefault(one.name, one).digest != one.digest:
            raise NotRecoverable(f"the log of {volume} has two segments called {one.name}")
    ordered = sorted(name for name in known if _SEGMENT.fullmatch(name))
    for earlier, later in pairwise(ordered):
        if later == _next(earlier, known[earlier].size):
            continue
        if later[:8] != earlier[:8] and f"{later[:8]}.history" in known:
            continue
        raise NotRecoverable(
            f"the log of {volume} has a gap: {_next(earlier, known[earlier].size)} is missing",
            hint="restore a backup after it: laz backup ls",
        )


def _next(name: str, size: int) -> str:
    """The segment after one, on the same timeline."""
    number = int(name[8:16], 16) * (2**32 // size) + int(name[16:], 16) + 1
    high, low = divmod(number, 2**32 // size)
    return f"{name[:8]}{high:08X}{low:08X}"


def spent(archives: Sequence[SnapshotRecord], oldest_ns: int) -> list[str]:
    """Ids of what no kept snapshot of the volume needs.

    The beginning of the chain and the last archive before the oldest snapshot stay: they show
    that nothing is missing between it and the next.

    Args:
        archives: of the volume's log, oldest first.
        oldest_ns: the moment of the oldest snapshot that is kept.
    """
    before = [one for one in archives if one.time_ns <= oldest_ns]
    begins = [one.id for one in before if Stored.of(one).begins]
    others = [one.id for one in before if one.id not in set(begins)]
    return begins[:-1] + others[:-1]


def when(ns: int) -> str:
    """A moment as PostgreSQL and people read it."""
    seconds, rest = divmod(ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest // 1000:06}+00"


# ---- a restored cluster


def find_cluster(root: int) -> bytes:
    """Where below an open folder the one PostgreSQL cluster is; no symlink is followed.

    Raises:
        NoCluster: there is none, or there are several.
    """
    found = list(_clusters(root, b"", _DEPTH))
    if len(found) != 1:
        raise NoCluster(
            f"{'several' if found else 'no'} PostgreSQL clusters are in the volume",
            hint="the log is kept of volumes that hold one",
        )
    return found[0]


def _clusters(folder: int, path: bytes, depth: int) -> Iterator[bytes]:
    version = beneath.status(folder, b"PG_VERSION")
    if version is not None and beneath.status(folder, b"global") is not None:
        yield path
        return
    if depth == 0:
        return
    with os.scandir(folder) as listing:
        names = [os.fsencode(one.name) for one in listing if one.is_dir(follow_symlinks=False)]
    for name in names:
        try:
            below = os.open(name, beneath.OPEN_DIRECTORY, dir_fd=folder)
        except OSError:
            continue  # it went, or became something else
        try:
            yield from _clusters(below, path + name + b"/", depth - 1)
        finally:
            os.close(below)


def lay_out(
    repository: Repository, replay: Replay, target: Path, cancelled: Callable[[], bool]
) -> None:
    """Make a restored cluster replay its log when it is started next.

    Repeatable.  Nobody else may write below ``target`` meanwhile.

    Raises:
        NoCluster: the volume holds none.
        Unsupported: its PostgreSQL is older than this way of recovery.
        DamagedData: segments have been lost.
    """
    root = os.open(target, beneath.OPEN_DIRECTORY)
    try:
        cluster = find_cluster(root)
        folder = beneath.open_directory(root, cluster)
    finally:
        os.close(root)
    try:
        owner = owner_of(folder)
        spool = open_spool(folder, owner)
        try:
            beneath.remove(spool, READY)  # of the past, and stored
            beneath.remove(spool, REPLAY)
        finally:
            os.close(spool)
        place = target / os.fsdecode(cluster + FOLDER + b"/" + REPLAY)
        options = restore.RestoreOptions(mode=restore.Mode.MERGE, root_metadata=False)
        place.mkdir(mode=0o700)
        for archive in replay.archives:
            record = repository.snapshot(archive)
            done = restore.run(repository, record, place, options, cancelled=cancelled)
            if done.damaged:
                lost = ", ".join(os.fsdecode(one.path) for one in done.damaged)
                raise DamagedData(
                    f"segments of the log are lost: {lost}", hint="restore an earlier moment"
                )
        for path in (place, *place.iterdir()):
            os.chown(path, *owner, follow_symlinks=False)
        _ask_for_recovery(folder, replay.target_ns, owner)
        os.sync()
    finally:
        os.close(folder)


def open_spool(cluster: int, owner: tuple[int, int]) -> int:
    """Open the folder of a cluster's log, made for its owner if it is not there.

    Raises:
        OSError: there is something else of that name.
    """
    if beneath.status(cluster, FOLDER) is None:
        os.mkdir(FOLDER, 0o700, dir_fd=cluster)
        os.chown(FOLDER, *owner, dir_fd=cluster)
    return os.open(FOLDER, beneath.OPEN_DIRECTORY, dir_fd=cluster)


def owner_of(folder: int) -> tuple[int, int]:
    """Who owns the cluster, if its version is one that recovers this way."""
    descriptor = os.open(b"PG_VERSION", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        version = os.read(descriptor, 16).strip()
        seen = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not version.isdigit() or int(version) < OLDEST_VERSION:
        raise Unsupported(
            f"PostgreSQL {version.decode(errors='replace')} cannot be recovered to a moment:"
            f" version {OLDEST_VERSION} can"
        )
    return seen.st_uid, seen.st_gid


def _ask_for_recovery(folder: int, target_ns: int, owner: tuple[int, int]) -> None:
    """Settings after all others, so that they count; then the file that makes them count."""
    place = os.fsdecode(FOLDER + b"/" + REPLAY)
    settings = {
        "restore_command": f'cp "{place}/%f" "%p"',
        "recovery_end_command": f'rm -rf "{place}"',
        "recovery_target": "",
        "recovery_target_name": "",
        "recovery_target_lsn": "",
        "recovery_target_xid": "",
        "recovery_target_time": when(target_ns) if target_ns else "",
        "recovery_target_action": "promote",
        "recovery_target_timeline": "latest",
    }
    lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
    text = content_of(folder, b"postgresql.auto.conf")
    if text and not text.endswith(b"\n"):
        text += b"\n"
    write_into(folder, b"postgresql.auto.conf", text + lines.encode(), owner)
    write_into(folder, b"recovery.signal", b"", owner)


def content_of(folder: int, name: bytes) -> bytes:
    """A regular file in an open folder; empty when there is none."""
    found = beneath.status(folder, name)
    if found is None or not stat.S_ISREG(found.st_mode):
        return b""
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as source:
        return source.read()


def write_into(
    folder: int, name: bytes, content: bytes, owner: tuple[int, int], mode: int = 0o600
) -> None:
    """Replace a file in an open folder that somebody else may write to; durable."""
    beside = name + b".lazarette"
    beneath.remove(folder, beside)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(beside, flags, mode, dir_fd=folder), "wb") as made:
        made.write(content)
        os.fchown(made.fileno(), *owner)
        os.fsync(made.fileno())
    os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
