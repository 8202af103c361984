"""Making the entries of a lazy tree, folder by folder, when someone first looks.

A folder whose entries are not here yet carries the xattr
``trusted.overlay.lazarette.folder`` with the source's id.  Expanding it makes all entries
(files as long as in the source, but empty of data) and then removes the xattr; what a killed
server left half made is removed and made again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading

from lazarette.fuse import layers
from lazarette.fuse.content import Mark, content_xattr, with_retry
from lazarette.fuse.layers import Format, entry_path
from lazarette.fuse.source import Source, SourceEntry

_LATE_XATTRS = (errno.EOPNOTSUPP, errno.EPERM)


class Expander:
    """Expands folders of one local tree; safe from any thread.

    Args:
        source: of the entries.
        links: descriptor of a folder that keeps a link to each file with several names.
        form: names of xattrs.
        deadline: seconds a call of the source is repeated.
        stopping: set when nobody waits for what is asked of it any more.
    """

    def __init__(
        self,
        source: Source,
        links: int,
        form: Format,
        deadline: float,
        stopping: threading.Event,
    ) -> None:
        self._source = source
        self._links = links
        self._folder_xattr = form.prefix + b"lazarette.folder"
        self._content_xattr = content_xattr(form)
        self._deadline = deadline
        self._stopping = stopping
        self._busy: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        self._link_lock = threading.Lock()
        self._linked = {
            os.stat(name, dir_fd=links, follow_symlinks=False).st_ino
            for name in os.listdir(layers.descriptor_path(links))
        }

    def is_linked(self, ino: int) -> bool:
        """Whether a file has a link of ours, beside those of the tree."""
        return ino in self._linked

    def drop_links(self) -> None:
        """Remove our links: every folder is expanded, nobody needs them any more."""
        for name in os.listdir(layers.descriptor_path(self._links)):
            os.unlink(name, dir_fd=self._links)
        self._linked.clear()

    def prepare_root(self, root: int) -> None:
        """Mark a new, empty local tree as not yet expanded."""
        path = layers.descriptor_path(root)
        entry = self._source.root()
        os.setxattr(path, self._folder_xattr, entry.id)
        self._metadata(path, entry, follow=True)

    def pending(self, fd: int) -> bytes | None:
        """The source's id of a folder that is not expanded, or None."""
        try:
            return os.getxattr(layers.descriptor_path(fd), self._folder_xattr)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise

    def expand(self, fd: int) -> None:
        """Make the entries of a folder, if that has not been done.

        Raises:
            OSError: EIO when the source does not answer before the deadline; what the local
                filesystem failed with, as ENOSPC.
        """
        st = os.stat(fd)
        key = (st.st_dev, st.st_ino)
        with self._changed:
            while key in self._busy:
                self._changed.wait()
            identity = self.pending(fd)
            if identity is None:
                return
            self._busy.add(key)
        try:
            self._expand(fd, identity, st)
        finally:
            with self._changed:
                self._busy.discard(key)
                self._changed.notify_all()

    def _expand(self, fd: int, identity: bytes, before: os.stat_result) -> None:
        found: list[SourceEntry] = []

        def ask() -> bytes:
            found[:] = self._source.entries(identity)
            return b""

        with_retry(self._deadline, ask, self._stopping)
        path = layers.descriptor_path(fd)
        for name in os.listdir(path):
            self._remove(fd, name)
        for entry in found:
            self._make(fd, entry)
        os.removexattr(path, self._folder_xattr)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    @staticmethod
    def _remove(fd: int, name: bytes) -> None:
        """Remove a leftover: nothing can be in its folders, they are not expanded."""
        try:
            os.unlink(name, dir_fd=fd)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=fd)

    def _make(self, fd: int, entry: SourceEntry) -> None:
        if entry.links > 1 and not entry.is_dir:
            with self._link_lock:
                self._make_linked(fd, entry)
        else:
            self._make_one(fd, entry.name, entry)

    def _make_linked(self, fd: int, entry: SourceEntry) -> None:
        """Make one of several names: the first makes the file in the folder of links."""
        kept = entry.id.hex().encode()
        if len(kept) > 250:
            kept = kept[:120] + b"%x" % (hash(entry.id) & 0xFFFFFFFFFFFFFFFF)
        try:
            os.stat(kept, dir_fd=self._links, follow_symlinks=False)
        except FileNotFoundError:
            partial = b"#" + kept[:200]
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=self._links)
            self._make_one(self._links, partial, entry)
            os.rename(partial, kept, src_dir_fd=self._links, dst_dir_fd=self._links)
            st = os.stat(kept, dir_fd=self._links, follow_symlinks=False)
            self._linked.add(st.st_ino)
        os.link(kept, entry.name, src_dir_fd=self._links, dst_dir_fd=fd, follow_symlinks=False)

    def _make_one(self, fd: int, name: bytes, entry: SourceEntry) -> None:
        path = entry_path(fd, name)
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=fd)
            os.setxattr(path, self._folder_xattr, entry.id)
        elif kind == stat.S_IFREG:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=fd)
            try:
                if entry.size:
                    value = Mark(entry.id, entry.size, entry.size).pack()
                    os.setxattr(file, self._content_xattr, value)
                    os.ftruncate(file, entry.size)
            finally:
                os.close(file)
        elif kind == stat.S_IFLNK:
            os.symlink(entry.target, name, dir_fd=fd)
        else:
            os.mknod(name, kind | 0o600, entry.rdev, dir_fd=fd)
        self._metadata(path, entry, follow=False)

    @staticmethod
    def _metadata(path: bytes, entry: SourceEntry, follow: bool) -> None:
        os.chown(path, entry.uid, entry.gid, follow_symlinks=follow)
        if not stat.S_ISLNK(entry.mode):
            os.chmod(path, stat.S_IMODE(entry.mode))
        for name, value in entry.xattrs.items():
            try:
                os.setxattr(path, name, value, follow_symlinks=follow)
            except OSError as error:
                # The local filesystem has no such xattrs: the entry is worth more than they.
                if error.errno not in _LATE_XATTRS:
                    raise
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=follow)
