"""What one backup carries along: workers, counters, warnings, hard links, progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import msgspec
import xxhash

from lazarette.backup.archive_content import SMALL, Batch, Segment, SmallFile, Task, Workers
from lazarette.backup.archive_files import FileJob
from lazarette.backup.archive_frame import Frame
from lazarette.backup.archive_pages import Pages
from lazarette.backup.native import Inode
from lazarette.backup.pagemaps import PageMaps
from lazarette.backup.repository.entries import Entry, Extra, Kind, encode_page, paginate
from lazarette.backup.repository.format import ID_SIZE, RepositoryDamaged
from lazarette.backup.repository.ingest import Ingest
from lazarette.backup.repository.packs import TREE
from lazarette.backup.repository.references import References
from lazarette.backup.repository.repository import Repository
from lazarette.backup.tree import TreeReader
from lazarette.storage.changes import ByteRange
from lazarette.storage.errors import Cancelled

_BATCH_FILES = 128
_BATCH_BYTES = 4 << 20
_REPORT_EVERY_NS = 100_000_000
_SECOND = 1_000_000_000
_RENUMBERED = 1 << 63


class Notice(msgspec.Struct, frozen=True):
    """One thing that was not saved as it should.

    Attributes:
        path: relative to the volume's root.
        text: what happened.
    """

    path: bytes
    text: str


class Progress(msgspec.Struct, frozen=True):
    """How far a backup is.

    Attributes:
        files: files gone through.
        bytes_total: their bytes.
        bytes_read: bytes read from the source.
        path: where it is.
    """

    files: int
    bytes_total: int
    bytes_read: int
    path: bytes


class _Links(msgspec.Struct):
    """Names of one inode: the first is read, the others get what it got."""

    leader: Entry
    done: bool = False
    lost: bool = False
    followers: list[tuple[Entry, bytes, Frame]] = []


class Run:
    """State of one backup; used by the walking thread only.

    Args:
        repo: where to.
        ingest: takes the chunks.
        threads: worker threads.
        trusted_before_ns: an inode changed at or after this time is read again even if it
            looks the same.
        lost: chunks to be stored again: files that hold one are read again.
        progress: called now and then.
        cancelled: asked now and then.

    Attributes:
        settle: set by the walk; called when one of a directory's files is done.
    """

    settle: Callable[[Frame], None]

    def __init__(
        self,
        repo: Repository,
        ingest: Ingest,
        threads: int,
        trusted_before_ns: int,
        lost: set[bytes],
        progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._repo = repo
        self._trusted_before_ns = trusted_before_ns
        self._lost = lost
        self._progress = progress
        self._cancelled = cancelled
        self.ingest = ingest
        self._trees = self.ingest.lane(TREE)
        self._maps: PageMaps | None = None
        self._remembering: threading.Thread | None = None
        if repo.cache_dir is not None:
            self._maps = PageMaps(repo.cache_dir / "pages.sqlite", repo.crypt.chunk_id_key)
        self._workers = Workers(self.ingest, repo.crypt, threads, self._finished, self._maps, lost)
        self._threads = threads
        self._batch = Batch()
        self._owners: dict[int, Frame] = {}
        self._jobs: dict[int, FileJob] = {}
        self._links: dict[tuple[int, int], _Links] = {}
        self._salt = b""
        self._reported_ns = 0
        self._path = b""
        self.warnings: list[Notice] = []
        self.files = 0
        self.entries = 0
        self.bytes_total = 0

    def paced(self, pace: Callable[[int], None]) -> None:
        """Read no faster than ``pace`` allows: it is told the bytes, and waits."""
        self._workers.paced(pace)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source so far."""
        return self._workers.bytes_read

    def warn(self, path: bytes, text: str) -> None:
        """Note something that was not saved as it should."""
        self.warnings.append(Notice(path, text))

    def warn_mount(self, path: bytes) -> None:
        """Note that another filesystem is mounted there and was not entered."""
        self.warn(path, "another filesystem is mounted here and was left out")

    def readable_base(
        self,
        path: bytes,
        read: Callable[[TreeReader], dict[bytes, Entry]],
        reader: TreeReader,
    ) -> dict[bytes, Entry]:
        """Entries of the earlier snapshot; none when they are damaged, which is noted."""
        try:
            return read(reader)
        except RepositoryDamaged as bad:
            self.warn(path, f"the earlier snapshot is damaged here, all is read again: {bad}")
            return {}

    def unchanged(self, inode: Inode, base: Entry) -> bool:
        """Whether a file is as it was, by inode, size and times (see the race rule)."""
        ctime = inode[7] * _SECOND + inode[8]
        return (
            base.ctime_ns == ctime
            and base.inode == inode[9]
            and base.size == inode[4]
            and base.kind == Kind.FILE
            and inode[1] & 0o170000 == 0o100000
            and base.mtime == inode[5] * _SECOND + inode[6]
            and ctime < self._trusted_before_ns
            and not (base.extra is not None and base.extra.unstable)
            and not (self._lost and self._holds_lost(base))
        )

    def _holds_lost(self, base: Entry) -> bool:
        try:
            ids = References(self._repo.reader).file(b"", base)
        except RepositoryDamaged:
            return True
        index = self.ingest.index
        return any(
            chunk in self._lost or not self._lost.isdisjoint(index.needs(chunk))
            for chunk in (ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE))
        )

    def count(self, entry: Entry, sign: int = 1) -> None:
        """Take an entry into the totals, or out of them."""
        self.entries += sign
        if entry.kind == Kind.FILE:
            self.files += sign
            self.bytes_total += sign * entry.size

    def read_file(
        self,
        owner: Frame,
        entry: Entry,
        path: bytes,
        base: Entry | None,
        ranges: tuple[ByteRange, ...] | None,
    ) -> None:
        """Have a regular file read; the owner gets its entry when it is done.

        Args:
            owner: the directory it is in.
            entry: what is known of it.
            path: where it is, for messages.
            base: the same file in the earlier snapshot, if it was there.
            ranges: where it may differ from ``base``; None for anywhere.
        """
        owner.outstanding += 1
        self._path = path
        if entry.extra is not None and entry.extra.links > 1 and self._follow(owner, entry, path):
            return
        if entry.size <= SMALL:
            self._batch.files.append(SmallFile(owner.descriptor, entry, path))
            self._owners[id(entry)] = owner
            self._batch.bytes += entry.size
            if len(self._batch.files) >= _BATCH_FILES or self._batch.bytes >= _BATCH_BYTES:
                self._flush()
            return
        job = FileJob(owner.descriptor, entry, path, base, ranges)
        self._owners[id(entry)] = owner
        self._jobs[id(job)] = job
        self._begin(job)

    def _follow(self, owner: Frame, entry: Entry, path: bytes) -> bool:
        assert entry.extra is not None
        key = (entry.extra.filesystem, entry.inode)
        links = self._links.get(key)
        if links is None:
            self._links[key] = _Links(entry)
            return False
        if links.done:
            self._take_over(links, entry, path, owner)
        else:
            links.followers.append((entry, path, owner))
        return True

    def _take_over(self, links: _Links, entry: Entry, path: bytes, owner: Frame) -> None:
        if links.lost:
            self.warn(path, "cannot be read (another name of a file that could not)")
            self._let_go(owner)
            return
        leader = links.leader
        for attribute in Entry.__struct_fields__:
            if attribute != "name":
                setattr(entry, attribute, getattr(leader, attribute))
        self._deliver(owner, entry)

    def _begin(self, job: FileJob) -> None:
        try:
            segments = job.begin(self._repo.reader, self._maps is not None, self._repo.paged)
        except OSError as failed:
            job.fault = failed
            self._close_job(job)
            return
        if not segments:
            self._end_job(job)
            return
        for segment in segments:
            self._workers.submit(segment)
            self._workers.collect(8 * self._threads)

    def _flush(self) -> None:
        if self._batch.files:
            batch, self._batch = self._batch, Batch()
            self._workers.submit(batch)
        self._workers.collect(4 * self._threads)

    def drain(self) -> None:
        """Wait until nothing is outstanding."""
        self._flush()
        self._workers.collect(0)

    def _finished(self, task: Task) -> None:
        if isinstance(task, Segment | Pages):
            job = task.owner
            assert isinstance(job, FileJob)
            job.waiting -= 1
            if job.waiting == 0:
                self._end_job(job)
            return
        assert isinstance(task, Batch)
        for file in task.files:
            self._file_done(file.entry, file.path, file.fault, file.unstable)

    def _end_job(self, job: FileJob) -> None:
        if not job.settled():
            job.ranges = None
            self._begin(job)
            return
        if job.fault is None:
            try:
                job.complete(self._repo.crypt, self.ingest, self._trees)
            except OSError as failed:
                job.fault = failed
        self._close_job(job)

    def _close_job(self, job: FileJob) -> None:
        job.close()
        del self._jobs[id(job)]
        self._file_done(job.entry, job.path, job.fault, job.unstable)

    def _file_done(self, entry: Entry, path: bytes, fault: OSError | None, unstable: bool) -> None:
        owner = self._owners.pop(id(entry))
        if fault is not None:
            self.warn(path, f"cannot be read: {fault.strerror}")
        elif unstable:
            entry.extra = entry.extra or Extra()
            entry.extra.unstable = True
            self.warn(path, "changed while it was read")
        links = None
        if entry.extra is not None and entry.extra.links > 1:
            links = self._links.get((entry.extra.filesystem, entry.inode))
        if links is not None and links.leader is entry:
            links.done, links.lost = True, fault is not None
            for follower, other, waiting in links.followers:
                self._take_over(links, follower, other, waiting)
            links.followers = []
        if fault is not None:
            self._let_go(owner)
        else:
            self._deliver(owner, entry)

    def renumber_links(self) -> None:
        """Give inodes with several names numbers that the earlier snapshot's cannot have.

        Entries taken over from it have the numbers they had then.
        """
        self._salt = os.urandom(8)

    def keep(self, owner: Frame, entry: Entry) -> None:
        """Give a directory an entry that was saved anew."""
        self._number(entry)
        owner.children.append(entry)
        self.count(entry)

    def _number(self, entry: Entry) -> None:
        extra = entry.extra
        if self._salt and extra is not None and extra.links > 1 and not entry.inode & _RENUMBERED:
            seed = b"%b %d %d" % (self._salt, extra.filesystem, entry.inode)
            entry.inode = xxhash.xxh3_64_intdigest(seed) | _RENUMBERED

    def _deliver(self, owner: Frame, entry: Entry) -> None:
        self.keep(owner, entry)
        self._let_go(owner)

    def _let_go(self, owner: Frame) -> None:
        owner.outstanding -= 1
        self.settle(owner)

    def store_directory(self, entry: Entry, children: list[Entry]) -> None:
        """Store a directory's pages and note them in its entry."""
        children.sort(key=lambda child: child.name)
        ids = []
        if children:
            for page in paginate(children):
                data = encode_page(page)
                chunk = self._repo.crypt.chunk_id(data)
                ids.append(chunk)
                if self.ingest.claim(chunk):
                    self._trees.add(chunk, data)
        entry.content = b"".join(ids)

    def breathe(self) -> None:
        """Report progress and see whether to stop.

        Raises:
            Cancelled: the caller wants no more.
        """
        now = self._repo.clock.monotonic_ns()
        if now - self._reported_ns < _REPORT_EVERY_NS:
            return
        self._reported_ns = now
        self._workers.collect(8 * self._threads)
        if self._cancelled():
            raise Cancelled("backup was cancelled")
        self._progress(Progress(self.files, self.bytes_total, self.bytes_read, self._path))

    def stop(self) -> None:
        """End the worker threads, close what is open, and begin to write what is remembered."""
        self._workers.stop()
        for job in self._jobs.values():
            job.close()
        self._jobs = {}
        if self._maps is not None and self._remembering is None:
            self._remembering = threading.Thread(target=self._maps.finish, name="remember")
            self._remembering.start()

    def close(self) -> None:
        """Wait until what is remembered is written; called last, after :meth:`stop`."""
        if self._remembering is not None:
            self._remembering.join()


def default_threads() -> int:
    """Worker threads for this machine: as many as CPUs, at least 2, at most 8."""
    return max(2, min(8, len(os.sched_getaffinity(0))))
