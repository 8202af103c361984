"""Building one snapshot: a folder that shares blocks, and what did not change, with others.

Used by :mod:`lazarette.fuse.snapshots`.  Paths here begin with the tree's name: ``upper/…``
for the upper layer, ``links/…`` for the index of hard links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from dataclasses import dataclass

from lazarette.fuse import layers, syscalls
from lazarette.fuse.dirty import join
from lazarette.fuse.layers import entry_path, opened_beneath

UPPER, LINKS = b"upper", b"links"
_SLACK_NS = 20_000_000
"""A change so soon after another may carry the same time stamp."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A live file when it was cloned: it is cloned again if one of these moved."""

    ino: int
    ctime_ns: int
    mtime_ns: int
    size: int
    when_ns: int


class CloneTree:
    """The snapshot being made, in ``TARGET.partial``."""

    def __init__(self, upper: int, links: int, target: str) -> None:
        self.target = target
        self.partial = target + ".partial"
        self._live = {UPPER: upper, LINKS: links}
        self._inodes: dict[int, bytes] = {}
        self._fresh: set[bytes] = set()
        self._names: dict[int, list[bytes]] = {}
        self._inode_at: dict[bytes, int] = {}
        self.seen: dict[bytes, _Seen] = {}
        self.linked = 0
        self.cloned = 0
        if os.path.exists(self.partial):
            parent = os.open(os.path.dirname(self.partial) or ".", layers.DIRECTORY)
            try:
                remove(parent, os.fsencode(os.path.basename(self.partial)))
            finally:
                os.close(parent)
        os.makedirs(self.partial)
        self._root = os.open(self.partial, layers.DIRECTORY)

    def close(self) -> None:
        """Close what is open."""
        os.close(self._root)

    # -- whole trees --------------------------------------------------------------------

    def link_all(self, previous: str) -> None:
        """Take everything over from the previous snapshot."""
        source = os.open(previous, layers.DIRECTORY)
        try:
            for name in (UPPER, LINKS):
                self._link_folder(source, self._root, name, name)
        finally:
            os.close(source)

    def _link_folder(self, source: int, target: int, name: bytes, path: bytes) -> None:
        os.mkdir(name, 0o700, dir_fd=target)
        with opened_beneath(source, name) as from_fd, opened_beneath(target, name) as to_fd:
            with os.scandir(layers.descriptor_path(from_fd)) as entries:
                for entry in entries:
                    below = path + b"/" + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        self._link_folder(from_fd, to_fd, entry.name, below)
                        continue
                    os.link(
                        entry.name,
                        entry.name,
                        src_dir_fd=from_fd,
                        dst_dir_fd=to_fd,
                        follow_symlinks=False,
                    )
                    self.linked += 1
                    self._names.setdefault(entry.inode(), []).append(below)
                    self._inode_at[below] = entry.inode()
            _copy_metadata(source, name, target, name, os.stat(from_fd))

    def clone_all(self) -> None:
        """Clone the whole live upper layer."""
        for name, fd in self._live.items():
            os.mkdir(name, 0o700, dir_fd=self._root)
            with opened_beneath(self._root, name) as to_fd:
                self._clone_entries(fd, to_fd, name)
            self._folder_metadata(name)

    def _clone_entries(self, source: int, target: int, path: bytes) -> None:
        for name in os.listdir(layers.descriptor_path(source)):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile, and recorded as such
                self._clone(source, target, name, path + b"/" + name)

    # -- single entries -----------------------------------------------------------------

    def _clone(self, source: int, target: int, name: bytes, path: bytes) -> None:
        """Clone an entry, with everything below it."""
        self._fresh.add(path)
        st = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=target)
            with opened_beneath(source, name) as from_fd, opened_beneath(target, name) as to_fd:
                self._clone_entries(from_fd, to_fd, path)
        else:
            linked = st.st_nlink > 1 and self._link_known(st.st_ino, target, name)
            if not linked:
                self._clone_file(source, target, name, path, st)
            if st.st_nlink > 1:
                self._inodes.setdefault(st.st_ino, path)
                made = os.stat(name, dir_fd=target, follow_symlinks=False).st_ino
                self._names.setdefault(made, []).append(path)
                self._inode_at[path] = made
            if linked:
                return
        _copy_metadata(source, name, target, name, st)

    def _link_known(self, ino: int, target: int, name: bytes) -> bool:
        """One more name of an inode that has been cloned already."""
        known = self._inodes.get(ino)
        if known is None:
            return False
        folder, _, base = known.rpartition(b"/")
        with opened_beneath(self._root, folder) as fd:
            os.link(base, name, src_dir_fd=fd, dst_dir_fd=target, follow_symlinks=False)
        return True

    def _clone_file(
        self, source: int, target: int, name: bytes, path: bytes, st: os.stat_result
    ) -> None:
        if stat.S_ISLNK(st.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(st.st_mode):
            self._share(source, target, name, path, st, os.O_CREAT | os.O_EXCL)
        else:
            os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=target)
        self.cloned += 1

    def _share(
        self, source: int, target: int, name: bytes, path: bytes, st: os.stat_result, how: int
    ) -> None:
        """Make a file, opened with the flags ``how``, share the blocks of the live one."""
        when = time.clock_gettime_ns(time.CLOCK_REALTIME)
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        from_fd = os.open(name, os.O_RDONLY | flags, dir_fd=source)
        try:
            to_fd = os.open(name, os.O_WRONLY | flags | how, 0o600, dir_fd=target)
            try:
                syscalls.clone_file(to_fd, from_fd)
            finally:
                os.close(to_fd)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY):
                raise OSError(
                    errno.EOPNOTSUPP, "the upper layer's filesystem has no reflinks"
                ) from error
            raise
        finally:
            os.close(from_fd)
        self.seen[path] = _Seen(st.st_ino, st.st_ctime_ns, st.st_mtime_ns, st.st_size, when)

    def unmoved(self, path: bytes) -> bool:
        """Whether a live file is still what it was when it was cloned."""
        seen = self.seen.get(path)
        if seen is None:
            return False
        tree, _, below = path.partition(b"/")
        folder, _, name = below.rpartition(b"/")
        try:
            with opened_beneath(self._live[tree], folder) as fd:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        now = (st.st_ino, st.st_ctime_ns, st.st_mtime_ns, st.st_size)
        before = (seen.ino, seen.ctime_ns, seen.mtime_ns, seen.size)
        return now == before and st.st_ctime_ns < seen.when_ns - _SLACK_NS

    # -- changes ------------------------------------------------------------------------

    def apply(self, paths: dict[bytes, bool]) -> None:
        """Make these paths (which begin with the tree's name) as they are live."""
        self._inodes.clear()
        self._fresh.clear()
        folders: set[bytes] = set()
        for path in sorted(paths, key=lambda each: each.count(b"/")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._apply_one(path, paths[path], folders)
        for path in sorted(folders, key=lambda each: -each.count(b"/")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._folder_metadata(path)

    def refresh(self, paths: dict[bytes, bool]) -> None:
        """Likewise, but for those that are still what they were when they were cloned."""
        self.apply({path: deep for path, deep in paths.items() if deep or not self.unmoved(path)})

    def _apply_one(self, path: bytes, deep: bool, folders: set[bytes]) -> None:
        tree, _, below = path.partition(b"/")
        if path in self._fresh:
            return  # cloned in this round already, with a folder or for the sake of a hard link
        if not below:
            folders.add(path)
            return
        folder, _, name = below.rpartition(b"/")
        parent = join(tree, folder)
        folders.add(parent)
        with opened_beneath(self._root, parent) as target:
            try:
                source = layers.open_beneath(self._live[tree], folder)
            except (FileNotFoundError, NotADirectoryError):
                remove(target, name)
                return
            try:
                self._replace(source, target, name, path, deep, folders)
            finally:
                os.close(source)

    def _replace(
        self,
        source: int,
        target: int,
        name: bytes,
        path: bytes,
        deep: bool,
        folders: set[bytes],
    ) -> None:
        try:
            st = os.stat(name, dir_fd=source, follow_symlinks=False)
        except FileNotFoundError:
            remove(target, name)
            return
        if stat.S_ISDIR(st.st_mode):
            if not deep and _is_folder(target, name):
                folders.add(path)
                return
            remove(target, name)
            self._clone(source, target, name, path)
            return
        if self._clone_again(source, target, name, path, st):
            return
        group = self._group(path)
        remove(target, name)
        self._clone(source, target, name, path)
        for other in group:
            self._relink(other, folders)

    def _clone_again(
        self, source: int, target: int, name: bytes, path: bytes, st: os.stat_result
    ) -> bool:
        """Clone a file onto its own clone, if that is there: only extents that changed cost time.

        A database's file is in tens of thousands of pieces soon after a snapshot, and cloning
        them all takes a tenth of a second.
        """
        seen = self.seen.get(path)
        if seen is None or seen.ino != st.st_ino or st.st_nlink != 1:
            return False
        with contextlib.suppress(FileNotFoundError):
            made = os.stat(name, dir_fd=target, follow_symlinks=False)
            if not stat.S_ISREG(made.st_mode) or made.st_nlink != 1:
                return False
            shorter = made.st_size > st.st_size  # cloning does not cut off the rest
            self._share(source, target, name, path, st, os.O_TRUNC if shorter else 0)
            self.cloned += 1
            _copy_metadata(source, name, target, name, st)
            return True
        return False

    def _group(self, path: bytes) -> list[bytes]:
        """Other names in the snapshot of the inode at a path, if it has several."""
        ino = self._inode_at.pop(path, None)
        if ino is None:
            return []
        names = self._names.get(ino, [])
        if path in names:
            names.remove(path)
        return list(names)

    def _relink(self, other: bytes, folders: set[bytes]) -> None:
        """Another name of an inode that was cloned anew: take over the new one if it is live."""
        tree, _, below = other.partition(b"/")
        folder, _, name = below.rpartition(b"/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with (
                opened_beneath(self._live[tree], folder) as source,
                opened_beneath(self._root, join(tree, folder)) as target,
            ):
                remove(target, name)
                self._clone(source, target, name, other)
                folders.add(join(tree, folder))

    def _folder_metadata(self, path: bytes) -> None:
        tree, _, below = path.partition(b"/")
        with (
            opened_beneath(self._live[tree], below) as source,
            opened_beneath(self._root, path) as target,
        ):
            _copy_metadata(source, b".", target, b".", os.stat(source))

    def finish(self) -> None:
        """The snapshot is whole: give it its name, durably."""
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
        os.rename(self.partial, self.target)
        parent = os.open(os.path.dirname(self.target) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _is_folder(parent: int, name: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def remove(parent: int, name: bytes) -> None:
    """Remove an entry with everything below it; does nothing when it is not there."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        with opened_beneath(parent, name) as fd:
            for each in os.listdir(layers.descriptor_path(fd)):
                remove(fd, each)
        os.rmdir(name, dir_fd=parent)


def _copy_metadata(source: int, name: bytes, target: int, new: bytes, st: os.stat_result) -> None:
    """Owner, mode, all xattrs (those of the on-disk format too) and times."""
    from_path, to_path = entry_path(source, name), entry_path(target, new)
    os.chown(to_path, st.st_uid, st.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(to_path, stat.S_IMODE(st.st_mode))
    wanted = {os.fsencode(each) for each in os.listxattr(from_path, follow_symlinks=False)}
    present = {os.fsencode(each) for each in os.listxattr(to_path, follow_symlinks=False)}
    for key in present - wanted:
        os.removexattr(to_path, key, follow_symlinks=False)
    for key in wanted:
        value = os.getxattr(from_path, key, follow_symlinks=False)
        os.setxattr(to_path, key, value, follow_symlinks=False)
    os.utime(to_path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)
