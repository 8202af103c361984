"""Putting files where COPY and ADD say, inside a root filesystem.

- Missing folders of the destination are made 0755 with the owner of ``--chown``.
- A source folder gives its contents, not its own owner and mode: a destination that is
  new is a missing folder like those above it, with the source's time.  One that was there
  keeps its owner and mode; folders further down take those of the source.
- A file replaces a file or a link; file over folder and folder over file are errors.
- Hard links within one source stay hard links; xattrs and times go along.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import BinaryIO

from lazarette.runtime.builds.chmod import ModeChange
from lazarette.runtime.builds.errors import StepFailed
from lazarette.runtime.builds.sources import Item, Selected, SourceTree, opened_file
from lazarette.runtime.builds.tree import Tree
from lazarette.storage import copying
from lazarette.storage.layers.apply import LayerReader


@dataclass(frozen=True)
class Attributes:
    """What copies get instead of what their source has.

    Attributes:
        owner: uid and gid of ``--chown``; None keeps the source's.
        mode: ``--chmod``; None keeps the source's.
        replace_links: a link in place of the destination is replaced, not followed (``--link``).
    """

    owner: tuple[int, int] | None = None
    mode: ModeChange | None = None
    replace_links: bool = False

    @property
    def new_owner(self) -> tuple[int, int]:
        """Owner of folders made on the way."""
        return self.owner or (0, 0)


@dataclass
class Copier:
    """Copies into one root filesystem.

    Attributes:
        root: where to.
        attributes: of the copies.
    """

    root: Tree
    attributes: Attributes
    _times: list[tuple[bytes, os.stat_result]] = field(default_factory=list)

    def place(self, chosen: Selected, target: bytes, *, into: bool, parents: bool) -> None:
        """Copy one selected source.

        Args:
            chosen: what.
            target: absolute destination.
            into: the destination is a folder even if it does not exist.
            parents: keep the folders of the source's path below the destination.
        """
        into = into or parents
        if chosen.is_folder and not parents:
            self._folder(chosen, target)
        elif chosen.is_folder:
            self._folder(chosen, target.rstrip(b"/") + b"/" + chosen.shown)
        else:
            if into or self.root.is_folder(target):
                target = target.rstrip(b"/") + b"/" + chosen.shown
            self._file(chosen, target)
        self._set_times()

    def write(self, target: bytes, name: str, content: bytes, *, into: bool, mtime_ns: int) -> None:
        """Write a heredoc's file, mode 0644."""
        if into or self.root.is_folder(target):
            target = target.rstrip(b"/") + b"/" + os.fsencode(name)
        self._above(target)
        owner = self.attributes.new_owner
        mode = 0o644
        if self.attributes.mode is not None:
            mode = self.attributes.mode.apply(mode, folder=False)
        with self.root.parent(self._destination(target)) as (folder, last):
            self._clear(folder, last)
            made = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            with open(made, "wb") as file:
                file.write(content)
            copying.set_metadata(
                folder, last, uid=owner[0], gid=owner[1], mode=mode, mtime_ns=mtime_ns, xattrs={}
            )

    def unpack(self, tar: BinaryIO, target: bytes) -> None:
        """Extract an archive into the destination folder, as ``tar -x`` does."""
        self.root.make_folders(target, owner=self.attributes.new_owner)
        with self.root.folder(target) as folder:
            LayerReader(folder, None).apply(tar)

    def _above(self, path: bytes) -> None:
        above = os.path.dirname(path.rstrip(b"/"))
        try:
            self.root.make_folders(above, owner=self.attributes.new_owner)
        except NotADirectoryError as refused:
            raise StepFailed(f"cannot copy to non-directory: {os.fsdecode(above)}") from refused

    def _destination(self, path: bytes) -> bytes:
        """The file an existing link at the destination points to, or the path itself."""
        if self.attributes.replace_links:
            return path
        status = self.root.status(path)
        if status is None or not stat.S_ISLNK(status.st_mode):
            return path
        try:
            return self.root.real(path)
        except OSError:
            return path

    def _file(self, chosen: Selected, target: bytes) -> None:
        self._above(target)
        target = self._destination(target)
        for item in chosen.items():
            with self.root.parent(target) as (folder, name):
                self._entry(chosen.source, item, folder, name)

    def _folder(self, chosen: Selected, target: bytes) -> None:
        linked: dict[tuple[int, int], bytes] = {}
        top = self._top(chosen, target)
        for item in chosen.items():
            if item.path == b"":
                continue
            own = top + b"/" + item.path if top else item.path
            with self.root.parent(own) as (folder, name):
                if item.is_folder:
                    self._subfolder(chosen.source, item, own, folder, name)
                    continue
                key = (item.status.st_dev, item.status.st_ino)
                if item.status.st_nlink > 1 and (first := linked.setdefault(key, own)) != own:
                    self._clear(folder, name)
                    with self.root.parent(first) as (holder, original):
                        os.link(
                            original,
                            name,
                            src_dir_fd=holder,
                            dst_dir_fd=folder,
                            follow_symlinks=False,
                        )
                    continue
                self._entry(chosen.source, item, folder, name)

    def _top(self, chosen: Selected, target: bytes) -> bytes:
        """The destination folder itself."""
        try:
            made = self.root.make_folders(target, owner=self.attributes.new_owner)
        except NotADirectoryError as refused:
            raise StepFailed(f"cannot copy to non-directory: {os.fsdecode(target)}") from refused
        top = self.root.real(target)
        if top in made:
            self._times.append((top, chosen.status))
        return top

    def _subfolder(
        self, source: SourceTree, item: Item, own: bytes, folder: int, name: bytes
    ) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            if not self.root.is_folder(own):
                raise StepFailed(f"cannot copy to non-directory: /{os.fsdecode(own)}") from None
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                return
        owner = self.attributes.owner or source.owner(item.status)
        xattrs = copying.read_xattrs(item.parent, item.name)
        self._dress(folder, name, item.status, owner, xattrs)
        self._times.append((own, item.status))

    def _entry(self, source: SourceTree, item: Item, folder: int, name: bytes) -> None:
        self._clear(folder, name)
        kind = stat.S_IFMT(item.status.st_mode)
        if kind == stat.S_IFSOCK:
            return
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(item.name, dir_fd=item.parent), name, dir_fd=folder)
        elif kind == stat.S_IFREG:
            with opened_file(item) as reading:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                writing = os.open(name, flags, 0o600, dir_fd=folder)
                try:
                    copying.copy_content(reading, writing, item.status.st_size)
                finally:
                    os.close(writing)
        else:
            os.mknod(name, kind | 0o600, item.status.st_rdev, dir_fd=folder)
        owner = self.attributes.owner or source.owner(item.status)
        xattrs = copying.read_xattrs(item.parent, item.name)
        self._dress(folder, name, item.status, owner, xattrs)

    def _dress(
        self,
        folder: int,
        name: bytes,
        status: os.stat_result,
        owner: tuple[int, int],
        xattrs: dict[str, bytes],
    ) -> None:
        is_folder = stat.S_ISDIR(status.st_mode)
        mode = status.st_mode
        if self.attributes.mode is not None and not stat.S_ISLNK(mode):
            mode = stat.S_IFMT(mode) | self.attributes.mode.apply(mode, folder=is_folder)
        copying.set_metadata(
            folder,
            name,
            uid=owner[0],
            gid=owner[1],
            mode=mode,
            mtime_ns=status.st_mtime_ns,
            xattrs=xattrs,
        )

    @staticmethod
    def _clear(folder: int, name: bytes) -> None:
        """Make way for an entry; a folder is not replaced by a file."""
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError as refused:
            if refused.errno in (errno.EISDIR, errno.EPERM):
                raise StepFailed(
                    f"cannot copy a file over the folder {os.fsdecode(name)}"
                ) from refused
            raise

    def _set_times(self) -> None:
        """Folders last, deepest first: filling one changes its time."""
        for path, status in reversed(self._times):
            if path == b"":
                continue
            with self.root.parent(path) as (folder, name):
                times = (status.st_atime_ns, status.st_mtime_ns)
                os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
        self._times.clear()
