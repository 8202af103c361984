"""The union filesystem: a writable upper layer over up to 500 read-only ones.

Names and whiteouts: :mod:`lazarette.fuse.tree` and :mod:`lazarette.fuse.entries`; copy-up:
:mod:`lazarette.fuse.copyup`; open files: :mod:`lazarette.fuse.files`.  This module answers
the requests.

Semantics
    U1. The upper layer, and every lower one, is in overlayfs's format: the kernel mounts it.
    U2. ``st_ino`` never changes over copy-up and remount; a hard link stays one over copy-up
        while the work folder is kept with the upper layer.
    U3. Renaming a folder any part of which is in a lower layer fails with EXDEV, or, in a
        union with ``redirect``, leaves a redirect that the kernel's overlayfs follows too.
    U4. A copy-up while readers hold the lower file leaves those readers with the content of
        before; everyone who opens it afterwards sees the new content.
    U5. What fsync(2) returned for is on disk; so is the copy a copy-up made, unless the union
        is mounted ``volatile``.
    U6. The server is the only one that changes the layers: the kernel caches names and
        attributes without limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from lazarette.fuse import layers, native, protocol, replies, syscalls
from lazarette.fuse.copyup import CopyUp
from lazarette.fuse.dirty import DirtyPaths
from lazarette.fuse.entries import Entries
from lazarette.fuse.files import Files
from lazarette.fuse.filesystem import Connection, Filesystem, Later, Reply, Sync
from lazarette.fuse.journal import (
    Intent,
    Journal,
    LiveJournal,
    Meta,
    Shared,
    State,
    handle_record,
    meta_record,
    node_record,
)
from lazarette.fuse.layers import Format, Stack
from lazarette.fuse.native import UTIME_NOW, UTIME_OMIT, Status
from lazarette.fuse.nodes import Dir, File, Listing, Node
from lazarette.fuse.protocol import FOREVER, InitFlag, SetattrValid
from lazarette.fuse.requests import (
    CopyIn,
    CreateIn,
    FallocateIn,
    FsyncIn,
    GetattrIn,
    LseekIn,
    MkdirIn,
    MknodIn,
    OpenIn,
    ReadIn,
    ReleaseIn,
    RenameIn,
    Request,
    SetattrIn,
    SetxattrIn,
    WriteIn,
)
from lazarette.fuse.restore import Restorer
from lazarette.fuse.tree import Tree

_WRITTEN_TTL = 1
"""Seconds attributes are cached while a mapping may change a file behind the kernel's back."""

_CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC

_MISSES = 16
_BYTES_A_MISS = 4096

# Of a class they would be looked up each time.
_UID, _GID, _MODE, _SIZE = (
    SetattrValid.UID,
    SetattrValid.GID,
    SetattrValid.MODE,
    SetattrValid.SIZE,
)
_ATIME, _MTIME = SetattrValid.ATIME, SetattrValid.MTIME
_ATIME_NOW, _MTIME_NOW = SetattrValid.ATIME_NOW, SetattrValid.MTIME_NOW
_OWNER, _TIMES = _UID | _GID, _ATIME | _MTIME

_SUID_SGID = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = b"security.capability"
_DEFAULT_ACL = b"system.posix_acl_default"


@dataclass(frozen=True, slots=True)
class UnionOptions:
    """What a union is made of.

    Attributes:
        lowers: folders of the lower layers, top first; may be empty.
        upper: folder of the upper layer; None makes the union read-only.
        work: an empty folder on the upper layer's filesystem, kept with the upper layer.
        volatile: copy-up does not wait for the disk (a container's root).
        reserve_wh: refuse names that begin with ``.wh.``.
        redirect: let folders of lower layers be renamed; who reads the upper layer must
            then follow redirects.
    """

    lowers: list[str] = field(default_factory=list)
    upper: str | None = None
    work: str | None = None
    volatile: bool = False
    reserve_wh: bool = False
    redirect: bool = False


