"""Copy-up: bringing files and folders of lower layers into the upper one.

Everything is made under a temporary name in the work folder, complete with owner, mode,
xattrs and times, its data on disk, and then renamed into place: a crash leaves either the
lower file or the whole copy.  Leftovers in the work folder are removed at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import time
from collections.abc import Callable

from lazarette.fuse import layers, syscalls
from lazarette.fuse.dirty import DirtyPaths
from lazarette.fuse.filesystem import Filesystem, NeedsWorker
from lazarette.fuse.layers import entry_path
from lazarette.fuse.nodes import Dir, File
from lazarette.fuse.tree import Tree

INLINE_COPY = 256 << 10
"""Files up to this size are copied up on the loop's own thread, bytes."""

_CHUNK = 64 << 20
_WHITEOUT = b"whiteout"
_LATER_ERRORS = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


def copy_data(source: int, target: int, size: int) -> None:
    """Copy ``size`` bytes, sharing them where the filesystem can, keeping holes."""
    try:
        syscalls.clone_file(target, source)
    except OSError as error:
        if error.errno not in _LATER_ERRORS:
            raise
    else:
        return
    os.ftruncate(target, size)
    offset = 0
    while offset < size:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, min(offset, size))


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        length = min(end - start, _CHUNK)
        try:
            done = os.copy_file_range(source, target, length, start, start)
        except OSError as error:
            if error.errno not in _LATER_ERRORS:
                raise
            done = os.pwrite(target, os.pread(source, min(length, 1 << 20), start), start)
        if done == 0:
            return
        start += done


