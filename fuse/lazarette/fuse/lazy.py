"""A writable tree whose content arrives on demand, until it is an ordinary folder.

The local tree (``store/tree``) is made folder by folder as it is looked at, its files as long
as in the source but without data; what is read is fetched block by block, what is written
stays here.  Once everything has come, ``store/tree`` is an ordinary folder, needs no server,
and carries no trace.

Semantics
    Z1. A read returns the source's bytes or what was written here later, or fails with EIO
        once the source has not answered for ``deadline`` seconds; never anything else.
    Z2. What is here is served whether the source answers or not, and whether it answered
        when this server began; a full disk does not keep anyone from reading.
    Z3. SIGKILL at any instant loses nothing that write(2) returned for; a power cut loses
        nothing that fsync(2) returned for.
    Z4. Files that are whole are read and written through (see
        :mod:`lazarette.fuse.files`) from their next open on.
    Z5. ``complete`` is reported only when everything is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lazarette.fuse import layers, protocol, replies, syscalls
from lazarette.fuse.content import Content, Contents
from lazarette.fuse.copyup import CopyUp
from lazarette.fuse.dirty import join, path_of
from lazarette.fuse.expand import Expander
from lazarette.fuse.files import Files, kill_set_id
from lazarette.fuse.filesystem import Filesystem, Later, NeedsWorker, Reply
from lazarette.fuse.filler import Filler, Progress
from lazarette.fuse.firstreads import FirstReads
from lazarette.fuse.journal import State
from lazarette.fuse.latesource import FACTS, LateSource
from lazarette.fuse.native import Status
from lazarette.fuse.nodes import Dir, File, Handle, Listing, Node
from lazarette.fuse.protocol import SetattrValid
from lazarette.fuse.readahead import ReadAhead
from lazarette.fuse.requests import (
    CopyIn,
    FallocateIn,
    FsyncIn,
    LseekIn,
    ReadIn,
    Request,
    SetattrIn,
    WriteIn,
)
from lazarette.fuse.source import Source
from lazarette.fuse.tree import Found, Tree
from lazarette.fuse.union import UnionFilesystem, UnionOptions

log = logging.getLogger(__name__)

_BRINGERS = 2
_TREE = "tree"


class LazyTree(Tree):
    """The tree of the union, with folders expanded before anyone looks into them."""

    exact_links = False  # and its times are those of _status

    expander: Expander
    filesystem: Filesystem

    def _expanded(self, folder: Dir) -> None:
        if folder.expanded or folder.dead:
            return
        fd = self.upper_fd(folder)
        if self.expander.pending(fd) is not None:
            if not self.filesystem.on_worker():
                raise NeedsWorker
            own = os.dup(fd)
            try:
                with self.filesystem.unlocked():
                    self.expander.expand(own)
            finally:
                os.close(own)
        folder.expanded = True

    def find(self, parent: Dir, name: bytes) -> Found | None:
        """Where a name is; the folder is expanded before."""
        self._expanded(parent)
        return super().find(parent, name)

    def links(self, node: Node, st: Status) -> int:
        """``st_nlink`` without the link that keeps a file for names yet to come."""
        shown = super().links(node, st)
        if shown > 1 and isinstance(node, File) and self.expander.is_linked(st.st_ino):
            return shown - 1
        return shown

    def listing(self, folder: Dir) -> Listing:
        """The entries of a folder; it is expanded before."""
        self._expanded(folder)
        return super().listing(folder)


class LazyFiles(Files):
    """Open files, of which some are incomplete: those are plain, and fetch before they read."""

    contents: Contents

    def __init__(self, filesystem: Filesystem, tree: Tree, copyup: CopyUp) -> None:
        super().__init__(filesystem, tree, copyup)
        self.first = FirstReads(None)
        self._ahead: dict[int, ReadAhead] = {}
        self._bringers = ThreadPoolExecutor(_BRINGERS, "fuse-ahead")
        self._room = threading.Semaphore(2 * _BRINGERS)

    def _goes_through(self, node: File, flags: int, fd: int) -> bool:
        if not node.through and self._content(node) is not None:
            return False
        return super()._goes_through(node, flags, fd)

    def _content(self, node: File) -> Content | None:
        """The content of an incomplete file; it stays acquired while the node has opens."""
        content = node.content
        if isinstance(content, Content):
            return content
        path, follow = self._tree.path(node)
        form = self._tree.form
        if form.read(path, self.contents.attribute, follow) is None:
            return None
        fd = self._tree.open(node, os.O_RDONLY)
        try:
            node.content = acquired = self.contents.acquire(fd)
        finally:
            os.close(fd)
        return acquired

    def adopt(self, number: int, handle: Handle) -> None:
        """Enter an open that a server before answered, with the content if it is incomplete."""
        super().adopt(number, handle)
        if not handle.through and (handle.node.names or handle.node.orphan >= 0):
            self._content(handle.node)

    def release(self, number: int) -> File | None:
        """Close a handle; the content goes with the last."""
        node = super().release(number)
        self._ahead.pop(number, None)
        if node is not None and not node.plain:
            self.let_go(node)
        return node

    def let_go(self, node: File) -> None:
        """Give the content of a node back."""
        if isinstance(node.content, Content):
            self.contents.release(node.content)
            node.content = None

    def _incomplete(self, number: int) -> Content | None:
        content = self._handle(number).node.content
        return content if isinstance(content, Content) and not content.finished else None

    def read(self, args: ReadIn) -> Reply:
        """Read, fetching first what is not here."""
        content = self._incomplete(args.fh)
        if content is None:
            return super().read(args)
        here = content.has(args.offset, args.size)
        if not here and self.first.wants():
            self._note(args)
        self._look_ahead(content, args)
        if here:
            return super().read(args)
        return Later(lambda: content.read(args.offset, args.size))

    def _note(self, args: ReadIn) -> None:
        for folder, name in self._handle(args.fh).node.names:
            self.first.note(join(path_of(folder), name), args.offset, args.size)
            return

    def _look_ahead(self, content: Content, args: ReadIn) -> None:
        """Have what comes after a read brought here, if its reader goes on."""
        ahead = self._ahead.setdefault(args.fh, ReadAhead())
        start, length = ahead.due(args.offset, args.size)
        if not length or content.has(start, length) or not self._room.acquire(blocking=False):
            return
        self.contents.hold(content)
        self._bringers.submit(self._bring, content, start, length)

    def _bring(self, content: Content, start: int, length: int) -> None:
        try:
            with contextlib.suppress(OSError):  # whoever comes to it is told
                content.ensure(start, length, 0)
        finally:
            self.contents.release(content)
            self._room.release()

    def stop(self) -> None:
        """Bring nothing ahead any more."""
        self._bringers.shutdown(cancel_futures=True)

    def write(self, args: WriteIn, data: memoryview) -> Reply:
        """Write, fetching first what is around it."""
        content = self._incomplete(args.fh)
        if content is None:
            return super().write(args, data)
        own, kill = bytes(data), bool(args.write_flags & protocol.WRITE_KILL_SUIDGID)
        fd = os.dup(self._descriptor(self._handle(args.fh)))

        def work() -> bytes:
            try:
                done = content.write(own, args.offset)
                if kill:
                    kill_set_id(fd)
                return replies.write_reply(done)
            finally:
                os.close(fd)

        return Later(work)

    def truncate(self, node: File, args: SetattrIn) -> None:
        """Set the size; on a worker, when blocks must be fetched or given up."""
        held = isinstance(node.content, Content)
        content = self._content(node)
        if content is None:
            super().truncate(node, args)
            return
        if not self._filesystem.on_worker():
            if not held and not node.plain:
                self.let_go(node)
            raise NeedsWorker
        with self._filesystem.unlocked():
            content.truncate(args.size)
        if args.valid & SetattrValid.KILL_SUIDGID:
            super().truncate(node, args)
        if not node.plain:
            self.let_go(node)

    def _truncate_open(self, node: File, kill: bool) -> None:
        valid = SetattrValid.SIZE | (SetattrValid.KILL_SUIDGID if kill else 0)
        self.truncate(node, SetattrIn(valid, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))

    def fsync(self, args: FsyncIn) -> Reply:
        """Write out the data and the knowledge that it is here."""
        content = self._incomplete(args.fh)
        if content is None:
            return super().fsync(args)

        def work() -> bytes:
            content.sync(args.data_only)
            return b""

        return Later(work)

    def fallocate(self, args: FallocateIn) -> Reply:
        """Allocate; what changes content needs the whole file here."""
        content = self._incomplete(args.fh)
        if content is None or not args.mode & ~syscalls.FALLOC_KEEP_SIZE:
            return super().fallocate(args)
        fd = os.dup(self._descriptor(self._handle(args.fh)))

        def work() -> bytes:
            try:
                content.fetch_all()
                if not content.finished:
                    raise OSError(errno.EIO, "file is not whole")
                syscalls.fallocate(fd, args.mode, args.offset, args.length)
            finally:
                os.close(fd)
            return b""

        return Later(work)

    def lseek(self, args: LseekIn) -> Reply:
        """An incomplete file shows no holes: what is not here may be data."""
        if self._incomplete(args.fh) is None:
            return super().lseek(args)
        size = os.fstat(self._descriptor(self._handle(args.fh))).st_size
        if args.offset >= size:
            raise OSError(errno.ENXIO, "offset is past the end")
        return replies.quad_reply(args.offset if args.whence == os.SEEK_DATA else size)

    def copy(self, args: CopyIn) -> Reply:
        """Copy between whole files; the kernel copies others by reading and writing."""
        if self._incomplete(args.fh_in) or self._incomplete(args.fh_out):
            raise OSError(errno.EOPNOTSUPP, "file is not whole")
        return super().copy(args)


class LazyFilesystem(UnionFilesystem):
    """See the module's text.

    Args:
        opening: makes the source of the tree; nothing waits for it until something is fetched.
        store: folder for the local tree and its maps; kept between mounts.
        deadline: seconds a call of the source is repeated before EIO.
        reads: file that remembers what is read first; None: nothing does.
    """

    def __init__(
        self,
        opening: Callable[[], Source],
        store: str,
        deadline: float = 30.0,
        reads: str | None = None,
    ) -> None:
        tree, work = os.path.join(store, _TREE), os.path.join(store, "work")
        fresh = not os.path.exists(os.path.join(store, "begun"))
        self._store = store
        source = self._source = LateSource(opening, Path(store, FACTS))
        for path in (tree, work, os.path.join(store, "maps"), os.path.join(store, "sources")):
            os.makedirs(path, 0o700, exist_ok=True)
        super().__init__(UnionOptions(upper=tree, work=work))
        form = self.tree.form
        self._maps = os.open(os.path.join(store, "maps"), layers.DIRECTORY)
        self._links = os.open(os.path.join(store, "sources"), layers.DIRECTORY)
        self.contents = Contents(source, self._maps, form, deadline)
        self.expander = Expander(source, self._links, form, deadline, self.contents.stopping)
        assert isinstance(self.tree, LazyTree) and isinstance(self.files, LazyFiles)
        self.tree.expander = self.expander
        self.files.contents = self.contents
        self._first = self.files.first = FirstReads(None if reads is None else Path(reads))
        if fresh:
            self.expander.prepare_root(self._root)
            with open(os.path.join(store, "begun"), "wb"):
                pass
        totals = source.totals()
        self.progress = Progress(totals.files, totals.bytes)
        self.progress.complete = os.path.exists(self._complete_mark)
        self._filler = Filler(
            self._root,
            self.contents,
            self.expander,
            form,
            self._first,
            self.progress,
            self._declare_complete,
        )

    def _make_tree(self, index: int) -> Tree:
        tree = LazyTree(self.stack, self._format(), index)
        tree.filesystem = self
        return tree

    def _make_files(self) -> Files:
        return LazyFiles(self, self.tree, self.copyup)

    @property
    def _root(self) -> int:
        """Descriptor of the local tree's root."""
        assert self.stack.upper is not None
        return self.stack.upper.fd

    @property
    def _complete_mark(self) -> str:
        return os.path.join(self._store, "complete")

    def give_up(self) -> None:
        """Ask the source no more, for whom it may be."""
        self.contents.stopping.set()

    def destroy(self) -> None:
        """Stop filling and close everything."""
        self._filler.stop()
        assert isinstance(self.files, LazyFiles)
        self.files.stop()
        self._first.save()
        for content in self.contents.in_use():
            content.users = 1
            self.contents.release(content)
        super().destroy()
        os.close(self._maps)
        os.close(self._links)

    # -- filling ------------------------------------------------------------------------

    def warm(self) -> None:
        """Begin to open the source, if anything is still to come from it."""
        if not self.progress.complete:
            self._source.warm()

    def fill(self, bytes_per_second: float = 0.0) -> None:
        """Bring everything here in the background, at most so fast (0: as fast as can be).

        A fill that runs takes the new limit.  One that meets an error says so in
        :class:`Progress` and goes on after a pause.
        """
        self._filler.rate = bytes_per_second
        if self.progress.complete:
            return
        with self.lock:
            self.progress.filling, running = True, self.progress.filling
            self.journal.rewrite()
        if not running:
            self._filler.start()

    def _set_times(
        self, node: Node, fd: int | None, path: bytes, follow: bool, args: SetattrIn
    ) -> None:
        if not isinstance(node, File):
            super()._set_times(node, fd, path, follow, args)
            return
        with self.contents.still(node.real):
            super()._set_times(node, fd, path, follow, args)

    def _entry(self, request: Request, node: Node, st: Status) -> bytes:
        return super()._entry(request, node, self._at_rest(node, st))

    def _status(self, node: File) -> Status:
        with self.contents.still(node.real):
            return super()._status(node)

    def _at_rest(self, node: Node, st: Status) -> Status:
        """Attributes without the times of what is being brought just now."""
        if not isinstance(node, File):
            return st
        with self.contents.still(node.real) as acquired:
            return self.tree.stat(node) if acquired else st

    def extra(self) -> dict[str, float]:
        """The limit of a fill that runs."""
        return {"fill": self._filler.rate} if self.progress.filling else {}

    def resume(self, state: State) -> int:
        """Go on where another server stopped, filling if it did."""
        lost = super().resume(state)
        rate = state.meta.extra.get("fill")
        if rate is not None:
            self.fill(rate)
        return lost

    def _declare_complete(self) -> None:
        """Everything is here: make that durable, then say so."""
        self.expander.drop_links()
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
        with open(self._complete_mark, "wb") as stream:
            os.fsync(stream.fileno())
        store = os.open(self._store, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(store)
        finally:
            os.close(store)
        self.progress.complete = True

    def state(self) -> Progress:
        """How far it is now."""
        self.progress.fetched_files = self.contents.finished_files
        return self.progress
