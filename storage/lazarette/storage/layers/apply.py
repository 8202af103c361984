"""Reading an OCI layer tar into a folder, however hostile the tar is.

Names are resolved one part at a time by descriptor, never by path: ``..`` and links
cannot lead out of the layer (L9).  How a whiteout is kept is the driver's:
:class:`Whiteouts` has the overlay form (a character device 0:0, an xattr) and the direct
form (what is hidden is deleted from a tree that has the parent's files in it).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import IO, BinaryIO, Protocol, cast

from lazarette.storage import beneath, copying
from lazarette.storage.errors import InvalidArgument, NoSpace
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.contract import Applied
from lazarette.storage.layers.tar import XATTR, parse_time, raw

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_LINKS = 40
_BLOCK = 1 << 20
_ZEROS = bytes(4096)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


Own = Mapping[bytes, AbstractSet[bytes]]


class Whiteouts(Protocol):
    """How a layer keeps "this is not there any more"."""

    def hide(self, folder: int, name: bytes) -> None:
        """Hide an entry of the layers below; nothing of this layer has that name."""
        ...

    def opaque(self, folder: int, path: bytes, own: Own) -> None:
        """Hide every entry below a folder that is not this layer's own.

        Args:
            folder: descriptor of the folder.
            path: its path in the layer.
            own: names this layer has so far, by the path of their folder.
        """
        ...

    def hidden(self, folder: int, name: bytes) -> bool:
        """Whether an entry is a whiteout itself."""
        ...


class DirectWhiteouts:
    """For trees that hold the parent's files: what is hidden is deleted."""

    def hide(self, folder: int, name: bytes) -> None:
        """See :meth:`Whiteouts.hide`."""
        beneath.remove_tree(folder, name)

    def opaque(self, folder: int, path: bytes, own: Own) -> None:
        """See :meth:`Whiteouts.opaque`."""
        kept = own.get(path, set())
        for name in beneath.names(folder):
            if name not in kept:
                beneath.remove_tree(folder, name)
                continue
            inner = _open_or_none(folder, name)
            if inner is not None:
                try:
                    self.opaque(inner, path + b"/" + name if path else name, own)
                finally:
                    os.close(inner)

    def hidden(self, folder: int, name: bytes) -> bool:
        """See :meth:`Whiteouts.hidden`: none is kept."""
        return False


