"""What differs between two read-only btrfs snapshots, without reading any content.

A leaf of a snapshot's tree carries the transaction that wrote it, and an inode the one
that changed it last (``btrfs_inode_item.transid``).  So a search of the newer tree that
leaves out leaves not younger than the older snapshot finds every changed inode; what was
unlinked shows in its changed folder.  For a changed file, both extent lists are compared:
two places with the same extent at the same shift have the same bytes, because an extent
that a snapshot holds is never written in place, not even with nodatacow.

The short cut by transactions holds only when the newer snapshot's history runs through
the older one.  Otherwise (after a rollback) the whole trees are compared the same way.

Struct layouts: ``linux/btrfs_tree.h``.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazarette.storage import beneath, btrfs
from lazarette.storage.btrfs import Item
from lazarette.storage.changes import ByteRange, Change, ChangeKind

_SCAN_BUFFER = 1 << 16
_POINT_BUFFER = 1 << 12
_EXTENT_BUFFER = 1 << 22

_EXTENT_ITEM = np.dtype(
    [
        ("transid", "<u8"),
        ("objectid", "<u8"),
        ("logical", "<u8"),
        ("kind", "<u4"),
        ("length", "<u4"),
        ("generation", "<u8"),
        ("ram_bytes", "<u8"),
        ("compression", "u1"),
        ("encryption", "u1"),
        ("encoding", "<u2"),
        ("type", "u1"),
        ("bytenr", "<u8"),
        ("disk_bytes", "<u8"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
    ]
)
_REGULAR_LENGTH = 53


@dataclass(frozen=True, slots=True)
class _Inode:
    """The parts of ``btrfs_inode_item`` that matter here."""

    generation: int
    transid: int
    size: int
    nlink: int
    mode: int
    raw: bytes

    @classmethod
    def parse(cls, data: bytes) -> _Inode:
        generation, transid, size = struct.unpack_from("=QQQ", data)
        nlink, _, _, mode = struct.unpack_from("=IIII", data, 40)
        return cls(generation, transid, size, nlink, mode, data)

    @property
    def steady(self) -> bytes:
        """The item without what reading changes: access time and transaction."""
        return self.raw[:8] + self.raw[16:112] + self.raw[124:]

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a folder's entry leads to; ``subvolume`` marks the empty stand-in of one."""

    inode: int
    subvolume: bool
    folder: bool


