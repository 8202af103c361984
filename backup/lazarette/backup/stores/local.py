"""A store in a folder: a local disk, a USB disk, an NFS or CIFS mount.

An object is a file under the folder.  It is written to ``TMP/`` (capitals: no object can
have that name), synced, and given its name by ``rename`` or, for ``if_absent``, by
``link``, which the kernel refuses when the name exists.  Changes of a name hold a lock on
the file ``LOCK``: shared for put and delete, exclusive for ``replace``, whose compare and
rename must be one step (S3).

A tag is made of inode, size and modification time.  The kernel's timestamps move in
ticks of milliseconds and freed inode numbers are used again at once, so the lowest 20 bits
of the time are random: an object replaced twice within a tick still changes its tag.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lazarette.backup.stores import direct
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobInfo,
    BlobNotFound,
    Buffer,
    ShortBlob,
    StoreCapabilities,
    StoreUnavailable,
    TagMismatch,
    WrongStore,
    check_name,
    is_name,
)
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import Forbidden, InternalError, LazaretteError, NoSpace

_TEMPORARY = "TMP"
_LOCK = "LOCK"
_JITTER = 1 << 20
_ABANDONED = 24 * 3600 * NANOSECONDS
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_AWAY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN}


class LocalStore:
    """Objects as files under ``folder``, which must exist.

    The folder is held open: if it is moved or another filesystem is mounted over it, this
    object still means the one it was opened on.

    Raises:
        WrongStore: the folder does not exist.
    """

    def __init__(self, folder: str) -> None:
        self._folder = os.path.abspath(folder)
        try:
            self._root = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as gone:
            raise WrongStore(
                f"store folder {self._folder} does not exist",
                hint="check that its disk is mounted, or make it with laz repo init",
            ) from gone
        except OSError as failed:
            raise translate(failed, "open", self._folder) from failed
        self._swept = False

    @property
    def url(self) -> str:
        """See :attr:`BlobStore.url`."""
        return f"file://{self._folder}"

    @property
    def capabilities(self) -> StoreCapabilities:
        """See :attr:`BlobStore.capabilities`."""
        return StoreCapabilities(conditional=True)

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        check_name(name)
        with self._errors("write", name):
            temporary, tag = self._write(data)
            try:
                self._parents(name)
                with self._locked(fcntl.LOCK_SH):
                    if if_absent:
                        self._link(temporary, name)
                    else:
                        os.rename(temporary, name, src_dir_fd=self._root, dst_dir_fd=self._root)
                        temporary = ""
                self._sync_folder(name)
            finally:
                if temporary:
                    os.unlink(temporary, dir_fd=self._root)
        return tag

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        check_name(name)
        with self._errors("replace", name):
            temporary, new_tag = self._write(data)
            try:
                with self._locked(fcntl.LOCK_EX):
                    if self._tag(name) != tag:
                        raise TagMismatch(f"object {name} in {self.url} changed meanwhile")
                    os.rename(temporary, name, src_dir_fd=self._root, dst_dir_fd=self._root)
                    temporary = ""
                self._sync_folder(name)
            finally:
                if temporary:
                    os.unlink(temporary, dir_fd=self._root)
        return new_tag

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        check_name(name)
        with self._errors("read", name):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=self._root)
            try:
                size = os.fstat(file).st_size
                wanted = max(size - offset, 0) if length is None else length
                if offset > size or offset + wanted > size:
                    raise ShortBlob(
                        f"object {name} in {self.url} has {size} bytes,"
                        f" {offset}+{wanted} were asked for"
                    )
                return _read_exactly(file, offset, wanted, name)
            finally:
                os.close(file)

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        check_name(name)
        with self._errors("look up", name):
            found = os.stat(name, dir_fd=self._root, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise BlobNotFound(f"no object {name} in {self.url}")
        return _info(name, found)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`."""
        start = prefix.rpartition("/")[0]
        if start and not is_name(start):
            return
        yield from self._walk(start, prefix)

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        check_name(name)
        with self._errors("delete", name):
            try:
                with self._locked(fcntl.LOCK_SH):
                    os.unlink(name, dir_fd=self._root)
            except (FileNotFoundError, NotADirectoryError):
                return
            self._sync_folder(name)

    def close(self) -> None:
        """See :meth:`BlobStore.close`."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _write(self, data: Buffer) -> tuple[str, str]:
        """A synced temporary file with ``data``: its name beneath the root, and its tag."""
        temporary = f"{_TEMPORARY}/{os.urandom(12).hex()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            file = os.open(temporary, flags, 0o600, dir_fd=self._root)
        except FileNotFoundError:
            with _existing_is_fine():
                os.mkdir(_TEMPORARY, 0o700, dir_fd=self._root)
            file = os.open(temporary, flags, 0o600, dir_fd=self._root)
        try:
            direct.write(file, data)
            written = os.fstat(file)
            changed = written.st_mtime_ns - written.st_mtime_ns % _JITTER
            changed += int.from_bytes(os.urandom(8)) % _JITTER
            os.utime(file, ns=(written.st_atime_ns, changed))
            os.fsync(file)
            if not self._swept:
                self._swept = True
                self._sweep(written.st_mtime_ns)
            return temporary, _tag(os.fstat(file))
        except BaseException:
            os.unlink(temporary, dir_fd=self._root)
            raise
        finally:
            os.close(file)

    def _tag(self, name: str) -> str:
        """The object's tag, or nothing when there is no such object."""
        try:
            return self.stat(name).tag
        except BlobNotFound:
            return ""

    def _sweep(self, now_ns: int) -> None:
        """Remove what writers killed a day ago left; ages are by the filesystem's own clock."""
        folder = os.open(_TEMPORARY, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        try:
            for name in os.listdir(folder):
                try:
                    age = now_ns - os.stat(name, dir_fd=folder).st_mtime_ns
                    if age > _ABANDONED:
                        os.unlink(name, dir_fd=folder)
                except FileNotFoundError:
                    continue
        finally:
            os.close(folder)

    def _link(self, temporary: str, name: str) -> None:
        try:
            os.link(temporary, name, src_dir_fd=self._root, dst_dir_fd=self._root)
        except FileExistsError as there:
            raise AlreadyThere(f"object {name} exists in {self.url}") from there

    def _parents(self, name: str) -> None:
        """Make the folders of an object, each durable before what is put into it."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            try:
                os.mkdir(folder, 0o700, dir_fd=self._root)
            except FileExistsError:
                continue
            self._sync_folder(folder)

    def _sync_folder(self, name: str) -> None:
        folder = name.rpartition("/")[0] or "."
        try:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        except FileNotFoundError:
            return
        try:
            os.fsync(directory)
        except OSError as failed:
            if failed.errno != errno.EINVAL:  # CIFS has nothing to sync in a folder
                raise
        finally:
            os.close(directory)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        lock = os.open(_LOCK, flags, 0o600, dir_fd=self._root)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)

    def _walk(self, folder: str, prefix: str) -> Iterator[BlobInfo]:
        for name, is_folder in self._entries(folder):
            if is_folder:
                if (name + "/").startswith(prefix) or prefix.startswith(name + "/"):
                    yield from self._walk(name, prefix)
            elif name.startswith(prefix):
                try:
                    yield self.stat(name)
                except BlobNotFound:
                    continue

    def _entries(self, folder: str) -> Sequence[tuple[str, bool]]:
        """Objects and folders of a folder, in the order their objects' names have."""
        before = folder + "/" if folder else ""
        found = []
        try:
            directory = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as failed:
            raise translate(failed, "list", f"{folder or '/'} in {self.url}") from failed
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if is_name(before + entry.name):
                        found.append((before + entry.name, entry.is_dir(follow_symlinks=False)))
        except OSError as failed:
            raise translate(failed, "list", f"{folder or '/'} in {self.url}") from failed
        finally:
            os.close(directory)
        found.sort(key=lambda item: item[0] + "/" if item[1] else item[0])
        return found

    @contextmanager
    def _errors(self, operation: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as gone:
            if os.fstat(self._root).st_nlink == 0:
                raise WrongStore(f"store folder {self._folder} was removed") from gone
            raise BlobNotFound(f"no object {name} in {self.url}") from gone
        except OSError as failed:
            raise translate(failed, operation, f"{name} in {self.url}") from failed


def _info(name: str, found: os.stat_result) -> BlobInfo:
    return BlobInfo(name, found.st_size, _tag(found), found.st_mtime_ns)


def _tag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"


def _read_exactly(file: int, offset: int, length: int, name: str) -> bytes:
    data = os.pread(file, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    have = len(data)
    while have < length:
        part = os.pread(file, length - have, offset + have)
        if not part:
            raise ShortBlob(f"object {name} became shorter while it was read")
        parts.append(part)
        have += len(part)
    return b"".join(parts)


@contextmanager
def _existing_is_fine() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        pass


def translate(failed: OSError, operation: str, what: str) -> LazaretteError:
    """The error of the contract (S8) that an errno stands for."""
    reason = f"cannot {operation} {what}: {os.strerror(failed.errno or 0).lower()}"
    if failed.errno in _FULL:
        return NoSpace(reason, hint="free space there, then run it again: it resumes")
    if failed.errno in _REFUSED:
        return Forbidden(reason, hint="check the owner and mode of the folder")
    if failed.errno in _AWAY:
        return StoreUnavailable(reason, hint="check the disk or the network mount")
    return InternalError(reason)