class _Hashed(io.RawIOBase):
    """A stream that hashes and counts what is read through it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data

    def drain(self) -> None:
        while self.read(_BLOCK):
            pass


class LayerReader:
    """Applies one tar to one folder.

    Args:
        root: descriptor of the folder.
        whiteouts: how to keep whiteouts; None takes ``.wh.`` names as they are, for plain
            archives of a tree.
        below: gives a descriptor of the merged tree of the layers below, where ``root``
            holds only this layer's own files: missing parents take their metadata, links
            and hard-link sources from it.  Called once, and only if it is needed.
        idmap: the folder is seen with the host's owners; the tar has the container's.
    """

    def __init__(
        self,
        root: int,
        whiteouts: Whiteouts | None,
        below: Callable[[], int | None] = lambda: None,
        idmap: IdMap | None = None,
    ) -> None:
        self._idmap = idmap
        self._root = root
        self._whiteouts = whiteouts
        self._below = functools.cache(below)
        self._own: dict[bytes, set[bytes]] = {}
        self._opaque: set[bytes] = set()
        self._folder_times: dict[bytes, int] = {}
        self._size = 0

    def apply(self, stream: BinaryIO) -> Applied:
        """Read the whole tar.

        Raises:
            InvalidArgument: it is hostile or broken.
            NoSpace: the disk is full.
        """
        hashed = _Hashed(stream)
        try:
            with tarfile.open(
                fileobj=hashed, mode="r|", encoding="utf-8", errors="surrogateescape"
            ) as tar:
                for member in tar:
                    self._member(tar, member)
                    # tarfile keeps every header it read otherwise
                    tar.members = []  # type: ignore[attr-defined]
            hashed.drain()
            self._set_folder_times()
        except tarfile.ReadError as bad:
            if str(bad) == "empty file":
                return Applied(0, f"sha256:{hashed.digest.hexdigest()}")
            raise InvalidArgument(f"applying a layer: the tar is broken: {bad}") from bad
        except (tarfile.TarError, EOFError, UnicodeError, ValueError) as bad:
            raise InvalidArgument(f"applying a layer: the tar is broken: {bad}") from bad
        except OSError as refused:
            if refused.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace("applying a layer: no space left") from refused
            raise
        return Applied(self._size, f"sha256:{hashed.digest.hexdigest()}")

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(raw(member.name))
        if not parts:
            if member.isdir():
                self._metadata(self._root, b".", member)
                self._folder_times[b""] = _mtime(member)
            return
        folder, path = self._parent(parts)
        name = parts[-1]
        try:
            if self._whiteouts is not None and name.startswith(WHITEOUT):
                self._whiteout(folder, path, name)
                return
            self._place(tar, member, folder, path, name)
        finally:
            os.close(folder)
        self._own.setdefault(path, set()).add(name)

    # ---- whiteouts

    def _whiteout(self, folder: int, path: bytes, name: bytes) -> None:
        assert self._whiteouts is not None
        own = self._own.get(path, set())
        if name == OPAQUE:
            self._whiteouts.opaque(folder, path, self._own)
            self._opaque.add(path)
            return
        hidden = name[len(WHITEOUT) :]
        if not hidden or hidden.startswith(WHITEOUT) or hidden in (b".", b".."):
            raise InvalidArgument(f"applying a layer: {_shown(path, name)} is no valid whiteout")
        if hidden in own:
            # made earlier in this same tar: only what is below it is hidden
            inner = _open_or_none(folder, hidden)
            if inner is not None:
                below = path + b"/" + hidden if path else hidden
                try:
                    self._whiteouts.opaque(inner, below, self._own)
                    self._opaque.add(below)
                finally:
                    os.close(inner)
            return
        self._whiteouts.hide(folder, hidden)

    # ---- finding the parent

    def _parent(self, parts: list[bytes]) -> tuple[int, bytes]:
        """The folder an entry goes into, made where missing, and its path in the layer."""
        waiting = parts[:-1]
        done: list[bytes] = []
        folders = [os.dup(self._root)]
        links = 0
        try:
            while waiting:
                part, *waiting = waiting
                if part == b"..":
                    if done:
                        done.pop()
                        os.close(folders.pop())
                    continue
                link = self._link(folders[-1], done, part)
                if link is not None:
                    links += 1
                    if links > _LINKS:
                        raise InvalidArgument(
                            f"applying a layer: too many links in {_shown(b'/'.join(parts))}"
                        )
                    if link.startswith(b"/"):
                        while done:
                            done.pop()
                            os.close(folders.pop())
                    waiting = [p for p in link.split(b"/") if p not in (b"", b".")] + waiting
                    continue
                self._own.setdefault(b"/".join(done), set()).add(part)
                folders.append(self._enter(folders[-1], done, part))
                done.append(part)
            return os.dup(folders[-1]), b"/".join(done)
        finally:
            for folder in folders:
                os.close(folder)

    def _link(self, folder: int, done: list[bytes], part: bytes) -> bytes | None:
        """Where a parent that is a link leads, here or below."""
        try:
            mode = os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode
            return os.readlink(part, dir_fd=folder) if stat.S_ISLNK(mode) else None
        except FileNotFoundError:
            pass
        found = self._beneath([*done, part])
        if found is None:
            return None
        holder, status = found
        try:
            return os.readlink(part, dir_fd=holder) if stat.S_ISLNK(status.st_mode) else None
        finally:
            os.close(holder)

    def _beneath(self, parts: list[bytes]) -> tuple[int, os.stat_result] | None:
        """An entry of the layers below, unless this layer hides it: its folder and status."""
        below = None if self._hides(parts) else self._below()
        if below is None:
            return None
        try:
            holder, name = beneath.open_parent(below, b"/".join(parts))
        except OSError as missing:
            if missing.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        try:
            return holder, os.stat(name, dir_fd=holder, follow_symlinks=False)
        except FileNotFoundError:
            os.close(holder)
            return None

    def _hides(self, parts: list[bytes]) -> bool:
        return any(b"/".join(parts[:depth]) in self._opaque for depth in range(len(parts)))

    def _enter(self, folder: int, done: list[bytes], part: bytes) -> int:
        """Open a parent folder, making it if it is missing in this layer."""
        try:
            return os.open(part, _DIRECTORY, dir_fd=folder)
        except FileNotFoundError:
            os.mkdir(part, 0o755, dir_fd=folder)
        except NotADirectoryError:
            replaced_whiteout = self._whiteouts is not None and self._whiteouts.hidden(folder, part)
            os.unlink(part, dir_fd=folder)
            os.mkdir(part, 0o755, dir_fd=folder)
            made = os.open(part, _DIRECTORY, dir_fd=folder)
            if replaced_whiteout and self._whiteouts is not None:
                own = b"/".join([*done, part])
                self._whiteouts.opaque(made, own, self._own)
                self._opaque.add(own)
            return made
        made = os.open(part, _DIRECTORY, dir_fd=folder)
        found = self._beneath([*done, part])
        if found is not None:
            holder, status = found
            try:
                copying.copy_metadata(holder, part, status, made, b".")
                self._folder_times[b"/".join([*done, part])] = status.st_mtime_ns
            finally:
                os.close(holder)
        return made

    # ---- entries

    def _place(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: int, path: bytes, name: bytes
    ) -> None:
        own = path + b"/" + name if path else name
        was_hidden = self._whiteouts is not None and self._whiteouts.hidden(folder, name)
        if member.isdir():
            self._place_folder(member, folder, own, name, was_hidden)
            return
        beneath.remove_tree(folder, name)
        if member.islnk():
            self._hard_link(member, folder, name)
            return
        if member.issym():
            os.symlink(raw(member.linkname), name, dir_fd=folder)
        elif member.isreg():
            self._content(tar, member, folder, name)
        elif member.ischr() or member.isblk() or member.isfifo():
            kind = (
                stat.S_IFIFO
                if member.isfifo()
                else stat.S_IFCHR
                if member.ischr()
                else stat.S_IFBLK
            )
            device = os.makedev(member.devmajor, member.devminor)
            if kind == stat.S_IFCHR and device == 0 and self._whiteouts is not None:
                raise InvalidArgument(
                    f"applying a layer: {_shown(own)} is a device 0:0, which only a driver may make"
                )
            os.mknod(name, kind | 0o600, device, dir_fd=folder)
        else:
            raise InvalidArgument(
                f"applying a layer: {_shown(own)} has the unknown type {member.type!r}"
            )
        self._metadata(folder, name, member)

    def _place_folder(
        self, member: tarfile.TarInfo, folder: int, own: bytes, name: bytes, was_hidden: bool
    ) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                os.mkdir(name, 0o700, dir_fd=folder)
        if was_hidden and self._whiteouts is not None:
            inner = os.open(name, _DIRECTORY, dir_fd=folder)
            try:
                self._whiteouts.opaque(inner, own, self._own)
                self._opaque.add(own)
            finally:
                os.close(inner)
        self._metadata(folder, name, member)
        self._folder_times[own] = _mtime(member)

    def _hard_link(self, member: tarfile.TarInfo, folder: int, name: bytes) -> None:
        parts = _parts(raw(member.linkname))
        if not parts:
            raise InvalidArgument("applying a layer: a hard link to nothing")
        source, path = self._parent(parts)
        try:
            try:
                os.link(
                    parts[-1], name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False
                )
                return
            except FileNotFoundError:
                pass
            found = self._beneath([*path.split(b"/"), parts[-1]] if path else [parts[-1]])
            if found is None:
                raise InvalidArgument(
                    f"applying a layer: {_shown(raw(member.name))} links to the missing "
                    f"{_shown(raw(member.linkname))}"
                )
            holder, status = found
            try:
                copying.copy_entry(holder, parts[-1], status, source, parts[-1])
            finally:
                os.close(holder)
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(source)

    def _content(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: int, name: bytes
    ) -> None:
        source = cast(IO[bytes], tar.fileobj)
        descriptor = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder
        )
        with open(descriptor, "wb", buffering=0) as target:
            try:
                target.truncate(member.size)
            except OSError as refused:
                if refused.errno not in (errno.EFBIG, errno.EINVAL):
                    raise
                raise InvalidArgument(
                    f"applying a layer: {_shown(raw(member.name))} claims {member.size} bytes"
                ) from refused
            # A sparse member may claim any size: only the pieces it has are walked through.
            source.seek(member.offset_data)
            pieces = cast(list[tuple[int, int]], member.sparse or [(0, member.size)])
            for offset, length in pieces:
                self._piece(source, descriptor, member, offset, length)
        self._size += member.size

    def _piece(
        self, source: IO[bytes], descriptor: int, member: tarfile.TarInfo, offset: int, length: int
    ) -> None:
        """Copy one piece of a member's content to the same place in the file."""
        end = offset + length
        if not 0 <= offset <= end <= member.size:
            raise InvalidArgument(
                f"applying a layer: {_shown(raw(member.name))} has content outside its size"
            )
        while offset < end:
            block = source.read(min(end - offset, _BLOCK))
            if not block:
                raise InvalidArgument(f"applying a layer: {_shown(raw(member.name))} is cut off")
            write_sparse(descriptor, block, offset)
            offset += len(block)

    def _metadata(self, folder: int, name: bytes, member: tarfile.TarInfo) -> None:
        xattrs = {
            key.removeprefix(XATTR): raw(value)
            for key, value in member.pax_headers.items()
            if key.startswith(XATTR) and copying.xattr_travels(key.removeprefix(XATTR))
        }
        uid, gid = member.uid, member.gid
        if self._idmap is not None:
            uid, gid = self._idmap.to_host(uid, gid)
            xattrs = {key: self._idmap.xattr_to_host(key, xattrs[key]) for key in xattrs}
        copying.set_metadata(
            folder,
            name,
            uid=uid,
            gid=gid,
            mode=(stat.S_IFLNK if member.issym() else 0) | (member.mode & 0o7777),
            mtime_ns=_mtime(member),
            xattrs=xattrs,
        )

    def _set_folder_times(self) -> None:
        """Folders last, deepest first: filling one changes its time."""
        for path, stamp in sorted(self._folder_times.items(), reverse=True):
            try:
                folder, name = beneath.open_parent(self._root, path)
            except OSError as gone:
                if gone.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue  # replaced later in the same tar
                raise
            try:
                os.utime(name or b".", ns=(stamp, stamp), dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                continue
            finally:
                os.close(folder)


def write_sparse(descriptor: int, block: bytes, offset: int) -> None:
    """Write a block at an offset of a new file, leaving 4 KiB runs of zeros as holes."""
    view = memoryview(block)
    start = 0
    while start < len(view):
        end = start
        hole = view[start : start + 4096] == _ZEROS
        while end < len(view) and (view[end : end + 4096] == _ZEROS) == hole:
            end += 4096
        if not hole:
            run = view[start:end]
            at = offset + start
            while run:
                done = os.pwrite(descriptor, run, at)
                run, at = run[done:], at + done
        start = end


def _parts(path: bytes) -> list[bytes]:
    """The parts of a member's name; ``..`` is refused rather than guessed at."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidArgument(f"applying a layer: {_shown(path)} leads out of the layer")
    return parts


def _shown(*parts: bytes) -> str:
    return ascii(b"/".join(part for part in parts if part).decode("utf-8", "backslashreplace"))


def _mtime(member: tarfile.TarInfo) -> int:
    exact = member.pax_headers.get("mtime")
    return parse_time(exact) if exact is not None else int(member.mtime) * 1_000_000_000


def _open_or_none(folder: int, name: bytes) -> int | None:
    try:
        return os.open(name, _DIRECTORY, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
