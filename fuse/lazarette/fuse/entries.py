"""Changing names in the upper layer: create, link, unlink, rename, with their whiteouts."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from lazarette.fuse import layers, native, syscalls
from lazarette.fuse.copyup import CopyUp
from lazarette.fuse.layers import entry_path
from lazarette.fuse.native import Status
from lazarette.fuse.nodes import Dir, File, Node
from lazarette.fuse.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from lazarette.fuse.tree import Tree

RESERVED = b".wh."
_DEFAULT_ACL = "system.posix_acl_default"


class Entries:
    """Entries of the union's folders.

    Args:
        tree: the merged tree.
        copyup: brings up what is to change.
        reserve_wh: refuse names that begin with ``.wh.``, which a layer tar cannot carry.
        redirect: let folders of lower layers be renamed, by a redirect.
    """

    def __init__(self, tree: Tree, copyup: CopyUp, reserve_wh: bool, redirect: bool) -> None:
        self._tree = tree
        self._copyup = copyup
        self._reserve_wh = reserve_wh
        self._redirect = redirect

    def check_name(self, name: bytes) -> None:
        """Refuse a name no layer can hold."""
        if self._reserve_wh and name.startswith(RESERVED):
            raise OSError(errno.EINVAL, "names that begin with .wh. are reserved")

    # -- making -------------------------------------------------------------------------

    def has_default_acl(self, parent: Dir) -> bool:
        """Whether new entries take their ACL from the folder, so that no umask applies."""
        if parent.default_acl is None:
            path = layers.descriptor_path(self._tree.top_fd(parent))
            try:
                os.getxattr(path, _DEFAULT_ACL)
            except OSError:
                parent.default_acl = False
            else:
                parent.default_acl = True
        return parent.default_acl

    def make(
        self,
        parent: Dir,
        name: bytes,
        maker: Callable[[int, bytes], None],
        again: Callable[[int, bytes], None] | None = None,
    ) -> tuple[Node, Status]:
        """Make an entry and its node; see :meth:`CopyUp.make`.

        ``again`` completes an entry that a server before may have made for the same request.
        """
        self.check_name(name)
        self._make_or_complete(parent, name, maker, again)
        found = self._tree.lookup(parent, name)
        if found is None:
            raise OSError(errno.ENOENT, "entry vanished")
        node, st = found
        if parent.listing is not None:
            parent.listing.put(name, node.ino, stat.S_IFMT(st.st_mode) >> 12)
        return node, st

    def _make_or_complete(
        self,
        parent: Dir,
        name: bytes,
        maker: Callable[[int, bytes], None],
        again: Callable[[int, bytes], None] | None,
    ) -> None:
        """Make an entry, or take the one that is there: the kernel asked where none was."""
        try:
            self._copyup.make(parent, name, maker)
        except FileExistsError:
            if again is None:
                raise
            again(self._copyup.folder(parent), name)

    def create(
        self,
        parent: Dir,
        name: bytes,
        opener: Callable[[int, bytes], int],
        again: Callable[[int, bytes], int] | None = None,
    ) -> tuple[File, Status, int]:
        """Make a file with ``opener``; its node, attributes and the descriptor of it.

        ``again`` opens a file that a server before may have made for the same request.
        """
        self.check_name(name)
        try:
            fd = opener(self._copyup.folder(parent), name)
        except FileExistsError:
            fd = self._create_over(parent, name, opener, again)
        try:
            st = native.opened(fd)
            node = self._tree.fresh(parent, name, st)
        except BaseException:
            os.close(fd)
            raise
        if parent.listing is not None:
            parent.listing.put(name, node.ino, stat.S_IFREG >> 12)
        return node, st, fd

    def _create_over(
        self,
        parent: Dir,
        name: bytes,
        opener: Callable[[int, bytes], int],
        again: Callable[[int, bytes], int] | None,
    ) -> int:
        """Make a file over a whiteout, or take the one that is there."""
        fd = -1

        def maker(folder: int, target: bytes) -> None:
            nonlocal fd
            fd = opener(folder, target)

        def complete(folder: int, target: bytes) -> None:
            nonlocal fd
            assert again is not None
            fd = again(folder, target)

        try:
            self._make_or_complete(parent, name, maker, complete if again else None)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return fd

    def link(
        self, node: File, parent: Dir, name: bytes, again: bool = False
    ) -> tuple[Node, Status]:
        """One more name for a file; ``again``: a server before may have made it."""
        tree = self._tree
        self._copyup.file(node)
        if node.dead and node.orphan < 0:
            raise OSError(errno.ENOENT, "file is gone")
        fd, source, follow = tree.locate(node)

        def maker(folder: int, target: bytes) -> None:
            os.link(source, target, src_dir_fd=fd, dst_dir_fd=folder, follow_symlinks=follow)

        if node.origin:
            self._copyup.folder(parent)
            self._copyup.mark_impure(parent)
        self.check_name(name)
        self._make_or_complete(
            parent, name, maker, (lambda folder, target: None) if again else None
        )
        return self.linked(node, parent, name)

    def linked(self, node: File, parent: Dir, name: bytes) -> tuple[Node, Status]:
        """Note a link that was made."""
        tree = self._tree
        if node.dead:
            node.dead = False
            tree.by_ino[node.ino] = node
        node.add_name(parent, name, True)
        tree.journal.node(node)
        if parent.listing is not None:
            parent.listing.put(name, node.ino, node.kind >> 12)
        return node, tree.stat(node)

    # -- removing -----------------------------------------------------------------------

    def _lower_shows(self, parent: Dir, name: bytes) -> bool:
        """Whether a lower layer would show ``name`` if the upper had nothing there."""
        return bool(parent.lowers) and self._tree.find_below(parent, name) is not None

    def unlink(self, parent: Dir, name: bytes) -> File:
        """Remove a name of a file; the file, which may be dead now."""
        tree = self._tree
        node = tree.known(parent, name)
        if not isinstance(node, File):
            if node is None:
                raise OSError(errno.ENOENT, "no such entry")
            raise OSError(errno.EISDIR, "is a folder")
        self._count_links(node)
        in_upper = node.names.get((parent, name), False)
        folder = self._copyup.folder(parent)
        self._keep_reachable(node, folder, name, in_upper)
        if not in_upper and node.index:
            node.links -= 1
            tree.form.write_links(entry_path(tree.index, node.index), node.links)
        if parent.lowers and self._lower_shows(parent, name):
            self._copyup.whiteout(folder, name, replace=in_upper)
        else:
            native.remove_file(folder, name)
        self._name_gone(node, parent, name)
        return node

    def _count_links(self, node: File) -> None:
        """Make a file of which a name goes able to tell how many are left.

        A lower layer says how many it had: with several, the count is kept beside a copy,
        as the kernel's overlay does it.
        """
        if node.lower is not None and self._tree.stat(node).st_nlink > 1:
            self._copyup.file(node)

    def _keep_reachable(self, node: File, folder: int, name: bytes, in_upper: bool) -> None:
        """Hold a file that is about to lose its last known name, if the kernel still has it."""
        if node.lower is not None or node.orphan >= 0 or not in_upper or not node.lookups:
            return
        if node.index or len(node.names) == 1:
            node.orphan = native.open_at(folder, name, os.O_PATH | os.O_NOFOLLOW, 0)
            self._hold(node)

    def _hold(self, node: File) -> None:
        """Note the descriptor of a file before its name goes: nothing else finds it then."""
        self._tree.journal.node(node)
        self._tree.journal.commit()

    def _name_gone(self, node: File, parent: Dir, name: bytes) -> None:
        """Note that a name is gone, and perhaps the file with it."""
        self._drop_name(node, parent, name)
        self._tree.journal.node(node)

    def _drop_name(self, node: File, parent: Dir, name: bytes) -> None:
        tree = self._tree
        node.drop_name(parent, name)
        if parent.listing is not None:
            parent.listing.drop(name)
        if node.index:
            st = native.status(tree.index, node.index, False)
            if tree.links(node, st) > 0:
                return
            if node.orphan < 0:
                flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                node.orphan = os.open(node.index, flags, dir_fd=tree.index)
                self._hold(node)
            os.unlink(node.index, dir_fd=tree.index)
            node.index = b""
        elif node.names or (node.orphan >= 0 and native.opened(node.orphan).st_nlink > 0):
            return
        node.dead = True
        if tree.by_ino.get(node.ino) is node:
            del tree.by_ino[node.ino]

    def rmdir(self, parent: Dir, name: bytes) -> Dir:
        """Remove an empty folder."""
        tree = self._tree
        node = tree.known(parent, name)
        if not isinstance(node, Dir):
            if node is None:
                raise OSError(errno.ENOENT, "no such entry")
            raise OSError(errno.ENOTDIR, "not a folder")
        if len(tree.listing(node)):
            raise OSError(errno.ENOTEMPTY, "folder is not empty")
        folder = self._copyup.folder(parent)
        hidden = bool(node.lowers) or self._lower_shows(parent, name)
        if node.upper:
            tree.upper_fd(node)
            self._remove_upper_dir(folder, name, hidden)
        else:
            self._copyup.whiteout(folder, name, replace=False)
        self._dir_gone(node, parent, name)
        return node

    def _remove_upper_dir(self, folder: int, name: bytes, hidden: bool) -> None:
        """Remove a folder that holds whiteouts only, leaving a whiteout if one is needed."""
        if not hidden:
            try:
                os.rmdir(name, dir_fd=folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return
        temporary = self._copyup.temporary()
        flags = RENAME_WHITEOUT if hidden else 0
        syscalls.renameat2(folder, name, self._copyup.work, temporary, flags)
        self._copyup.remove_tree(temporary)

    def _dir_gone(self, node: Dir, parent: Dir, name: bytes) -> None:
        node.dead = True
        node.listing = None
        if self._tree.by_ino.get(node.ino) is node:
            del self._tree.by_ino[node.ino]
        if parent.entries.get(name) is node:
            del parent.entries[name]
        if parent.listing is not None:
            parent.listing.drop(name)
        self._tree.journal.node(node)

    # -- renaming -----------------------------------------------------------------------

    def rename(self, source: tuple[Dir, bytes], target: tuple[Dir, bytes], flags: int) -> None:
        """Rename as renameat2(2).

        Raises:
            OSError: EXDEV for a folder that is (partly) in a lower layer, without redirects.
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
            raise OSError(errno.EINVAL, "unknown rename flags")
        self.check_name(target[1])
        tree = self._tree
        moving = tree.known(*source)
        if moving is None:
            raise OSError(errno.ENOENT, "no such entry")
        replaced = tree.known(*target)
        if flags & RENAME_NOREPLACE and replaced is not None:
            raise OSError(errno.EEXIST, "target exists")
        if flags & RENAME_EXCHANGE:
            if replaced is None:
                raise OSError(errno.ENOENT, "nothing to exchange with")
            self._exchange(source, moving, target, replaced)
            return
        if replaced is moving:
            return
        self._move(source, moving, target, replaced, flags)

    def _prepare(self, place: tuple[Dir, bytes], node: Node) -> None:
        """Bring what is to be moved into the upper layer."""
        if isinstance(node, Dir):
            if node.lowers and not self._redirect:
                raise OSError(errno.EXDEV, "folder lies in a lower layer")
            self._copyup.folder(node)
        elif isinstance(node, File):
            self._copyup.file(node)
            self._copyup.ensure_name(node, *place)

    def _mark_move(self, node: Node, place: tuple[Dir, bytes]) -> None:
        """Note on disk, before a move, what the new place must know about the entry.

        A folder must go on merging with the lower ones it had, or with none; an older inode
        number must be looked for.
        """
        if isinstance(node, Dir):
            form = self._tree.form
            path = layers.descriptor_path(self._tree.upper_fd(node))
            if node.lowers:
                os.setxattr(path, form.redirect, b"/" + node.lowers[0].path)
            elif self._lower_shows(*place):
                os.setxattr(path, form.opaque, b"y")
        elif isinstance(node, File) and node.origin:
            self._copyup.folder(place[0])
            self._copyup.mark_impure(place[0])

    def _relocate(self, node: Node, old: tuple[Dir, bytes], new: tuple[Dir, bytes]) -> None:
        """Note in the nodes that an entry moved."""
        if isinstance(node, Dir):
            node.move(*new)
        elif isinstance(node, File):
            node.drop_name(*old)
            node.add_name(*new, True)
        self._tree.journal.node(node)
        if new[0].listing is not None:
            kind = node.kind if isinstance(node, File) else stat.S_IFDIR
            new[0].listing.put(new[1], node.ino, kind >> 12)

    def _exchange(
        self, source: tuple[Dir, bytes], one: Node, target: tuple[Dir, bytes], other: Node
    ) -> None:
        self._prepare(source, one)
        self._prepare(target, other)
        self._mark_move(one, target)
        self._mark_move(other, source)
        from_fd = self._copyup.folder(source[0])
        to_fd = self._copyup.folder(target[0])
        syscalls.renameat2(from_fd, source[1], to_fd, target[1], RENAME_EXCHANGE)
        if one is not other:
            self._relocate(one, source, target)
            self._relocate(other, target, source)

    def _move(
        self,
        source: tuple[Dir, bytes],
        node: Node,
        target: tuple[Dir, bytes],
        replaced: Node | None,
        flags: int,
    ) -> None:
        tree = self._tree
        if isinstance(replaced, Dir):
            if not isinstance(node, Dir):
                raise OSError(errno.EISDIR, "target is a folder")
            if len(tree.listing(replaced)):
                raise OSError(errno.ENOTEMPTY, "target is not empty")
        elif replaced is not None and isinstance(node, Dir):
            raise OSError(errno.ENOTDIR, "target is not a folder")
        self._prepare(source, node)
        from_fd = self._copyup.folder(source[0])
        to_fd = self._copyup.folder(target[0])
        self._mark_move(node, target)
        hidden = self._lower_shows(*source)
        if isinstance(replaced, File):
            self._count_links(replaced)
            in_upper = replaced.names.get(target, False)
            self._keep_reachable(replaced, to_fd, target[1], in_upper)
            if not in_upper and replaced.index:
                replaced.links -= 1
                path = entry_path(tree.index, replaced.index)
                tree.form.write_links(path, replaced.links)
        elif isinstance(replaced, Dir) and replaced.upper:
            tree.upper_fd(replaced)
            self._empty_upper_dir(replaced)
        if isinstance(node, Dir):
            self._move_dir(from_fd, source[1], to_fd, target[1], hidden)
        else:
            kernel_flags = RENAME_WHITEOUT if hidden else 0
            _rename(from_fd, source[1], to_fd, target[1], kernel_flags)
        if source[0].listing is not None:
            source[0].listing.drop(source[1])
        if isinstance(replaced, File):
            self._name_gone(replaced, *target)
        elif isinstance(replaced, Dir):
            self._dir_gone(replaced, *target)
        self._relocate(node, source, target)
        if flags & RENAME_WHITEOUT:
            self.leave_whiteout(*source)

    def _move_dir(self, from_fd: int, old: bytes, to_fd: int, new: bytes, hidden: bool) -> None:
        """Move a folder of the upper layer onto nothing, an empty folder or a whiteout."""
        try:
            _rename(from_fd, old, to_fd, new, RENAME_WHITEOUT if hidden else 0)
        except NotADirectoryError:
            syscalls.renameat2(from_fd, old, to_fd, new, RENAME_EXCHANGE)
            if not hidden:
                os.unlink(old, dir_fd=from_fd)

    def _empty_upper_dir(self, node: Dir) -> None:
        """Remove the whiteouts in an upper folder that is about to be replaced."""
        fd = self._tree.upper_fd(node)
        names = os.listdir(layers.descriptor_path(fd))
        if names and node.lowers:
            os.setxattr(layers.descriptor_path(fd), self._tree.form.opaque, b"y")
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)

    def leave_whiteout(self, parent: Dir, name: bytes) -> None:
        """Make an entry that *users* see as a whiteout (an overlay stacked on this union)."""

        def maker(folder: int, target: bytes) -> None:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(target, flags, 0, dir_fd=folder))
            os.setxattr(entry_path(folder, target), self._tree.form.node, b"y")

        self._copyup.folder(parent)
        self._copyup.mark_impure(parent)
        self.make(parent, name, maker)


def _rename(from_fd: int, old: bytes, to_fd: int, new: bytes, flags: int) -> None:
    if flags:
        syscalls.renameat2(from_fd, old, to_fd, new, flags)
    else:
        os.rename(old, new, src_dir_fd=from_fd, dst_dir_fd=to_fd)
