"""The kernel's btrfs calls that volumes and layers need, with types.

Layouts and numbers are those of ``linux/btrfs.h`` and ``linux/btrfs_tree.h``.  Every
function takes a descriptor, raises ``OSError`` with the kernel's errno, and runs no
program, so a snapshot costs what the kernel needs for it and nothing more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from lazarette.storage import beneath

FIRST_FREE_OBJECTID = 256
FS_TREE_OBJECTID = 5
ROOT_TREE_OBJECTID = 1
QUOTA_TREE_OBJECTID = 8
SUPER_MAGIC = 0x9123683E

_SUBVOL_NAME_MAX = 4039
_SUBVOL_RDONLY = 1 << 1
_TREE_BUFFER = 1 << 20
_SMALL_BUFFER = 1 << 14

_IOC_WRITE, _IOC_READ = 1, 2
_U64_MAX = (1 << 64) - 1


def _code(direction: int, number: int, size: int) -> int:
    return (direction << 30) | (size << 16) | (0x94 << 8) | number


_IOC_SUBVOL_CREATE = _code(_IOC_WRITE, 14, 4096)
_IOC_SNAP_DESTROY = _code(_IOC_WRITE, 15, 4096)
_IOC_SNAP_CREATE_V2 = _code(_IOC_WRITE, 23, 4096)
_IOC_RESIZE = _code(_IOC_WRITE, 3, 4096)
_IOC_TREE_SEARCH_V2 = _code(_IOC_READ | _IOC_WRITE, 17, 112)
_IOC_INO_LOOKUP = _code(_IOC_READ | _IOC_WRITE, 18, 4096)
_IOC_SUBVOL_GETFLAGS = _code(_IOC_READ, 25, 8)
_IOC_SUBVOL_SETFLAGS = _code(_IOC_WRITE, 26, 8)
_IOC_QUOTA_CTL = _code(_IOC_READ | _IOC_WRITE, 40, 16)
_IOC_QGROUP_CREATE = _code(_IOC_WRITE, 42, 16)
_IOC_QGROUP_LIMIT = _code(_IOC_READ, 43, 48)
_IOC_GET_SUBVOL_INFO = _code(_IOC_READ, 60, 504)

_QUOTA_CTL_ENABLE = 1
_QUOTA_CTL_ENABLE_SIMPLE = 4
_QGROUP_LIMIT_MAX_RFER = 1


class Item(IntEnum):
    """Kinds of items in the trees (``BTRFS_*_KEY``)."""

    INODE_ITEM = 1
    INODE_REF = 12
    INODE_EXTREF = 13
    XATTR_ITEM = 24
    DIR_ITEM = 84
    DIR_INDEX = 96
    EXTENT_DATA = 108
    ROOT_ITEM = 132
    ROOT_BACKREF = 144
    ROOT_REF = 156
    QGROUP_INFO = 242
    QGROUP_LIMIT = 244


@dataclass(frozen=True, slots=True)
class Found:
    """An item a search found: its key, the generation of its leaf, and its bytes."""

    objectid: int
    type: int
    offset: int
    transid: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Subvolume:
    """What ``BTRFS_IOC_GET_SUBVOL_INFO`` says of a subvolume.

    Attributes:
        id: its tree.
        generation: transaction that changed it last.
        origin_generation: transaction that made it, ``otransid``.
        uuid, parent_uuid: of itself, and of what it is a snapshot of.
        read_only: it cannot be written.
    """

    id: int
    generation: int
    origin_generation: int
    uuid: bytes
    parent_uuid: bytes
    read_only: bool


def is_btrfs(descriptor: int) -> bool:
    """Whether a descriptor is on btrfs: it answers a call only btrfs knows."""
    try:
        subvolume_id(descriptor)
    except OSError:
        return False
    return True


def _name_args(name: bytes, descriptor: int = 0, flags: int = 0) -> bytearray:
    if len(name) > _SUBVOL_NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
    return bytearray(struct.pack("=qQQ32s4040s", descriptor, 0, flags, b"", name))


def _plain_args(name: bytes) -> bytearray:
    return bytearray(struct.pack("=q4088s", 0, name))


def create_subvolume(parent: int, name: bytes) -> None:
    """Make an empty subvolume in a folder."""
    fcntl.ioctl(parent, _IOC_SUBVOL_CREATE, _plain_args(name))


def snapshot_subvolume(source: int, parent: int, name: bytes, *, read_only: bool) -> None:
    """Make a snapshot of the subvolume behind ``source`` in a folder of the same filesystem."""
    flags = _SUBVOL_RDONLY if read_only else 0
    fcntl.ioctl(parent, _IOC_SNAP_CREATE_V2, _name_args(name, source, flags))


def destroy_subvolume(parent: int, name: bytes) -> None:
    """Delete a subvolume without nested ones; its space is freed in the background."""
    fcntl.ioctl(parent, _IOC_SNAP_DESTROY, _plain_args(name))


def subvolume_id(descriptor: int) -> int:
    """The tree a descriptor's file or folder is in."""
    buffer = bytearray(struct.pack("=QQ4080s", 0, FIRST_FREE_OBJECTID, b""))
    fcntl.ioctl(descriptor, _IOC_INO_LOOKUP, buffer)
    return int(struct.unpack_from("=Q", buffer)[0])


