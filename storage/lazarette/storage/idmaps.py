"""Users of a container and who they are on the host.

A map is what user_namespaces(7) calls ``uid_map`` and ``gid_map``.  On disk everything
belongs to the ids a container knows; mounts and processes alone are mapped.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lazarette.storage import process, syscalls
from lazarette.storage.errors import InvalidArgument, MissingFeature

NOBODY = 65534
"""What an id is that a map does not have (``/proc/sys/kernel/overflowuid``)."""


# linux/capability.h: version 3 has the user that is root where the file's rights hold
_CAPABILITY = "security.capability"
_CAPABILITY_V2, _CAPABILITY_V3, _FLAGS = 0x02000000, 0x03000000, 0x00FFFFFF
_ACL_USER, _ACL_GROUP = 0x02, 0x08


@dataclass(frozen=True)
class IdRange:
    """``length`` ids that begin at ``inside`` in a container and at ``outside`` on the host."""

    inside: int
    outside: int
    length: int


@dataclass(frozen=True)
class IdMap:
    """Which user and group of the host each one of a container is."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]

    @cached_property
    def namespace(self) -> int:
        """Descriptor of a user namespace with this map, for mounts; kept for good.

        Raises:
            MissingFeature: the kernel makes none.
        """
        with waiting(["unshare", "--user"]) as pid:
            self.write(pid)
            return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def label(self) -> str:
        """A short name, the same for equal maps only."""
        return hashlib.sha256(repr((self.uids, self.gids)).encode()).hexdigest()[:12]

    @property
    def root(self) -> tuple[int, int]:
        """User and group of the host that a container's root is."""
        return self.to_host(0, 0)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """A container's ids on the host.

        Raises:
            InvalidArgument: the map has no such id.
        """
        found = _outside(self.uids, uid), _outside(self.gids, gid)
        if found[0] is None or found[1] is None:
            raise InvalidArgument(
                f"user {uid} or group {gid} is outside of the mapped ids",
                hint="give the remapped user a longer range in /etc/subuid and /etc/subgid",
            )
        return found[0], found[1]

    def from_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids of the host as a container sees them; nobody's where it has none."""
        return _inside(self.uids, uid), _inside(self.gids, gid)

    def xattr_to_host(self, name: str, value: bytes) -> bytes:
        """An extended attribute with the ids in it as the host's; a broken one as it is."""
        if name == _CAPABILITY and len(value) >= 20:
            kind, *sets = struct.unpack_from("<5I", value)
            return struct.pack("<6I", kind & _FLAGS | _CAPABILITY_V3, *sets, self.root[0])
        return _access_list(value, self.to_host) if _is_access_list(name, value) else value

    def xattr_from_host(self, name: str, value: bytes) -> bytes:
        """An extended attribute with the ids in it as a container sees them."""
        if name == _CAPABILITY and value[20:] == struct.pack("<I", self.root[0]):
            kind, *sets = struct.unpack_from("<5I", value)
            return struct.pack("<5I", kind & _FLAGS | _CAPABILITY_V2, *sets)
        return _access_list(value, self.from_host) if _is_access_list(name, value) else value

    def write(self, pid: int) -> None:
        """Give the map to the new user namespace of a process."""
        for kind, ranges in (("uid", self.uids), ("gid", self.gids)):
            lines = "".join(f"{r.inside} {r.outside} {r.length}\n" for r in ranges)
            Path(f"/proc/{pid}/{kind}_map").write_text(lines)


def _is_access_list(name: str, value: bytes) -> bool:
    return name.startswith("system.posix_acl_") and len(value) % 8 == 4


def _access_list(value: bytes, turned: Callable[[int, int], tuple[int, int]]) -> bytes:
    """See acl(5): a version, then tag, rights and id of each entry."""
    made = value[:4]
    for tag, rights, number in struct.iter_unpack("<HHI", value[4:]):
        if tag == _ACL_USER:
            number, _ = turned(number, 0)
        elif tag == _ACL_GROUP:
            _, number = turned(0, number)
        made += struct.pack("<HHI", tag, rights, number)
    return made


def _outside(ranges: Sequence[IdRange], wanted: int) -> int | None:
    for each in ranges:
        if each.inside <= wanted < each.inside + each.length:
            return each.outside + wanted - each.inside
    return None


def _inside(ranges: Sequence[IdRange], wanted: int) -> int:
    for each in ranges:
        if each.outside <= wanted < each.outside + each.length:
            return each.inside + wanted - each.outside
    return NOBODY


@contextmanager
def as_root(idmap: IdMap | None) -> Iterator[None]:
    """Make files as a container's root does, in this thread; never ``await`` inside."""
    if idmap is None:
        yield
        return
    with syscalls.filesystem_ids(*idmap.root):
        yield


@contextmanager
def waiting(argv: Sequence[str]) -> Iterator[int]:
    """A process in namespaces of its own, there until the block ends.

    Args:
        argv: ``unshare`` or ``nsenter`` with options; what they are to run follows.

    Yields:
        Its pid: ``/proc/PID/ns`` has the namespaces.

    Raises:
        MissingFeature: the namespaces cannot be made.
    """
    stdin, ours = os.pipe2(os.O_CLOEXEC)
    answer, stdout = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            child = process.spawn([*argv, "cat"], stdin=stdin, stdout=stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        try:
            os.write(ours, b"x")
            if os.read(answer, 1) != b"x":  # it answers once it is inside
                raise MissingFeature(
                    f"{argv[0]} makes no namespaces here",
                    hint="look at user.max_user_namespaces and user.max_net_namespaces",
                )
            yield child.pid
        finally:
            child.kill()
            child.wait()
    finally:
        os.close(ours)
        os.close(answer)
