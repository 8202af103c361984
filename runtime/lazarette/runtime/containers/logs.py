"""What a container wrote: the log file that conmon keeps, read, followed and rotated.

A record is a line ``2026-11-25T10:04:30.123456789+00:00 stdout F text`` where ``F`` ends
a line and ``P`` is a part of one (longer than conmon's buffer, or without an end).  conmon
runs with UTC, so that times compare as text.  Rotation renames the file to ``.1`` (older
ones to ``.2`` and so on) and lets conmon open a new one; conmon makes the new file under
another name and renames it into place, so that a reader that sees another inode under the
name knows that its own file is complete.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lazarette.runtime.containers.watch import FolderWatch
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import InvalidArgument

_TIME = 29  # 2026-11-25T10:04:30.123456789
_TAIL_BLOCK = 65536
BATCH = 256
STDOUT, STDERR = 1, 2
OPTIONS = frozenset(
    {"max-size", "max-file", "compress", "labels", "labels-regex", "env", "env-regex", "tag"}
)
DRIVERS = ("json-file", "local", "none")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One write of the container.

    Attributes:
        time: ``2026-11-25T10:04:30.123456789``, UTC.
        stream: 1 for stdout, 2 for stderr.
        data: bytes, with their newline if they had one.
    """

    time: bytes
    stream: int
    data: bytes


@dataclass(frozen=True)
class LogQuery:
    """Which records are wanted.

    Attributes:
        stdout, stderr: streams.
        since_ns, until_ns: wall clock bounds; 0 means none.
        tail: how many records from the end; None means all.
        follow: go on until the container ends.
    """

    stdout: bool = True
    stderr: bool = True
    since_ns: int = 0
    until_ns: int = 0
    tail: int | None = None
    follow: bool = False


@dataclass(frozen=True)
class Rotation:
    """How a log is rotated: at this size in bytes (0: never), keeping this many files."""

    max_size: int = 0
    max_file: int = 1
    compress: bool = False


def parse_options(driver: str, options: dict[str, str]) -> Rotation:
    """Check the options of a logging driver and read its rotation.

    Raises:
        InvalidArgument: an unknown driver, option or value.
    """
    if driver not in DRIVERS:
        raise InvalidArgument(
            f'error looking up logging plugin {driver}: plugin "{driver}" not found',
            hint=f"known are {', '.join(DRIVERS)}",
        )
    if driver == "none":
        return Rotation()
    for key in options:
        if key not in OPTIONS:
            raise InvalidArgument(f"unknown log opt '{key}' for {driver} log driver")
    local = driver == "local"
    size = _size(options.get("max-size", "20m" if local else "-1"))
    try:
        files = int(options.get("max-file", "5" if local else "1"))
    except ValueError as bad:
        raise InvalidArgument(f"invalid max-file: {options['max-file']}") from bad
    if files < 1:
        raise InvalidArgument("max-file cannot be less than 1")
    compress = options.get("compress", "true" if local and files > 1 else "false")
    if compress not in ("true", "false", "1", "0"):
        raise InvalidArgument(f"invalid compress: {compress}")
    packed = compress in ("true", "1")
    if packed and (files == 1 or size == 0):
        raise InvalidArgument("compress cannot be true when max-file is less than 2 or no max-size")
    return Rotation(size, files, packed)


def _size(text: str) -> int:
    if text == "-1":
        return 0
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"invalid max-size: {text}")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))