def is_subvolume(descriptor: int) -> bool:
    """Whether a folder is the root of a subvolume."""
    return os.fstat(descriptor).st_ino == FIRST_FREE_OBJECTID and is_btrfs(descriptor)


def subvolume_info(descriptor: int) -> Subvolume:
    """Describe the subvolume a descriptor is in."""
    buffer = bytearray(504)
    fcntl.ioctl(descriptor, _IOC_GET_SUBVOL_INFO, buffer)
    tree = struct.unpack_from("=Q", buffer, 0)[0]
    generation, flags = struct.unpack_from("=QQ", buffer, 280)
    uuid, parent_uuid = buffer[296:312], buffer[312:328]
    otransid = struct.unpack_from("=Q", buffer, 352)[0]
    return Subvolume(tree, generation, otransid, bytes(uuid), bytes(parent_uuid), bool(flags & 1))


def set_read_only(descriptor: int, read_only: bool) -> None:
    """Make a subvolume read-only, or writable."""
    buffer = bytearray(8)
    fcntl.ioctl(descriptor, _IOC_SUBVOL_GETFLAGS, buffer)
    flags = struct.unpack("=Q", buffer)[0]
    flags = flags | _SUBVOL_RDONLY if read_only else flags & ~_SUBVOL_RDONLY
    fcntl.ioctl(descriptor, _IOC_SUBVOL_SETFLAGS, struct.pack("=Q", flags))


def resize(descriptor: int, size: int | None, device: int = 1) -> None:
    """Set the size of a mounted btrfs on one device, bytes; None takes all there is."""
    wanted = "max" if size is None else str(size)
    fcntl.ioctl(descriptor, _IOC_RESIZE, _plain_args(f"{device}:{wanted}".encode()))


Key = tuple[int, int, int]

_LAST_KEY: Key = (_U64_MAX, 255, _U64_MAX)


def search_raw(
    descriptor: int,
    tree: int,
    low: Key,
    high: Key = _LAST_KEY,
    *,
    min_transid: int = 0,
    buffer_size: int = _TREE_BUFFER,
) -> bytes:
    """One ``BTRFS_IOC_TREE_SEARCH_V2``: as many items from ``low`` on as fit the buffer.

    Each is a header (transid, objectid, offset: u64; type, length: u32) and its bytes.

    Args:
        descriptor: anything on the filesystem.
        tree: number of the tree; 0 is the subvolume of the descriptor.
        low, high: first and last key (object, type, offset), compared as a whole.
        min_transid: leave out leaves written before that transaction.
        buffer_size: bytes; grown when a single item does not fit.
    """
    # a bytearray longer than 1024 bytes is handed to the kernel itself, not as a copy
    buffer = bytearray(112 + buffer_size)
    key = struct.pack(
        "=7Q4I4QQ",
        *(tree, low[0], high[0], low[2], high[2], min_transid, _U64_MAX),
        *(low[1], high[1], 0xFFFFFFFF, 0),
        *(0, 0, 0, 0, buffer_size),
    )
    buffer[:112] = key
    try:
        fcntl.ioctl(descriptor, _IOC_TREE_SEARCH_V2, buffer)
    except OSError as refused:
        if refused.errno != errno.EOVERFLOW:
            raise
        larger = max(buffer_size * 4, struct.unpack_from("=Q", buffer, 104)[0])
        return search_raw(descriptor, tree, low, high, min_transid=min_transid, buffer_size=larger)
    end = 112
    for _ in range(struct.unpack_from("=I", buffer, 64)[0]):
        end += 32 + int(struct.unpack_from("=I", buffer, end + 28)[0])
    return bytes(buffer[112:end])


def search_once(
    descriptor: int,
    tree: int,
    low: Key,
    high: Key = _LAST_KEY,
    *,
    min_transid: int = 0,
    buffer_size: int = _TREE_BUFFER,
) -> Iterator[Found]:
    """The items of one :func:`search_raw`."""
    raw = search_raw(descriptor, tree, low, high, min_transid=min_transid, buffer_size=buffer_size)
    position = 0
    while position < len(raw):
        transid, objectid, offset, kind, length = struct.unpack_from("=QQQII", raw, position)
        position += 32
        yield Found(objectid, kind, offset, transid, raw[position : position + length])
        position += length