class CopyUp:
    """Copies nodes of a tree up.

    Args:
        filesystem: whose lock is held, and let go around long copying.
        tree: the merged tree.
        work: descriptor of the work folder, on the upper layer's filesystem.
        durable: write data out before a copy replaces the lower file.
    """

    def __init__(self, filesystem: Filesystem, tree: Tree, work: int, durable: bool) -> None:
        self._filesystem = filesystem
        self._tree = tree
        self._work = work
        self._durable = durable
        self._serial = itertools.count()
        self.dirty: DirtyPaths | None = None
        self._has_whiteout = False

    # -- the work folder ----------------------------------------------------------------

    def temporary(self) -> bytes:
        """A name not yet used in the work folder."""
        return b"#%x" % next(self._serial)

    @property
    def work(self) -> int:
        """Descriptor of the work folder."""
        return self._work

    def whiteout(self, folder: int, name: bytes, replace: bool) -> None:
        """Hide ``name``; ``replace`` what the upper layer has there, atomically.

        All whiteouts are links of one inode, as many as the filesystem allows.
        """
        target_folder, target = (self._work, self.temporary()) if replace else (folder, name)
        for _ in range(2):
            if not self._has_whiteout:
                with contextlib.suppress(FileExistsError):
                    os.mknod(_WHITEOUT, stat.S_IFCHR | 0o600, os.makedev(0, 0), dir_fd=self._work)
                self._has_whiteout = True
            try:
                os.link(
                    _WHITEOUT,
                    target,
                    src_dir_fd=self._work,
                    dst_dir_fd=target_folder,
                    follow_symlinks=False,
                )
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_WHITEOUT, dir_fd=self._work)
                self._has_whiteout = False
            else:
                break
        else:
            raise OSError(errno.ENOENT, "folder is gone")
        if replace:
            os.rename(target, name, src_dir_fd=self._work, dst_dir_fd=folder)

    # -- folders ------------------------------------------------------------------------

    def folder(self, node: Dir) -> int:
        """Bring a folder and its parents up; the descriptor of the upper folder."""
        if not node.upper:
            chain = []
            current = node
            while not current.upper:
                if current.dead:
                    raise OSError(errno.ENOENT, "folder is gone")
                if current.parent is current:
                    raise OSError(errno.EROFS, "no upper layer")
                chain.append(current)
                current = current.parent
            for each in reversed(chain):
                self._one_folder(each)
        elif node.dead:
            raise OSError(errno.ENOENT, "folder is gone")
        return self._tree.upper_fd(node)

    def _one_folder(self, node: Dir) -> None:
        tree = self._tree
        source = layers.descriptor_path(tree.lower_fd(node, 0))
        st = os.stat(source)
        name = self.temporary()
        os.mkdir(name, 0o700, dir_fd=self._work)
        self._metadata(source, True, self._work, name, st)
        self.place(name, node.parent, node.name)
        node.upper = True
        node.impure = False

    # -- files --------------------------------------------------------------------------

    def file(self, node: File, keep: int | None = None) -> None:
        """Bring a file's data and metadata up; ``keep`` bytes of it only, if given.

        Raises:
            NeedsWorker: on the loop, when the data is long or being copied already.
        """
        while node.lower is not None and node.copying:
            if not self._filesystem.on_worker():
                raise NeedsWorker
            with self._filesystem.unlocked():
                time.sleep(0.002)
        if node.lower is None:
            return
        if self._tree.stack.upper is None:
            raise OSError(errno.EROFS, "no upper layer")
        fd, name, _ = self._tree.locate(node)
        assert fd is not None
        source = entry_path(fd, name)
        st = os.lstat(source)
        if stat.S_ISREG(st.st_mode):
            size = st.st_size if keep is None else min(keep, st.st_size)
            if size > INLINE_COPY and not self._filesystem.on_worker():
                raise NeedsWorker
            temporary = self.temporary()
            node.copying = True
            try:
                self._data(source, temporary, size)
            finally:
                node.copying = False
        else:
            temporary = self._special(source, st)
        self._metadata(source, False, self._work, temporary, st)
        self._install(node, temporary, st)

    def _data(self, source: bytes, temporary: bytes, size: int) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(temporary, flags, 0o600, dir_fd=self._work)
        try:
            if size == 0:
                return
            origin = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if size > INLINE_COPY:
                    with self._filesystem.unlocked():
                        copy_data(origin, target, size)
                        if self._durable:
                            os.fdatasync(target)
                else:
                    copy_data(origin, target, size)
                    if self._durable:
                        os.fdatasync(target)
            finally:
                os.close(origin)
        except BaseException:
            os.unlink(temporary, dir_fd=self._work)
            raise
        finally:
            os.close(target)

    def _special(self, source: bytes, st: os.stat_result) -> bytes:
        temporary = self.temporary()
        if stat.S_ISLNK(st.st_mode):
            os.symlink(os.readlink(source), temporary, dir_fd=self._work)
        else:
            os.mknod(temporary, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=self._work)
        return temporary

    def _metadata(
        self, source: bytes, follow: bool, folder: int, name: bytes, st: os.stat_result
    ) -> None:
        """Owner, mode, xattrs and times of ``source`` for the new ``name``."""
        os.chown(name, st.st_uid, st.st_gid, dir_fd=folder, follow_symlinks=False)
        target = entry_path(folder, name)
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(target, stat.S_IMODE(st.st_mode))
        form = self._tree.form
        for attribute in _list_attributes(source, follow):
            key = os.fsencode(attribute)
            if form.shown(key) is None and key != form.node:
                continue
            try:
                value = os.getxattr(source, key, follow_symlinks=follow)
                os.setxattr(target, key, value, follow_symlinks=False)
            except OSError as error:
                # An xattr the upper filesystem cannot hold, or gone meanwhile, is left out.
                if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM):
                    raise
        times = (st.st_atime_ns, st.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)

    def _install(self, node: File, temporary: bytes, st: os.stat_result) -> None:
        """Put a finished copy in the place of the lower file."""
        tree = self._tree
        path = entry_path(self._work, temporary)
        if not node.names:
            node.orphan = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.unlink(temporary, dir_fd=self._work)
            self._moved_up(node, os.stat(node.orphan))
            tree.journal.node(node)
            return
        self._keep_ino(path, node, st)
        parent, name = next(iter(node.names))
        self.folder(parent)
        if st.st_nlink > 1:
            index = tree.index_name(node.ino)
            tree.form.write_links(path, st.st_nlink - 1)
            os.link(
                temporary,
                index,
                src_dir_fd=self._work,
                dst_dir_fd=tree.index,
                follow_symlinks=False,
            )
            node.index, node.links = index, st.st_nlink - 1
        self.mark_impure(parent)
        self.place(temporary, parent, name)
        node.add_name(parent, name, True)
        fresh = os.stat(name, dir_fd=tree.upper_fd(parent), follow_symlinks=False)
        self._moved_up(node, fresh)

    def _keep_ino(self, path: bytes, node: File, st: os.stat_result) -> None:
        form = self._tree.form
        if not stat.S_ISREG(st.st_mode) and form.prefix.startswith(b"user."):
            return  # user xattrs exist on files and folders only
        os.setxattr(path, form.ino, node.ino.to_bytes(8, "little"), follow_symlinks=False)

    @staticmethod
    def _moved_up(node: File, st: os.stat_result) -> None:
        node.lower = None
        node.origin = True
        node.real = (st.st_dev, st.st_ino)

    def ensure_name(self, node: File, parent: Dir, name: bytes) -> None:
        """Make one name of a copied-up file exist in the upper layer too."""
        if node.names.get((parent, name), True):
            return
        tree = self._tree
        folder = self.folder(parent)
        path = entry_path(tree.index, node.index)
        node.links -= 1
        tree.form.write_links(path, node.links)
        self.mark_impure(parent)
        os.link(node.index, name, src_dir_fd=tree.index, dst_dir_fd=folder, follow_symlinks=False)
        node.add_name(parent, name, True)
        if self.dirty is not None:
            self.dirty.entry(parent, name)

    def mark_impure(self, folder: Dir) -> None:
        """Note on disk that a folder holds an entry with an older inode number."""
        if not folder.impure:
            path = layers.descriptor_path(self._tree.upper_fd(folder))
            os.setxattr(path, self._tree.form.impure, b"y")
            folder.impure = True
            if self.dirty is not None:
                self.dirty.folder(folder)

    # -- putting in place ---------------------------------------------------------------

    def place(self, temporary: bytes, parent: Dir, name: bytes) -> None:
        """Rename from the work folder into a folder whose times stay as they were."""
        folder = self._tree.upper_fd(parent)
        before = os.stat(folder)
        os.rename(temporary, name, src_dir_fd=self._work, dst_dir_fd=folder)
        path = layers.descriptor_path(folder)
        times = (before.st_atime_ns, before.st_mtime_ns)
        os.utime(path, ns=times)
        if self.dirty is not None:
            self.dirty.entry(parent, name)

    def make(self, parent: Dir, name: bytes, maker: Callable[[int, bytes], None]) -> bool:
        """Make an entry, over a whiteout if there is one; True when there was.

        Args:
            parent: folder it is to be in.
            name: its name there.
            maker: makes it, given folder descriptor and name; called once or twice.
        """
        folder = self.folder(parent)
        try:
            maker(folder, name)
        except FileExistsError:
            st = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not layers.is_whiteout(st):
                raise
        else:
            return False
        temporary = self.temporary()
        maker(self._work, temporary)
        path = entry_path(self._work, temporary)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.setxattr(path, self._tree.form.opaque, b"y")
            syscalls.renameat2(self._work, temporary, folder, name, syscalls.RENAME_EXCHANGE)
            os.unlink(temporary, dir_fd=self._work)
        else:
            os.rename(temporary, name, src_dir_fd=self._work, dst_dir_fd=folder)
        return True

    def clear(self) -> None:
        """Remove what a killed server left in the work folder."""
        for name in os.listdir(layers.descriptor_path(self._work)):
            if name.startswith(b"#"):
                self.remove_tree(name)

    def remove_tree(self, name: bytes) -> None:
        """Remove an entry of the work folder: a file, or a folder of files and folders."""
        try:
            os.unlink(name, dir_fd=self._work)
        except IsADirectoryError:
            _remove_folder(self._work, name)


def _remove_folder(parent: int, name: bytes) -> None:
    fd = os.open(name, layers.DIRECTORY, dir_fd=parent)
    try:
        for each in os.listdir(layers.descriptor_path(fd)):
            try:
                os.unlink(each, dir_fd=fd)
            except IsADirectoryError:
                _remove_folder(fd, each)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _list_attributes(path: bytes, follow: bool) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