def _open_work(options: UnionOptions) -> tuple[int, int]:
    """Descriptors of the folder for temporary files and of the index, made if needed."""
    if options.upper is None:
        return -1, -1
    if options.work is None:
        raise OSError(errno.EINVAL, "an upper layer needs a work folder")
    if os.stat(options.work).st_dev != os.stat(options.upper).st_dev:
        raise OSError(errno.EXDEV, "upper layer and work folder are on different filesystems")
    opened = []
    for name in ("tmp", "links"):
        path = os.path.join(options.work, name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        opened.append(os.open(path, layers.DIRECTORY))
    return opened[0], opened[1]


class UnionFilesystem(Filesystem):
    """Answers requests on a union; see the module's text.

    Raises:
        OSError: a layer is missing, or the work folder lies elsewhere than the upper layer.
    """

    def __init__(self, options: UnionOptions) -> None:
        super().__init__()
        self.options = options
        self._uid, self._gid = os.geteuid(), os.getegid()
        self.stack = Stack(options.upper, options.lowers)
        self.work, self.index = _open_work(options)
        self.tree = self._make_tree(self.index)
        self.copyup = CopyUp(self, self.tree, self.work, durable=not options.volatile)
        self.entries = Entries(self.tree, self.copyup, options.reserve_wh, options.redirect)
        self.files = self._make_files()
        self.dirty: DirtyPaths | None = None
        if options.work is not None and self.work >= 0:
            self.copyup.clear()
            self._work_root = os.open(options.work, layers.DIRECTORY)
            self.dirty = DirtyPaths(self.tree, self._work_root)
            self.copyup.dirty = self.files.dirty = self.dirty

    @staticmethod
    def _format() -> Format:
        return Format(privileged=os.geteuid() == 0)

    def _make_tree(self, index: int) -> Tree:
        return Tree(self.stack, self._format(), index)

    def _make_files(self) -> Files:
        return Files(self, self.tree, self.copyup)

    # -- going on after another server --------------------------------------------------

    def keep_journal(
        self, shared: Shared, meta: Meta, attempts: dict[int, int] | None = None
    ) -> None:
        """Note from now on, in shared memory, what the kernel knows."""

        def describe() -> Iterator[bytes]:
            meta.next_node, meta.next_handle = self.tree.next_number, self.files.next_number
            meta.extra = self.extra()
            yield meta_record(meta)
            for node in self.tree.nodes.values():
                if node is not self.tree.root:
                    yield node_record(node)
            for number, handle in self.files.handles.items():
                yield handle_record(number, handle)

        journal = LiveJournal(shared, describe, attempts or {})
        journal.rewrite()
        self.tree.journal = journal

    def extra(self) -> dict[str, float]:
        """Numbers of this kind of filesystem for its successor."""
        return {}

    def resume(self, state: State) -> int:
        """Go on where another server stopped; how many nodes were not found again."""
        restorer = Restorer(self.tree, self.files, self.dirty, state)
        self._readers.clear()  # this thread may block
        with self.lock:
            restorer.run()
        return restorer.lost

    def hand_over(self) -> set[int]:
        """Write down what changed, and keep files open that have no name."""
        if self.dirty is not None:
            self.dirty.close()
        self.journal.rewrite()
        held = {handle.fd for handle in self.files.handles.values()}
        for node in self.tree.nodes.values():
            if isinstance(node, File):
                held.add(node.orphan)
            elif isinstance(node, Dir) and node.dead:
                held.add(node.fd)
        return {fd for fd in held if fd >= 0}

    def take_back(self) -> None:
        """Note changes again."""
        if self.dirty is not None:
            self.dirty.reopen()

    def unsee(self, numbers: list[int]) -> None:
        """Take back the lookups of a request whose reply never arrived."""
        for number in numbers:
            node = self.tree.nodes.get(number)
            if node is not None:
                node.lookups -= 1
                self.tree.journal.forget(number, 1)

    @property
    def journal(self) -> Journal:
        """Where what the kernel knows is noted."""
        return self.tree.journal

    def wanted(self) -> InitFlag:
        """Nothing beyond what every server asks for."""
        return InitFlag(0)

    def connect(self, connection: Connection, granted: InitFlag) -> None:
        """Keep the connection."""
        super().connect(connection, granted)
        self.files.connect(connection)

    def destroy(self) -> None:
        """Close every descriptor."""
        self.files.close()
        if self.dirty is not None:
            self.dirty.close()
            os.close(self._work_root)
        self.tree.close()
        self.stack.close()
        for fd in (self.work, self.index):
            if fd >= 0:
                os.close(fd)

    # -- replies ------------------------------------------------------------------------

    def _attr_ttl(self, node: Node) -> int:
        if isinstance(node, File):
            if node.writers and node.through:
                return _WRITTEN_TTL
            node.cached = True
        return FOREVER

    def _entry(self, request: Request, node: Node, st: Status) -> bytes:
        tree, number = self.tree, node.id
        journal = tree.journal
        if node.lookups <= 0 or (isinstance(node, File) and len(node.names) > 1):
            journal.node(node)
        node.lookups += 1
        journal.lookup(number, request.unique)
        ttl = self._attr_ttl(node)
        return native.entry_reply(number, node.ino, st, tree.links(node, st), FOREVER, ttl)

    def _attributes(self, request: Request, node: Node) -> bytes:
        """Reply with the attributes of a node as they are now."""
        if isinstance(node, Dir):
            links = 0 if node.dead else 1 if node.lowers else -1
            ttl = FOREVER if node.id == request.node else 0
            fd = node.fd if node.fd >= 0 else self.tree.top_fd(node)
            return native.attr_of(fd, node.ino, links, ttl)
        assert isinstance(node, File)
        return self._attributes_at(request, node, *self.tree.locate(node))

    def _attributes_at(
        self, request: Request, node: Node, fd: int | None, path: bytes, follow: bool
    ) -> bytes:
        """As :meth:`_attributes`, of a node of which :meth:`Tree.place` has said where it is."""
        tree = self.tree
        if not isinstance(node, File):
            return self._attributes(request, node)
        ttl = self._attr_ttl(node) if node.id == request.node else 0
        if tree.exact_links and not node.index and not node.dead and node.kind != stat.S_IFCHR:
            return native.attr_at(fd, path, follow, node.ino, -1, ttl)
        st = self._status(node)
        return native.attr_reply(node.ino, st, tree.links(node, st), ttl)

    def _status(self, node: File) -> Status:
        return self.tree.stat(node)

    def _attributes_changed(self, request: Request, node: Node) -> None:
        """After a change by way of a replaced node: its successor's attributes are old."""
        if node.id != request.node:
            self.connection.forget_attributes(node.id)

    # -- names --------------------------------------------------------------------------

    def lookup(self, request: Request, name: bytes) -> Reply:
        """LOOKUP."""
        tree = self.tree
        parent = tree.dir(request.node)
        if parent.listing is not None and name not in parent.listing:
            return self._missing(name)
        tree.trim()
        found = tree.present(parent, name)
        if found is None:
            self._count_miss(parent)
            return self._missing(name)
        return self._entry(request, *found)

    @staticmethod
    def _missing(name: bytes) -> bytes:
        if len(name) > protocol.NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "name is too long")
        return replies.NEGATIVE_REPLY

    def _count_miss(self, parent: Dir) -> None:
        """Read the listing of a folder in which many names are looked for in vain.

        The next misses then need no system call.  It must pay: a folder is read once it has
        seen a miss for every few kilobytes of its size.
        """
        parent.misses += 1
        if parent.misses % _MISSES or parent.listing is not None or parent.dead:
            return
        if native.opened(self.tree.top_fd(parent)).st_size <= parent.misses * _BYTES_A_MISS:
            self.tree.listing(parent)

    def forget(self, node: int, lookups: int) -> None:
        """FORGET."""
        known = self.tree.nodes.get(node)
        if known is None or known is self.tree.root:
            return
        known.lookups -= lookups
        if known.lookups <= 0:
            self._release(known)
            if node not in self.tree.nodes:
                return
        self.tree.journal.forget(node, lookups)

    def _note(self, parent: Dir, name: bytes, deep: bool = False) -> None:
        """Note a changed entry for the next snapshot."""
        if self.dirty is not None and self.dirty.noting:
            self.dirty.entry(parent, name, deep)

    def _note_node(self, node: Node) -> None:
        """Note changed attributes for the next snapshot."""
        if self.dirty is None or not self.dirty.noting:
            return
        if isinstance(node, Dir):
            self.dirty.folder(node)
        elif isinstance(node, File):
            self.dirty.file(node)

    def _release(self, node: Node) -> None:
        if isinstance(node, File):
            if node.through or node.plain:
                return
            if node.backing:
                self.files.drop_backing(node)
            if self.dirty is not None:
                self.dirty.forget(node)
        self.tree.drop(node)

    def readlink(self, request: Request) -> Reply:
        """READLINK."""
        node = self.tree.node(request.node)
        path, follow = self.tree.path(node)
        if follow:
            assert isinstance(node, File)
            return os.readlink(b"", dir_fd=node.orphan)
        return os.readlink(path)

    def _own(self, request: Request, parent: Dir, folder: int, name: bytes, mode: int) -> None:
        """Give a new entry to its owner; chown clears the set-id bits, so the mode comes last."""
        gid = 0xFFFFFFFF if parent.setgid else request.gid
        if request.uid != self._uid or (gid != 0xFFFFFFFF and gid != self._gid):
            owner = -1 if gid == 0xFFFFFFFF else gid
            os.chown(name, request.uid, owner, dir_fd=folder, follow_symlinks=False)
            if mode & _SUID_SGID and not stat.S_ISLNK(mode):
                os.chmod(name, stat.S_IMODE(mode), dir_fd=folder)

    def _masked(self, parent: Dir, mode: int, umask: int) -> int:
        acl = parent.default_acl
        if acl is None:
            acl = self.entries.has_default_acl(parent)
        return mode if acl else mode & ~umask

    def mknod(self, request: Request, args: MknodIn, name: bytes) -> Reply:
        """MKNOD."""
        parent = self.tree.dir(request.node)
        mode = self._masked(parent, args.mode, args.umask)
        if stat.S_ISCHR(mode) and args.rdev == 0:
            self.entries.leave_whiteout(parent, name)
            self._note(parent, name)
            found = self.tree.lookup(parent, name)
            assert found is not None
            return self._entry(request, *found)

        def maker(folder: int, target: bytes) -> None:
            os.mknod(target, mode, protocol.decode_device(args.rdev), dir_fd=folder)
            self._own(request, parent, folder, target, mode)

        def again(folder: int, target: bytes) -> None:
            self._own(request, parent, folder, target, mode)

        made = self.entries.make(parent, name, maker, again if request.resent else None)
        self._note(parent, name)
        return self._entry(request, *made)

    def mkdir(self, request: Request, args: MkdirIn, name: bytes) -> Reply:
        """MKDIR."""
        parent = self.tree.dir(request.node)
        mode = self._masked(parent, args.mode, args.umask) & 0o7777

        def maker(folder: int, target: bytes) -> None:
            os.mkdir(target, mode, dir_fd=folder)
            again(folder, target)

        def again(folder: int, target: bytes) -> None:
            if mode & ~0o777:  # mkdir(2) takes only permissions and the sticky bit for sure
                bits = mode | (stat.S_ISGID if parent.setgid else 0)
                os.chmod(target, bits, dir_fd=folder)
            self._own(request, parent, folder, target, 0)

        made = self.entries.make(parent, name, maker, again if request.resent else None)
        self._note(parent, name)
        return self._entry(request, *made)

    def symlink(self, request: Request, name: bytes, target: bytes) -> Reply:
        """SYMLINK."""
        parent = self.tree.dir(request.node)

        def maker(folder: int, link: bytes) -> None:
            os.symlink(target, link, dir_fd=folder)
            again(folder, link)

        def again(folder: int, link: bytes) -> None:
            self._own(request, parent, folder, link, stat.S_IFLNK)

        made = self.entries.make(parent, name, maker, again if request.resent else None)
        self._note(parent, name)
        return self._entry(request, *made)

    def link(self, request: Request, node: int, name: bytes) -> Reply:
        """LINK."""
        source = self.tree.node(node)
        if not isinstance(source, File):
            raise OSError(errno.EPERM, "folders have no hard links")
        self.files.before_change(source)
        parent = self.tree.dir(request.node)
        linked = self.entries.link(source, parent, name, request.resent)
        self._note(parent, name)
        self._note_node(source)
        return self._entry(request, *linked)

    def unlink(self, request: Request, name: bytes) -> Reply:
        """UNLINK."""
        parent = self.tree.dir(request.node)
        self._announce(request, parent, name)
        try:
            node = self.entries.unlink(parent, name)
        except BaseException:
            self.tree.journal.cancel(request.unique)
            raise
        self._note(parent, name)
        self._note_node(node)
        self._settle(node)
        return b""

    def _announce(
        self,
        request: Request,
        parent: Dir,
        name: bytes,
        parent2: int = 0,
        name2: bytes = b"",
        flags: int = 0,
    ) -> None:
        """Note what is about to be removed or renamed: a successor sees whether it was."""
        intent = Intent(request.opcode, flags, parent.id, name, parent2, name2)
        self.tree.journal.intend(request.unique, intent)

    def _settle(self, node: File) -> None:
        """Let go of what an idle dead file held."""
        if node.dead and node.backing and not node.through:
            self.files.drop_backing(node)
        if not node.lookups and not node.through and not node.plain:
            self.tree.drop(node)

    def rmdir(self, request: Request, name: bytes) -> Reply:
        """RMDIR."""
        parent = self.tree.dir(request.node)
        self._announce(request, parent, name)
        try:
            node = self.entries.rmdir(parent, name)
        except BaseException:
            self.tree.journal.cancel(request.unique)
            raise
        self._note(parent, name)
        if not node.lookups:
            self.tree.drop(node)
        return b""

    def rename(self, request: Request, args: RenameIn, old: bytes, new: bytes) -> Reply:
        """RENAME2."""
        source = (self.tree.dir(request.node), old)
        target = (self.tree.dir(args.newdir), new)
        moving = self.tree.known(*source)
        if isinstance(moving, File):
            self.files.before_change(moving)
        self._announce(request, *source, args.newdir, new, args.flags)
        try:
            self.entries.rename(source, target, args.flags)
        except BaseException:
            self.tree.journal.cancel(request.unique)
            raise
        self._note(*source, deep=True)
        self._note(*target, deep=True)
        return b""

    # -- attributes ---------------------------------------------------------------------

    def getattr(self, request: Request, args: GetattrIn) -> Reply:
        """GETATTR."""
        return self._attributes(request, self.tree.node(request.node))

    def setattr(self, request: Request, args: SetattrIn) -> Reply:
        """SETATTR."""
        tree, valid = self.tree, args.valid
        node = tree.node(request.node)
        if isinstance(node, File):
            if valid & _SIZE:
                self.files.before_change(node, content=True)
                self.copyup.file(node, keep=args.size)
            elif node.lower is not None:
                self.files.before_change(node)
                self.copyup.file(node)
            fd, path, follow = tree.locate(node)
        else:
            assert isinstance(node, Dir)
            self.copyup.folder(node)
            fd, path, follow = tree.place(node)
        if valid & _OWNER:
            uid = args.uid if valid & _UID else -1
            native.set_owner(fd, path, follow, uid, args.gid if valid & _GID else -1)
            if isinstance(node, File) and node.privileged:
                node.privileged = None  # chown(2) drops set-id bits and capabilities
        if valid & _MODE:
            native.set_mode(fd, path, stat.S_IMODE(args.mode))
            if isinstance(node, Dir):
                node.setgid = bool(args.mode & stat.S_ISGID)
            elif isinstance(node, File) and (node.privileged or args.mode & _SUID_SGID):
                node.privileged = None
        if valid & _SIZE and isinstance(node, File):
            self.files.truncate(node, args)
        if valid & _TIMES:
            self._set_times(node, fd, path, follow, args)
        if node.id != request.node:
            self._attributes_changed(request, node)
        if self.dirty is not None and self.dirty.noting:
            self._note_node(node)
        return self._attributes_at(request, node, fd, path, follow)

    def _set_times(
        self, node: Node, fd: int | None, path: bytes, follow: bool, args: SetattrIn
    ) -> None:
        valid = args.valid
        atime, atime_ns, mtime, mtime_ns = 0, UTIME_OMIT, 0, UTIME_OMIT
        if valid & _ATIME_NOW:
            atime_ns = UTIME_NOW
        elif valid & _ATIME:
            atime, atime_ns = args.atime, args.atimensec
        if valid & _MTIME_NOW:
            mtime_ns = UTIME_NOW
        elif valid & _MTIME:
            mtime, mtime_ns = args.mtime, args.mtimensec
        native.set_times(fd, path, follow, _signed(atime), atime_ns, _signed(mtime), mtime_ns)

    def statfs(self, request: Request) -> Reply:
        """STATFS of the upper layer, or of the topmost lower one."""
        top = self.stack.upper or self.stack.lowers[0]
        return replies.statfs_reply(os.statvfs(top.fd))

    # -- xattrs -------------------------------------------------------------------------

    def getxattr(self, request: Request, size: int, name: bytes) -> Reply:
        """GETXATTR; the kernel asks for capabilities at each first write: those are known."""
        node = self.tree.node(request.node)
        if name == _CAPABILITY and isinstance(node, File) and node.privileged is False:
            return errno.ENODATA
        path, follow = self.tree.path(node)
        value = os.getxattr(path, self.tree.form.stored(name), follow_symlinks=follow)
        return _sized(value, size)

    def listxattr(self, request: Request, size: int) -> Reply:
        """LISTXATTR, without those of the on-disk format."""
        path, follow = self.tree.path(self.tree.node(request.node))
        names = []
        for stored in os.listxattr(path, follow_symlinks=follow):
            shown = self.tree.form.shown(os.fsencode(stored))
            if shown is not None:
                names.append(shown + b"\0")
        return _sized(b"".join(names), size)

    def _writable_path(self, request: Request) -> tuple[Node, bytes, bool]:
        node = self.tree.node(request.node)
        if isinstance(node, Dir):
            self.copyup.folder(node)
        elif isinstance(node, File):
            self.files.before_change(node)
            self.copyup.file(node)
        return node, *self.tree.path(node)

    def setxattr(self, request: Request, args: SetxattrIn, name: bytes, value: bytes) -> Reply:
        """SETXATTR."""
        node, path, follow = self._writable_path(request)
        stored = self.tree.form.stored(name)
        flags = 0 if request.resent else args.flags  # a server before may have set it
        os.setxattr(path, stored, value, flags, follow_symlinks=follow)
        if isinstance(node, File) and name == _CAPABILITY:
            node.privileged = True
        if isinstance(node, Dir) and name == _DEFAULT_ACL:
            node.default_acl = None
        if args.extra & protocol.SETXATTR_ACL_KILL_SGID:
            mode = os.stat(path, follow_symlinks=follow).st_mode
            os.chmod(path, stat.S_IMODE(mode) & ~stat.S_ISGID)
        self._attributes_changed(request, node)
        self._note_node(node)
        return b""

    def removexattr(self, request: Request, name: bytes) -> Reply:
        """REMOVEXATTR."""
        node = self.tree.node(request.node)
        path, follow = self.tree.path(node)
        try:
            os.getxattr(path, self.tree.form.stored(name), follow_symlinks=follow)
        except OSError:
            if request.resent:
                return b""  # a server before has removed it
            raise
        node, path, follow = self._writable_path(request)
        os.removexattr(path, self.tree.form.stored(name), follow_symlinks=follow)
        if isinstance(node, File):
            node.privileged = None
        if isinstance(node, Dir) and name == _DEFAULT_ACL:
            node.default_acl = None
        self._attributes_changed(request, node)
        self._note_node(node)
        return b""

    # -- files --------------------------------------------------------------------------

    def open(self, request: Request, args: OpenIn) -> Reply:
        """OPEN."""
        node = self.tree.nodes.get(request.node)
        if not isinstance(node, File):
            raise OSError(errno.EISDIR if node else errno.ESTALE, "not a file")
        return self.files.open(node, args)

    def create(self, request: Request, args: CreateIn, name: bytes) -> Reply:
        """CREATE."""
        parent = self.tree.dir(request.node)
        mode = self._masked(parent, args.mode, args.umask)

        foreign = request.uid != self._uid or request.gid != self._gid

        def opener(folder: int, target: bytes) -> int:
            fd = native.open_at(folder, target, _CREATE, mode & 0o7777)
            if foreign:
                try:
                    self._own(request, parent, folder, target, mode)
                except BaseException:
                    os.close(fd)
                    raise
            return fd

        def again(folder: int, target: bytes) -> int:
            self._own(request, parent, folder, target, mode)
            return os.open(target, _CREATE & ~(os.O_CREAT | os.O_EXCL), dir_fd=folder)

        node, st, fd = self.entries.create(parent, name, opener, again if request.resent else None)
        node.privileged = mode & _SUID_SGID != 0
        self._note(parent, name)
        reply = self.files.opened(node, args.flags, fd)
        return self._entry(request, node, st) + reply

    def tmpfile(self, request: Request, args: CreateIn) -> Reply:
        """TMPFILE: a file without a name, that link(2) can give one."""
        parent = self.tree.dir(request.node)
        folder = self.copyup.folder(parent)
        mode = self._masked(parent, args.mode, args.umask)
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | (args.flags & os.O_EXCL)
        fd = os.open(b".", flags, stat.S_IMODE(mode), dir_fd=folder)
        gid = -1 if parent.setgid else request.gid
        os.chown(fd, request.uid, gid)
        if mode & _SUID_SGID:
            os.chmod(fd, stat.S_IMODE(mode))
        st = native.opened(fd)
        upper = self.stack.upper
        assert upper is not None
        ino = self.stack.number(upper, st.st_ino)
        node = File(self.tree.new_number(), ino, stat.S_IFREG, (st.st_dev, st.st_ino))
        node.orphan = os.dup(fd)
        node.dead = True
        self.tree.nodes[node.id] = node
        reply = self.files.opened(node, args.flags, fd)
        return self._entry(request, node, st) + reply

    def read(self, request: Request, args: ReadIn) -> Reply:
        """READ."""
        return self.files.read(args)

    def write(self, request: Request, args: WriteIn, data: memoryview) -> Reply:
        """WRITE."""
        return self.files.write(args, data)

    def release(self, request: Request, args: ReleaseIn) -> Reply:
        """RELEASE."""
        node = self.files.release(args.fh)
        if node is not None and node.lookups <= 0:
            self._release(node)
        elif node is not None and node.dead and not node.through:
            self.files.drop_backing(node)
        return b""

    def fsync(self, request: Request, args: FsyncIn) -> Reply:
        """FSYNC."""
        return self.files.fsync(args)

    def fallocate(self, request: Request, args: FallocateIn) -> Reply:
        """FALLOCATE."""
        return self.files.fallocate(args)

    def lseek(self, request: Request, args: LseekIn) -> Reply:
        """LSEEK."""
        return self.files.lseek(args)

    def copy_file_range(self, request: Request, args: CopyIn) -> Reply:
        """COPY_FILE_RANGE."""
        return self.files.copy(args)

    def syncfs(self, request: Request) -> Reply:
        """SYNCFS of the upper layer's filesystem."""
        if self.stack.upper is None:
            return b""
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.stack.upper.fd)

        def work() -> bytes:
            try:
                syscalls.syncfs(fd)
            finally:
                os.close(fd)
            return b""

        return Later(work)

    # -- directories --------------------------------------------------------------------

    def readdir(self, request: Request, args: ReadIn) -> Reply:
        """READDIR."""
        folder = self.tree.dir(request.node)
        reply = bytearray()
        most = args.size // replies.SMALLEST_DIRENT
        for number, (name, ino, kind) in self._entries_after(folder, args.offset, most):
            packed = replies.dirent(ino, number, kind, name)
            if len(reply) + len(packed) > args.size:
                break
            reply += packed
        return bytes(reply)

    def _entries_after(
        self, folder: Dir, offset: int, most: int
    ) -> list[tuple[int, tuple[bytes, int, int]]]:
        """At least so many entries after ``offset``, if there are."""
        listing = self.tree.listing(folder)
        kind = stat.S_IFDIR >> 12
        entries: list[tuple[int, tuple[bytes, int, int]]] = []
        if offset < 1 and not folder.dead:
            entries.append((1, (b".", folder.ino, kind)))
        if offset < 2 and not folder.dead:
            entries.append((2, (b"..", folder.parent.ino, kind)))
        return entries + listing.after(max(offset, Listing.FIRST - 1), most)

    def readdirplus(self, request: Request, args: ReadIn) -> Reply:
        """READDIRPLUS; the attributes of what the kernel knows it has, and they are left out."""
        tree = self.tree
        folder = tree.dir(request.node)
        tree.trim()
        reply = bytearray()
        most = args.size // (replies.ENTRY_SIZE + replies.SMALLEST_DIRENT)
        for number, (name, ino, kind) in self._entries_after(folder, args.offset, most):
            room = args.size - len(reply) - replies.ENTRY_SIZE
            packed = replies.dirent(ino, number, kind, name)
            if len(packed) > room:
                break
            known = folder.entries.get(name)
            found = None
            if number >= Listing.FIRST and (known is None or known.lookups <= 0):
                found = tree.present(folder, name)
            reply += self._entry(request, *found) if found else replies.NO_ENTRY
            reply += packed
        return bytes(reply)

    def fsyncdir(self, request: Request, args: FsyncIn) -> Reply:
        """FSYNCDIR."""
        folder = self.tree.dir(request.node)
        if not folder.upper:
            return b""
        fd = os.open(
            b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.tree.upper_fd(folder)
        )
        return Sync(fd, False)


def _signed(seconds: int) -> int:
    return seconds - (1 << 64) if seconds >> 63 else seconds


def _sized(value: bytes, size: int) -> bytes:
    if size == 0:
        return replies.size_reply(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, "value is too long")
    return value