def search(
    descriptor: int,
    tree: int,
    *,
    objects: tuple[int, int] = (0, _U64_MAX),
    types: tuple[int, int] = (0, 255),
    offsets: tuple[int, int] = (0, _U64_MAX),
    min_transid: int = 0,
    buffer_size: int = _TREE_BUFFER,
) -> Iterator[Found]:
    """All items of a tree between two keys, in key order; see :func:`search_raw`.

    ``types`` and ``offsets`` bound only the first and last object, as the kernel compares
    whole keys; callers filter.
    """
    low = (objects[0], types[0], offsets[0])
    high = (objects[1], types[1], offsets[1])
    while low <= high:
        last: Found | None = None
        for last in search_once(
            descriptor, tree, low, high, min_transid=min_transid, buffer_size=buffer_size
        ):
            yield last
        if last is None:
            return
        low = _following((last.objectid, last.type, last.offset))


def _following(key: Key) -> Key:
    if key[2] < _U64_MAX:
        return key[0], key[1], key[2] + 1
    if key[1] < 255:
        return key[0], key[1] + 1, 0
    return key[0] + 1, 0, 0


def path_of(descriptor: int, tree: int, inode: int) -> bytes:
    """One path of a folder's inode below its subvolume's root (``BTRFS_IOC_INO_LOOKUP``).

    Without a trailing slash; ``b""`` for the root.
    """
    if inode == FIRST_FREE_OBJECTID:
        return b""
    buffer = bytearray(struct.pack("=QQ4080s", tree, inode, b""))
    fcntl.ioctl(descriptor, _IOC_INO_LOOKUP, buffer)
    return bytes(buffer[16 : buffer.index(0, 16)]).rstrip(b"/")


def nested_subvolumes(descriptor: int, tree: int) -> list[tuple[int, int, bytes]]:
    """Subvolumes directly inside one: (tree, inode of the folder it is in, name)."""
    found: list[tuple[int, int, bytes]] = []
    for item in search(
        descriptor,
        ROOT_TREE_OBJECTID,
        objects=(tree, tree),
        types=(Item.ROOT_REF, Item.ROOT_REF),
        buffer_size=_SMALL_BUFFER,
    ):
        if item.objectid != tree or item.type != Item.ROOT_REF:
            continue
        folder, _, length = struct.unpack_from("=QQH", item.data)
        found.append((item.offset, folder, item.data[18 : 18 + length]))
    return found


def enable_quotas(descriptor: int) -> bool:
    """Turn on simple quotas, or full ones where the kernel has no simple ones.

    Returns:
        True for simple quotas, which charge an extent to the subvolume that wrote it.
    """
    try:
        fcntl.ioctl(
            descriptor, _IOC_QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_CTL_ENABLE_SIMPLE, 0))
        )
    except OSError as refused:
        if refused.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
            raise
        fcntl.ioctl(descriptor, _IOC_QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_CTL_ENABLE, 0)))
        return False
    return True


def quotas_enabled(descriptor: int) -> bool:
    """Whether the filesystem counts quotas."""
    try:
        next(
            search_once(descriptor, QUOTA_TREE_OBJECTID, (0, 0, 0), buffer_size=_SMALL_BUFFER), None
        )
    except FileNotFoundError:
        return False
    return True


def set_limit(descriptor: int, subvolume: int, size: int | None) -> None:
    """Limit what a subvolume may be charged for, bytes; None lifts the limit."""
    value = _U64_MAX if size is None else size
    fcntl.ioctl(
        descriptor,
        _IOC_QGROUP_LIMIT,
        bytearray(struct.pack("=QQQQQQ", subvolume, _QGROUP_LIMIT_MAX_RFER, value, 0, 0, 0)),
    )


def charged(descriptor: int, subvolume: int) -> int | None:
    """Bytes a subvolume is charged for; None without quotas.  Committed state only."""
    try:
        items = search(
            descriptor,
            QUOTA_TREE_OBJECTID,
            objects=(0, 0),
            types=(Item.QGROUP_INFO, Item.QGROUP_INFO),
            offsets=(subvolume, subvolume),
            buffer_size=_SMALL_BUFFER,
        )
        for item in items:
            if item.type == Item.QGROUP_INFO and item.offset == subvolume:
                return int(struct.unpack_from("=QQ", item.data)[1])
    except FileNotFoundError:
        return None
    return None


def destroy_tree(parent: int, name: bytes) -> None:
    """Delete a file, folder or subvolume with all below it, nested subvolumes included.

    Raises:
        InUse: something is mounted inside.
    """
    try:
        folder = beneath.open_folder(parent, name)
    except FileNotFoundError:
        return
    except OSError as refused:
        if refused.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
            raise
        beneath.remove_tree(parent, name)
        return
    try:
        if is_subvolume(folder):
            tree = subvolume_id(folder)
            for _, inode, nested in nested_subvolumes(folder, tree):
                inside = path_of(folder, tree, inode)
                holder = beneath.resolve(folder, inside, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    destroy_tree(holder, nested)
                finally:
                    os.close(holder)
            destroy_subvolume(parent, name)
            return
        for entry in beneath.names(folder):
            destroy_tree(folder, entry)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=parent)
