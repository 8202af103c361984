"""Giving a restored inode its owner, mode, attributes, times and flags.

The order matters: changing the owner clears setuid bits and capabilities, setting a mode
changes an ACL's mask, anything changes the times, and an immutable inode takes nothing more.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping

import msgspec

from lazarette.backup import scan
from lazarette.backup.repository.entries import Entry, Kind

_SECOND = 1_000_000_000
_ALWAYS_HELD = range(-(1 << 31) * _SECOND, (1 << 31) * _SECOND)
_KEPT_BY_KERNEL = {b"security.selinux", b"security.ima", b"security.evm"}


class OwnerMap(msgspec.Struct, frozen=True):
    """Other owners for restored inodes.

    Attributes:
        uids: new uid by recorded uid; others stay.
        gids: new gid by recorded gid; others stay.
        keep: False leaves every inode to whoever restores it.
    """

    uids: Mapping[int, int] = {}
    gids: Mapping[int, int] = {}
    keep: bool = True

    def of(self, entry: Entry) -> tuple[int, int]:
        """Owner and group for an entry."""
        return self.uids.get(entry.uid, entry.uid), self.gids.get(entry.gid, entry.gid)


class Metadata:
    """Sets metadata as recorded; what the filesystem refuses becomes a warning.

    Args:
        owners: other owners.
        exact: take away extended attributes that were not recorded.
        warn: called with a path and what was refused.
    """

    def __init__(self, owners: OwnerMap, exact: bool, warn: Callable[[bytes, str], None]) -> None:
        self._owners = owners
        self._exact = exact
        self._warn = warn
        self._root = os.geteuid() == 0

    def plain(self, entry: Entry) -> bool:
        """Whether owner, mode and a time every filesystem can hold are all there is to set."""
        return not self._exact and entry.extra is None and entry.mtime_ns in _ALWAYS_HELD

    def owner(self, entry: Entry) -> tuple[int, int]:
        """Owner and group an entry gets; -1 leaves them."""
        return self._owners.of(entry) if self._owners.keep else (-1, -1)

    def prepare(self, descriptor: int, entry: Entry, path: bytes) -> None:
        """Set what only an empty file takes: no copy-on-write, compression."""
        wanted = 0 if entry.extra is None else entry.extra.flags & scan.EMPTY_FLAGS
        if wanted:
            self._flags(descriptor, wanted, scan.EMPTY_FLAGS, path)

    def set_open(self, descriptor: int, entry: Entry, path: bytes) -> None:
        """Set all of a file's or directory's metadata, given it open."""
        self._own(descriptor, entry, path)
        try:
            os.fchmod(descriptor, entry.mode)
        except OSError as failed:
            self._warn(path, f"mode {entry.mode:o} was refused: {failed.strerror}")
        extra = entry.extra
        if extra is not None or self._exact:
            self._attributes(descriptor, entry, path)
        early = 0 if extra is None else extra.flags & scan.PLAIN_FLAGS
        if early or self._exact:
            self._flags(descriptor, early, scan.PLAIN_FLAGS, path)
        if entry.kind == Kind.DIRECTORY:
            self.prepare(descriptor, entry, path)
        self._times(descriptor, entry, path)
        if extra is not None and extra.flags & scan.LATE_FLAGS:
            self._flags(descriptor, extra.flags, scan.LATE_FLAGS, path)

    def set_named(self, directory: int, entry: Entry, path: bytes) -> None:
        """Set metadata of an inode that is not opened: symlink, FIFO, socket, device."""
        name = entry.name
        if self._owners.keep:
            uid, gid = self._owners.of(entry)
            try:
                os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
            except OSError as failed:
                self._refuse_owner(path, failed)
        if entry.kind != Kind.SYMLINK:
            os.chmod(scan.beside(directory, name), entry.mode)
        if entry.extra is not None or self._exact:
            self._attributes(scan.beside(directory, name), entry, path)
        mtime = entry.mtime
        try:
            os.utime(name, ns=(mtime, mtime), dir_fd=directory, follow_symlinks=False)
        except (OSError, OverflowError) as failed:
            self._warn(path, f"time was refused: {failed}")

    def _own(self, descriptor: int, entry: Entry, path: bytes) -> None:
        if self._owners.keep:
            uid, gid = self._owners.of(entry)
            try:
                os.fchown(descriptor, uid, gid)
            except OSError as failed:
                self._refuse_owner(path, failed)

    def _refuse_owner(self, path: bytes, failed: OSError) -> None:
        if failed.errno != errno.EPERM or self._root:
            self._warn(path, f"owner was refused: {failed.strerror}")
            return
        self._owners = OwnerMap(keep=False)
        self._warn(b"", "owners are not restored: that needs root")

    def _attributes(self, target: int | bytes, entry: Entry, path: bytes) -> None:
        wanted = {} if entry.extra is None else entry.extra.xattrs
        follow = isinstance(target, int)
        present = scan.xattrs(target) if self._exact else {}
        for name in present.keys() - wanted.keys() - _KEPT_BY_KERNEL:
            try:
                os.removexattr(target, name, follow_symlinks=follow)
            except OSError as failed:
                self._warn(path, f"attribute {_shown(name)} stays: {failed.strerror}")
        for name, value in wanted.items():
            if present.get(name) == value:
                continue
            try:
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as failed:
                code = errno.errorcode.get(failed.errno or 0, "")
                self._warn(
                    path, f"attribute {_shown(name)} was refused: {failed.strerror} ({code})"
                )

    def _flags(self, descriptor: int, wanted: int, among: int, path: bytes) -> None:
        try:
            scan.set_flags(descriptor, wanted, among)
        except OSError as failed:
            if wanted:
                self._warn(path, f"inode flags {wanted:#x} were refused: {failed.strerror}")

    def _times(self, descriptor: int, entry: Entry, path: bytes) -> None:
        mtime = entry.mtime
        try:
            os.utime(descriptor, ns=(mtime, mtime))
        except (OSError, OverflowError) as failed:
            self._warn(path, f"time was refused: {failed}")
            return
        if mtime not in _ALWAYS_HELD and os.fstat(descriptor).st_mtime_ns != mtime:
            self._warn(path, f"the filesystem cannot hold the time {mtime // _SECOND} s")


def loosen(descriptor: int) -> None:
    """Take immutable and append-only away from something that is to be written."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode) or stat.S_ISDIR(os.fstat(descriptor).st_mode):
        try:
            scan.set_flags(descriptor, 0, scan.LATE_FLAGS)
        except OSError:
            return


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
