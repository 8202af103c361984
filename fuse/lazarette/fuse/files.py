"""Open files of a union: which go through to a backing file, and the I/O of the others.

The kernel keeps one way of reading and writing for an inode while any open of it lasts:
*through* (it uses a registered backing file itself) or *plain* (it caches pages and sends
READ and WRITE).  The first open chooses; later ones follow.  Opens for writing of files with
set-id bits or capabilities are plain, because the kernel drops those only on WRITE.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict

from lazarette.fuse import protocol, replies, syscalls
from lazarette.fuse.copyup import CopyUp
from lazarette.fuse.dirty import DirtyPaths
from lazarette.fuse.filesystem import Connection, Filesystem, Later, Reply, Sync
from lazarette.fuse.nodes import File, Handle
from lazarette.fuse.protocol import OpenFlag, SetattrValid
from lazarette.fuse.requests import (
    CopyIn,
    FallocateIn,
    FsyncIn,
    LseekIn,
    OpenIn,
    ReadIn,
    SetattrIn,
    WriteIn,
)
from lazarette.fuse.tree import Tree

_IDLE_BACKINGS = 4096
_TRIES = 16
_THROUGH = OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH
_PLAIN = OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH
_REFUSED = (errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOTTY)
_ACCESS = os.O_ACCMODE
_CHANGES = os.O_ACCMODE | os.O_TRUNC
_SUID_SGID = stat.S_ISUID | stat.S_ISGID


class Files:
    """Handles of a union.

    Args:
        filesystem: whose lock is held.
        tree: the merged tree.
        copyup: brings up what is opened for writing.
    """

    def __init__(self, filesystem: Filesystem, tree: Tree, copyup: CopyUp) -> None:
        self._filesystem = filesystem
        self._tree = tree
        self._copyup = copyup
        self._connection = Connection()
        self._handles: dict[int, Handle] = {}
        self.next_number = 1
        self._idle: OrderedDict[File, None] = OrderedDict()
        self.dirty: DirtyPaths | None = None
        self.through_opens = 0
        self.plain_opens = 0

    def connect(self, connection: Connection) -> None:
        """Keep the connection, for backing files."""
        self._connection = connection

    def close(self) -> None:
        """Close everything; the connection is gone, and backing ids with it."""
        for handle in self._handles.values():
            if handle.fd >= 0:
                os.close(handle.fd)
        self._handles.clear()

    # -- opening ------------------------------------------------------------------------

    def before_change(self, node: File, content: bool = False) -> None:
        """Called before a lower file is copied up, or (``content``) changed.

        Readers whose kernel inode is bound to the lower file keep that inode; the name gets a
        new one.

        Raises:
            OSError: ESTALE after the change of nodes: the kernel looks the name up again.
        """
        if content and node.through and not node.backing_upper:
            if node.lower is not None:
                self._copyup.file(node)
            self._replace(node)
            raise OSError(errno.ESTALE, "copied up under readers")

    def _replace(self, old: File) -> None:
        """Put a new node in the place of one that stays with its readers."""
        tree = self._tree
        new = File(tree.new_number(), old.ino, old.kind, old.real)
        new.names, old.names = old.names, {}
        new.index, new.links, new.origin = old.index, old.links, old.origin
        new.orphan, old.orphan = old.orphan, -1
        new.dead = old.dead
        new.lookups = 1  # held by the old node, until the kernel forgets that one
        for folder, name in new.names:
            folder.entries[name] = new
        old.successor = new
        tree.nodes[new.id] = new
        tree.journal.node(new)
        tree.journal.node(old)
        self._connection.forget_attributes(old.id)
        if tree.by_ino.get(old.ino) is old:
            tree.by_ino[new.ino] = new

    def open(self, node: File, args: OpenIn) -> Reply:
        """Open a file by its node."""
        if node.successor is not None:
            raise OSError(errno.ESTALE, "copied up under readers")
        flags = args.flags
        if flags & _CHANGES:
            self.before_change(node, content=True)
            self._copyup.file(node, keep=0 if flags & os.O_TRUNC else None)
            if flags & os.O_TRUNC:
                self._truncate_open(node, bool(args.open_flags & protocol.OPEN_KILL_SUIDGID))
                if self.dirty is not None:
                    self.dirty.file(node)
        return self.opened(node, flags, -1)

    def _truncate_open(self, node: File, kill: bool) -> None:
        fd = self._tree.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, 0)
            if kill:
                kill_set_id(fd)
        finally:
            os.close(fd)

    def opened(self, node: File, flags: int, fd: int) -> bytes:
        """Make the handle of an open; ``fd`` may be open already, else -1."""
        writable = flags & _ACCESS != 0
        if node.through or (
            node.backing
            and not writable
            and not node.plain
            and node.backing_upper == (node.lower is None)
            and self._connection.passthrough
        ):
            through = True
        else:
            through = node.kind == stat.S_IFREG and self._goes_through(node, flags, fd)
            if not through and fd < 0:
                fd = self._tree.open(node, _real_flags(flags))
        number = self.next_number
        self.next_number = number + 1
        handle = self._handles[number] = Handle(node, flags, fd, through)
        self._tree.journal.handle(number, handle)
        if writable:
            node.writers += 1
            node.written = True
            if self.dirty is not None:
                self.dirty.writer(node)
        if not through:
            node.plain += 1
            self.plain_opens += 1
            return replies.open_reply(number, _PLAIN)
        node.through += 1
        self.through_opens += 1
        if writable and node.cached:
            node.cached = False
            self._connection.forget_attributes(node.id)
        return replies.open_reply(number, _THROUGH, node.backing)

    def _goes_through(self, node: File, flags: int, fd: int) -> bool:
        """Choose the way of an open, and register the backing file."""
        if not self._connection.passthrough or node.plain:
            return False
        if node.through:
            return True
        layer = self._tree.stack.upper
        if node.lower is not None:
            layer = node.lower.folder.lowers[node.lower.index].layer
        if layer is not None and not layer.passthrough:
            return False
        if fd < 0 and flags & _ACCESS and self._has_privileges(node):
            return False
        if node.backing and node.backing_upper != node.upper:
            self.drop_backing(node)
        if node.backing:
            return True
        try:
            self._register(node, fd)
        except OSError as error:
            if error.errno in _REFUSED and layer is not None:
                layer.passthrough = False
                return False
            raise
        return True

    def _has_privileges(self, node: File) -> bool:
        if node.privileged is None:
            path, follow = self._tree.path(node)
            capability = self._tree.form.read(path, b"security.capability", follow)
            mode = self._tree.stat(node).st_mode
            node.privileged = bool(mode & _SUID_SGID) or capability is not None
        return node.privileged

    def _register(self, node: File, fd: int) -> None:
        own = fd < 0
        if own:
            fd = self._tree.open(node, os.O_RDONLY)
        try:
            node.backing = self._connection.backing_open(fd)
            node.backing_upper = node.upper
            node.backing_writable = not own
            if node.lookups > 0:  # one that the kernel is yet to be told of is noted as a whole
                self._tree.journal.backing(node)
        finally:
            if own:
                os.close(fd)

    def drop_backing(self, node: File) -> None:
        """Give the backing file of a node without such opens back."""
        self._idle.pop(node, None)
        if node.backing:
            self._connection.backing_close(node.backing)
            node.backing = 0
            self._tree.journal.backing(node)

    def _drop_oldest(self) -> None:
        """Give back the backing file that was registered first, if it is not in use."""
        for _ in range(_TRIES):
            oldest = next(iter(self._idle))
            if not oldest.through:
                self.drop_backing(oldest)
                return
            self._idle.move_to_end(oldest)

    # -- going on after another server ---------------------------------------------------

    def adopt(self, number: int, handle: Handle) -> None:
        """Enter an open that a server before answered."""
        node = handle.node
        self._handles[number] = handle
        if handle.writable:
            node.writers += 1
        if not handle.through:
            node.plain += 1
            return
        node.through += 1

    def idle(self, node: File) -> None:
        """Note that a node has a backing file, and no opens yet."""
        if node.backing:
            self._idle[node] = None

    @property
    def handles(self) -> dict[int, Handle]:
        """Handles by number."""
        return self._handles

    # -- closing ------------------------------------------------------------------------

    def release(self, number: int) -> File | None:
        """Close a handle; its node."""
        handle = self._handles.pop(number, None)
        if handle is None:
            return None
        self._tree.journal.closed(number)
        node = handle.node
        if handle.fd >= 0:
            os.close(handle.fd)
        if handle.flags & _ACCESS:
            node.writers -= 1
        if not handle.through:
            node.plain -= 1
            return node
        node.through -= 1
        if not node.through:
            if node.backing_writable:
                self.drop_backing(node)  # or the file counts as open for writing for ever
                return node
            if node not in self._idle:
                self._idle[node] = None
                if len(self._idle) > _IDLE_BACKINGS:
                    self._drop_oldest()
        return node

    # -- I/O ----------------------------------------------------------------------------

    def _handle(self, number: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise OSError(errno.EBADF, "unknown handle")
        return handle

    def _descriptor(self, handle: Handle) -> int:
        """The real descriptor of a handle: opened when first needed, and again after copy-up."""
        node = handle.node
        if handle.fd >= 0 and handle.upper == node.upper:
            return handle.fd
        if handle.through and node.successor is not None:
            node = node.successor
        fd = self._tree.open(node, _real_flags(handle.flags))
        if handle.fd >= 0:
            os.close(handle.fd)
        handle.fd = fd
        handle.upper = handle.node.upper
        return fd

    def read(self, args: ReadIn) -> Reply:
        """Read; what is not in the page cache is read by a worker."""
        fd = self._descriptor(self._handle(args.fh))
        size, offset = args.size, args.offset
        buffer = bytearray(size)
        try:
            done = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            done = -1
        if done == size:
            return bytes(buffer)
        # The handle may be closed before a worker comes to it: it gets its own descriptor.
        own = os.dup(fd)

        def work() -> bytes:
            try:
                return os.pread(own, size, offset)
            finally:
                os.close(own)

        return Later(work)

    def write(self, args: WriteIn, data: memoryview) -> Reply:
        """Write; set-id bits go where the kernel asks for it."""
        handle = self._handle(args.fh)
        fd = self._descriptor(handle)
        done = os.pwrite(fd, data, args.offset)
        if args.write_flags & protocol.WRITE_KILL_SUIDGID:
            kill_set_id(fd)
        return replies.write_reply(done)

    def truncate(self, node: File, args: SetattrIn) -> None:
        """Set the size of a copied-up file."""
        fd = -1
        if args.valid & SetattrValid.FH:
            handle = self._handles.get(args.fh)
            if handle is not None and handle.writable:
                fd = os.dup(self._descriptor(handle))
        if fd < 0:
            fd = self._tree.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, args.size)
            if args.valid & SetattrValid.KILL_SUIDGID:
                kill_set_id(fd)
        finally:
            os.close(fd)

    def fsync(self, args: FsyncIn) -> Reply:
        """Write a file out."""
        return Sync(os.dup(self._descriptor(self._handle(args.fh))), args.data_only)

    def fallocate(self, args: FallocateIn) -> Reply:
        """Allocate or punch."""
        fd = self._descriptor(self._handle(args.fh))
        syscalls.fallocate(fd, args.mode, args.offset, args.length)
        return b""

    def lseek(self, args: LseekIn) -> Reply:
        """Find data or a hole."""
        offset = args.offset - (1 << 64) if args.offset >> 63 else args.offset
        fd = self._descriptor(self._handle(args.fh))
        return replies.quad_reply(os.lseek(fd, offset, args.whence))

    def copy(self, args: CopyIn) -> Reply:
        """Copy a range between files, on a worker."""
        source = os.dup(self._descriptor(self._handle(args.fh_in)))
        target = os.dup(self._descriptor(self._handle(args.fh_out)))

        def work() -> bytes:
            try:
                length = min(args.length, 1 << 30)
                done = os.copy_file_range(source, target, length, args.off_in, args.off_out)
            finally:
                os.close(source)
                os.close(target)
            return replies.write_reply(done)

        return Later(work)


def _real_flags(flags: int) -> int:
    """Flags for the real file: the kernel does appending and truncating itself."""
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY:
        access = os.O_RDWR  # a page of a mapping is read before it is written
    return access | flags & os.O_NOATIME


def kill_set_id(fd: int) -> None:
    """Drop the set-id bits as a write by an unprivileged process does (chmod(2))."""
    mode = os.fstat(fd).st_mode
    bits = stat.S_IMODE(mode) & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        bits &= ~stat.S_ISGID
    if bits != stat.S_IMODE(mode):
        os.fchmod(fd, bits)