class ContainerLog:
    """One container's log.

    Args:
        path: the current file.
        rotation: when and how it is rotated.
    """

    def __init__(self, path: Path, rotation: Rotation) -> None:
        self.path = path
        self.rotation = rotation

    def files(self) -> list[Path]:
        """All files, oldest first, the current one last if it is there."""
        found = [
            file
            for number in range(self.rotation.max_file - 1, 0, -1)
            for file in (self._old(number), self._old(number, ".gz"))
            if file.exists()
        ]
        return [*found, self.path] if self.path.exists() else found

    def _old(self, number: int, suffix: str = "") -> Path:
        return self.path.with_name(f"{self.path.name}.{number}{suffix}")

    def rotate_if_due(self, reopen: Callable[[], None]) -> bool:
        """Rotate when the file has reached its size.

        Args:
            reopen: makes the monitor open the log anew; not called when there is nothing
                to do.

        Returns:
            Whether it was rotated.
        """
        limit = self.rotation.max_size
        try:
            if not limit or self.path.stat().st_size < limit:
                return False
        except FileNotFoundError:
            reopen()  # renamed by a daemon that was killed before it could say so
            return False
        keep = self.rotation.max_file
        if keep == 1:
            self.path.unlink()
            reopen()
            return True
        for number in range(keep - 1, 0, -1):
            for suffix in ("", ".gz"):
                old = self._old(number, suffix)
                if old.exists():
                    if number == keep - 1:
                        old.unlink()
                    else:
                        old.replace(self._old(number + 1, suffix))
        first = self._old(1)
        self.path.replace(first)
        reopen()
        if self.rotation.compress and keep > 2:
            self._compress(self._old(2))
        return True

    @staticmethod
    def _compress(file: Path) -> None:
        """Pack an old file; the newest old one stays plain, a monitor may still write it."""
        if not file.exists():
            return
        packed = file.with_name(file.name + ".gz")
        fresh = file.with_name(file.name + ".gz.tmp")
        with open(file, "rb") as source, gzip.open(fresh, "wb", 6) as target:
            while block := source.read(1 << 20):
                target.write(block)
        fresh.replace(packed)
        file.unlink()

    def remove(self) -> None:
        """Delete all files."""
        for file in self.files():
            file.unlink(missing_ok=True)

    def read(self, query: LogQuery) -> Iterator[LogRecord]:
        """The records there are now, oldest first; ``follow`` is ignored."""
        wanted = _Wanted(query)
        for file in self._from_tail(query.tail, wanted):
            with file:
                for line in file:
                    record = parse_record(line)
                    if record is None or not wanted.accepts(record):
                        continue
                    yield record

    def _from_tail(self, tail: int | None, wanted: _Wanted) -> Iterator[BinaryIO]:
        files = self.files()
        if tail is None:
            for file in files:
                yield _open(file)
            return
        remaining, chosen = tail, []
        for file in reversed(files):
            if remaining <= 0:
                break
            handle = _open(file)
            remaining -= _seek_tail(handle, remaining, wanted)
            chosen.append(handle)
        yield from reversed(chosen)

    async def follow(
        self, query: LogQuery, watch: FolderWatch, ended: Callable[[], bool]
    ) -> AsyncIterator[list[LogRecord]]:
        """The records there are and then those to come, in batches.

        Ends when ``ended()`` is true and everything was read, or at ``until_ns``.  A
        rotation in between loses nothing.
        """
        wanted = _Wanted(query)
        with watch.following(self.path.parent) as changed:
            current, first = await asyncio.to_thread(self._backlog, query, wanted)
            try:
                for start in range(0, len(first), BATCH):
                    yield first[start : start + BATCH]
                partial = b""
                while True:
                    changed.clear()
                    over = ended()
                    data = current.read(1 << 20) if current is not None else b""
                    if data:
                        lines = (partial + data).split(b"\n")
                        partial = lines.pop()
                        batch = [
                            record
                            for line in lines
                            if (record := parse_record(line + b"\n")) and wanted.accepts(record)
                        ]
                        if batch:
                            yield batch
                        if wanted.passed_end:
                            return
                        continue
                    following = self._successor(current)
                    if following is not None:
                        rest = current.read() if current is not None else b""
                        if rest:
                            current, following = _chain(current, rest), None
                        else:
                            if current is not None:
                                current.close()
                            current, partial = following, b""
                        continue
                    if over:
                        return
                    try:
                        async with asyncio.timeout(1.0):
                            await changed.wait()
                    except TimeoutError:
                        continue
            finally:
                if current is not None:
                    current.close()

    def _backlog(self, query: LogQuery, wanted: _Wanted) -> tuple[BinaryIO | None, list[LogRecord]]:
        """What is there, and the current file open behind it."""
        handles = list(self._from_tail(query.tail, wanted))
        if query.tail is not None and not handles and self.path.exists():
            handle = _open(self.path)
            handle.seek(0, os.SEEK_END)
            handles = [handle]
        records: list[LogRecord] = []
        for position, handle in enumerate(handles):
            data = handle.read()
            complete = data.rfind(b"\n") + 1
            if position == len(handles) - 1 and complete < len(data):
                handle.seek(complete - len(data), os.SEEK_CUR)
            for line in data[:complete].splitlines(keepends=True):
                record = parse_record(line)
                if record is not None and wanted.accepts(record):
                    records.append(record)
            if position < len(handles) - 1:
                handle.close()
        return (handles[-1] if handles else None), records

    def _successor(self, current: BinaryIO | None) -> BinaryIO | None:
        """The file that follows the one being read, when that one is complete."""
        if current is None:
            return _open(self.path) if self.path.exists() else None
        own = os.fstat(current.fileno()).st_ino
        files = [file for file in self.files() if file.suffix != ".gz"]
        numbers = []
        for file in files:
            try:
                numbers.append(file.stat().st_ino)
            except FileNotFoundError:
                return None
        if not self.path.exists() or not numbers or numbers[-1] == own:
            return None
        position = numbers.index(own) + 1 if own in numbers else len(files) - 1
        try:
            return _open(files[position])
        except FileNotFoundError:
            return None