class _Tree:
    """One snapshot's tree, read by searches."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._inodes: dict[int, _Inode | None] = {}
        self._paths: dict[int, bytes] = {}
        self._number = btrfs.subvolume_id(descriptor)

    def changed_since(self, transid: int) -> Iterator[tuple[int, _Inode]]:
        """Inodes changed after a transaction."""
        next_object = btrfs.FIRST_FREE_OBJECTID
        while True:
            last: btrfs.Found | None = None
            for item in btrfs.search_once(
                self._descriptor,
                0,
                (next_object, 0, 0),
                min_transid=transid + 1,
                buffer_size=_SCAN_BUFFER,
            ):
                last = item
                if item.type == Item.INODE_ITEM:
                    inode = _Inode.parse(item.data)
                    if inode.transid > transid:
                        self._inodes[item.objectid] = inode
                        yield item.objectid, inode
            if last is None:
                return
            # an inode item is the first of its object: the rest of this one can be skipped
            next_object = last.objectid + 1

    def inode(self, number: int) -> _Inode | None:
        """An inode, if it is there."""
        if number not in self._inodes:
            items = self._items(number, Item.INODE_ITEM, _POINT_BUFFER)
            item = next(items, None)
            self._inodes[number] = None if item is None else _Inode.parse(item.data)
        return self._inodes[number]

    def _items(self, number: int, kind: Item, buffer_size: int) -> Iterator[btrfs.Found]:
        for item in btrfs.search(
            self._descriptor,
            0,
            objects=(number, number),
            types=(kind, kind),
            buffer_size=buffer_size,
        ):
            if item.type == kind:
                yield item

    def entries(self, folder: int) -> dict[bytes, _Entry]:
        """The entries of a folder by name."""
        found: dict[bytes, _Entry] = {}
        for item in self._items(folder, Item.DIR_INDEX, _SCAN_BUFFER):
            inode, kind = struct.unpack_from("=QB", item.data)
            length, file_type = struct.unpack_from("=HB", item.data, 27)
            subvolume = kind == Item.ROOT_ITEM
            found[item.data[30 : 30 + length]] = _Entry(
                inode, subvolume, file_type == 2 and not subvolume
            )
        return found

    def folder_path(self, number: int) -> bytes:
        """The path of a folder."""
        if number not in self._paths:
            self._paths[number] = btrfs.path_of(self._descriptor, self._number, number)
        return self._paths[number]

    def paths(self, number: int) -> list[bytes]:
        """Every path of an inode."""
        found: list[bytes] = []
        for item in self._items(number, Item.INODE_REF, _POINT_BUFFER):
            position = 0
            while position < len(item.data):
                length = struct.unpack_from("=H", item.data, position + 8)[0]
                name = item.data[position + 10 : position + 10 + length]
                found.append(_join(self.folder_path(item.offset), name))
                position += 10 + length
        for item in self._items(number, Item.INODE_EXTREF, _POINT_BUFFER):
            position = 0
            while position < len(item.data):
                parent, _, length = struct.unpack_from("=QQH", item.data, position)
                name = item.data[position + 18 : position + 18 + length]
                found.append(_join(self.folder_path(parent), name))
                position += 18 + length
        return found

    def below(self, path: bytes, entry: _Entry) -> Iterator[tuple[bytes, _Entry]]:
        """An entry and all below it, with paths."""
        yield path, entry
        if entry.folder:
            for name, inner in self.entries(entry.inode).items():
                yield from self.below(_join(path, name), inner)

    def extents(self, number: int) -> npt.NDArray[np.void]:
        """The extent items of a file in order, inline ones with address 0."""
        parts: list[npt.NDArray[np.void]] = []
        start = 0
        size = _POINT_BUFFER
        while True:
            raw = btrfs.search_raw(
                self._descriptor,
                0,
                (number, Item.EXTENT_DATA, start),
                (number, Item.EXTENT_DATA, (1 << 64) - 1),
                buffer_size=size,
            )
            if raw:
                parts.append(_extent_items(raw))
                start = int(parts[-1]["logical"][-1]) + 1
            if len(raw) + 2 * _EXTENT_ITEM.itemsize < size:
                break  # it would have held more
            size = _EXTENT_BUFFER  # a large file; a large buffer costs a millisecond to make
        return np.concatenate(parts) if parts else np.zeros(0, _EXTENT_ITEM)


def _extent_items(raw: bytes) -> npt.NDArray[np.void]:
    """Items as an array; at once when all are regular, one by one with an inline one."""
    if len(raw) % _EXTENT_ITEM.itemsize == 0:
        items = np.frombuffer(raw, _EXTENT_ITEM)
        if bool((items["length"] == _REGULAR_LENGTH).all()):
            return items
    rows: list[bytes] = []
    position = 0
    while position < len(raw):
        length = struct.unpack_from("=I", raw, position + 28)[0]
        row = raw[position : position + 32 + min(length, _REGULAR_LENGTH)]
        if length != _REGULAR_LENGTH or row[32 + 20] == 0:
            row = row[: 32 + 21].ljust(_EXTENT_ITEM.itemsize, b"\0")
        rows.append(row)
        position += 32 + length
    return np.frombuffer(b"".join(rows), _EXTENT_ITEM)


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def changed_ranges(
    older: npt.NDArray[np.void], newer: npt.NDArray[np.void], older_size: int, newer_size: int
) -> tuple[ByteRange, ...]:
    """Where two extent lists of a file differ, up to the newer size.

    An inline extent has no address; the transaction that wrote it stands for its content.
    """
    edges = [np.array([0, older_size, newer_size], np.uint64)]
    for items in (older, newer):
        edges += [items["logical"], items["logical"] + _lengths(items)]
    points = np.unique(np.concatenate(edges))
    points = points[points <= np.uint64(newer_size)]
    if len(points) < 2:
        return ()
    starts, ends = points[:-1], points[1:]
    was, now = _covering(older, starts), _covering(newer, starts)
    differs = ~np.all(was == now, axis=1)
    # what lies past the older end was not there before, whatever extent it is in
    differs |= starts >= np.uint64(older_size)
    if not differs.any():
        return ()
    return _merged(starts[differs], ends[differs])


_HOLE = 0xFF
_INLINE = 0


def _lengths(items: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    lengths: npt.NDArray[np.uint64] = np.where(
        items["type"] == _INLINE, items["ram_bytes"], items["bytes"]
    )
    return lengths


def _covering(
    items: npt.NDArray[np.void], starts: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """For each start what covers it: (extent address, shift, type); holes are all alike."""
    found = np.zeros((len(starts), 3), np.uint64)
    found[:, 2] = _HOLE
    if not len(items):
        return found
    index = np.searchsorted(items["logical"], starts, side="right").astype(np.int64) - 1
    held = index >= 0
    safe = np.where(held, index, 0)
    inside = held & (starts < items["logical"][safe] + _lengths(items)[safe])
    # a hole written as an extent with address 0 is a hole
    real = inside & ((items["bytenr"][safe] != 0) | (items["type"][safe] == _INLINE))
    found[real, 0] = items["bytenr"][safe][real]
    found[real, 1] = (items["offset"][safe] - items["logical"][safe])[real]
    found[real, 2] = items["type"][safe][real]
    inline = real & (items["type"][safe] == _INLINE)
    found[inline, 1] = items["generation"][safe][inline]
    return found


def _merged(starts: npt.NDArray[np.uint64], ends: npt.NDArray[np.uint64]) -> tuple[ByteRange, ...]:
    """Runs of touching ranges as one each."""
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts = starts[np.concatenate([[0], breaks])].tolist()
    lasts = ends[np.concatenate([breaks - 1, [len(ends) - 1]])].tolist()
    return tuple(ByteRange(first, last - first) for first, last in zip(firsts, lasts, strict=True))


def subvolume_changes(older: Path, newer: Path) -> Iterator[Change]:
    """What differs between two snapshots, sorted by path; renames are told (C5).

    Args:
        older: root of a read-only snapshot.
        newer: of another one on the same filesystem, or of a writable one that was synced
            and is not written meanwhile.
    """
    with beneath.opened(older) as base, beneath.opened(newer) as target:
        yield from sorted(_Comparison(base, target).run(), key=lambda change: change.path)


def _common_history(was: btrfs.Subvolume, now: btrfs.Subvolume) -> int:
    """The last transaction up to which the newer snapshot's history is the older one's."""
    if now.parent_uuid == was.uuid:
        return now.origin_generation - 1  # made of it, and written from then on
    siblings = now.parent_uuid == was.parent_uuid != bytes(16)
    if siblings and was.origin_generation <= now.origin_generation:
        return was.origin_generation
    return 0


class _Comparison:
    def __init__(self, base: int, target: int) -> None:
        self._base = _Tree(base)
        self._target = _Tree(target)
        was, now = btrfs.subvolume_info(base), btrfs.subvolume_info(target)
        self._since = _common_history(was, now)
        self._changed: dict[int, _Inode] = {}
        self._added: dict[bytes, _Entry] = {}
        self._removed: dict[bytes, _Entry] = {}

    def run(self) -> Iterator[Change]:
        for number, inode in self._target.changed_since(self._since):
            was = self._same(number, inode)
            if was is None or was.raw != inode.raw:
                self._changed[number] = inode
        for number, inode in self._changed.items():
            if inode.is_folder and inode.nlink:
                self._compare_folder(number, inode)
        yield from self._names()
        yield from self._contents()

    def _same(self, number: int, inode: _Inode) -> _Inode | None:
        """The inode as it was, if it is the same one and not another of its number."""
        was = self._base.inode(number)
        return was if was is not None and was.generation == inode.generation else None

    def _compare_folder(self, number: int, inode: _Inode) -> None:
        if self._same(number, inode) is None:
            return  # new: its parent changed too and reports all below
        path = self._target.folder_path(number)
        if path != self._base.folder_path(number):
            return  # moved, or inside what was: reported from where the names changed
        was, now = self._base.entries(number), self._target.entries(number)
        for name in was.keys() | now.keys():
            before, after = was.get(name), now.get(name)
            if before == after and (after is None or self._kept(after)):
                continue
            if before is not None:
                self._removed.update(self._base.below(_join(path, name), before))
            if after is not None:
                self._added.update(self._target.below(_join(path, name), after))

    def _kept(self, entry: _Entry) -> bool:
        """Whether an inode number stands for the same inode in both trees."""
        if entry.subvolume or entry.inode not in self._changed:
            return True
        return self._same(entry.inode, self._changed[entry.inode]) is not None

    def _names(self) -> Iterator[Change]:
        origins: dict[int, list[bytes]] = {}
        for path, entry in sorted(self._removed.items(), reverse=True):
            if not entry.subvolume:
                origins.setdefault(entry.inode, []).append(path)
        moved: set[bytes] = set()
        for path, entry in sorted(self._added.items()):
            inode = None if entry.subvolume else self._target.inode(entry.inode)
            was = None if inode is None else self._same(entry.inode, inode)
            sources = origins.get(entry.inode, []) if was is not None else []
            if path in self._removed and self._removed[path] == entry and was is not None:
                sources = [path]
            if inode is None or was is None or not sources:
                whole = inode is not None and inode.is_file
                yield Change(ChangeKind.ADDED, path, ranges=None if whole else ())
                continue
            origin = sources.pop()
            moved.add(origin)
            ranges = self._ranges(entry.inode, was, inode)
            if origin == path:
                yield Change(ChangeKind.MODIFIED, path, ranges=ranges)
            else:
                yield Change(ChangeKind.RENAMED, path, origin, ranges)
        for path in self._removed:
            if path not in moved and path not in self._added:
                yield Change(ChangeKind.REMOVED, path)

    def _contents(self) -> Iterator[Change]:
        for number, inode in self._changed.items():
            was = self._same(number, inode)
            if was is None or not inode.nlink:
                continue
            if number == btrfs.FIRST_FREE_OBJECTID:
                paths = [b""]
            else:
                paths = [path for path in self._target.paths(number) if path not in self._added]
            if paths:
                ranges = self._ranges(number, was, inode)
                if ranges == () and was.steady == inode.steady:
                    continue  # it was only read
                for path in paths:
                    yield Change(ChangeKind.MODIFIED, path, ranges=ranges)

    def _ranges(self, number: int, was: _Inode, now: _Inode) -> tuple[ByteRange, ...] | None:
        if not now.is_file or number not in self._changed:
            return ()
        ranges = changed_ranges(
            self._base.extents(number), self._target.extents(number), was.size, now.size
        )
        if not ranges and now.size < was.size:
            # cut off: no byte differs, but the content does; its last block stands for that
            start = max(0, now.size - 1) // 4096 * 4096
            return (ByteRange(start, now.size - start),) if now.size else None
        return ranges