class _Wanted:
    """Decides which records a query takes."""

    def __init__(self, query: LogQuery) -> None:
        self._streams = {STDOUT: query.stdout, STDERR: query.stderr}
        self._since = rfc3339(query.since_ns)[:_TIME].encode() if query.since_ns > 0 else b""
        self._until = rfc3339(query.until_ns)[:_TIME].encode() if query.until_ns > 0 else b""
        self.passed_end = False

    def accepts(self, record: LogRecord) -> bool:
        if self._until and record.time > self._until:
            self.passed_end = True
            return False
        return self._streams[record.stream] and record.time >= self._since


def parse_record(line: bytes) -> LogRecord | None:
    """A line of the file, None when it is not one (torn by a full disk)."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[1] not in (b"stdout", b"stderr") or len(parts[0]) < _TIME:
        return None
    data = parts[3]
    if parts[2] != b"F":
        data = data.removesuffix(b"\n")
    return LogRecord(parts[0][:_TIME], STDOUT if parts[1] == b"stdout" else STDERR, data)


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    return open(file, "rb")


def _chain(current: BinaryIO | None, rest: bytes) -> BinaryIO | None:
    """Step back over what was read too early."""
    if current is not None:
        current.seek(-len(rest), os.SEEK_CUR)
    return current


def _seek_tail(handle: BinaryIO, count: int, wanted: _Wanted) -> int:
    """Seek to the last ``count`` wanted records of a file; returns how many there are."""
    if isinstance(handle, gzip.GzipFile):
        starts, position = [], 0
        for line in handle:
            record = parse_record(line)
            if record is not None and wanted.accepts(record):
                starts.append(position)
            position += len(line)
        chosen = starts[-count:]
        handle.seek(chosen[0] if chosen else position)
        return len(chosen)
    end = handle.seek(0, os.SEEK_END)
    found, tail, position = 0, b"", end
    while position > 0 and found < count:
        step = min(_TAIL_BLOCK, position)
        position -= step
        handle.seek(position)
        tail = handle.read(step) + tail
        lines = tail.split(b"\n")
        tail = lines[0] if position > 0 else b""
        offset = position + (len(lines[0]) + 1 if position > 0 else 0)
        starts = []
        for line in lines[1 if position > 0 else 0 :]:
            starts.append((offset, line))
            offset += len(line) + 1
        for start, line in reversed(starts):
            record = parse_record(line + b"\n") if line else None
            if record is not None and wanted.accepts(record):
                found += 1
                if found == count:
                    handle.seek(start)
                    return found
    handle.seek(0)
    return found
