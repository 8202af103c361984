"""Nodes: what the kernel holds on to, and where each really lies in the layers."""

from __future__ import annotations

import bisect
import hashlib
import os
from dataclasses import dataclass

from lazarette.fuse.layers import LowerDir


class Listing:
    """The entries of a folder in an order that stays while entries come and go.

    An entry's number is a hash of its name, so the next server gives it the same; a reader
    that goes on after number N misses nothing that was there all the time and sees nothing
    twice.  Numbers 1 and 2 are ``.`` and ``..``.
    """

    FIRST = 3

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[int, int]] = {}
        self._unread: dict[bytes, None] = {}
        self._numbers: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._order: list[int] = []

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: bytes, ino: int, kind: int) -> None:
        """Add an entry, or change what an existing one is; ``kind`` as in ``d_type``."""
        if name not in self._entries:
            self._unread[name] = None  # it gets its number when someone reads
        self._entries[name] = (ino, kind)

    def drop(self, name: bytes) -> None:
        """Take an entry away."""
        if self._entries.pop(name, None) is None:
            return
        number = self._numbers.pop(name, None)
        if number is None:
            del self._unread[name]
        else:
            del self._names[number]

    def _number_unread(self) -> None:
        for name in self._unread:
            number = _number(name)
            while number in self._names:  # two names with one hash, out of 2**62
                number += 1
            self._numbers[name] = number
            self._names[number] = name
        self._unread.clear()
        self._order = sorted(self._names)

    def after(self, number: int, most: int = 4096) -> list[tuple[int, tuple[bytes, int, int]]]:
        """At most so many entries with numbers above ``number``, in order."""
        if self._unread:
            self._number_unread()
        found: list[tuple[int, tuple[bytes, int, int]]] = []
        for index in range(bisect.bisect_right(self._order, number), len(self._order)):
            each = self._order[index]
            name = self._names.get(each)
            if name is not None:
                found.append((each, (name, *self._entries[name])))
                if len(found) == most:
                    break
        return found


def _number(name: bytes) -> int:
    """Where a name stands in a listing."""
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) + Listing.FIRST


class Node:
    """Anything with an inode number.

    Attributes:
        id: the kernel's name for it; never used twice.
        ino: ``st_ino``, the same over copy-up and remount.
        lookups: how often the kernel was told of it.
        dead: it has no name any more.
    """

    __slots__ = ("dead", "id", "ino", "lookups")

    def __init__(self, number: int, ino: int) -> None:
        self.id = number
        self.ino = ino
        self.lookups = 0
        self.dead = False


class Dir(Node):
    """A folder, merged of those of several layers.

    Attributes:
        parent, name: where it is; the root is its own parent.
        upper: it exists in the upper layer.
        lowers: the folders of lower layers it shows, top first.
        fd: descriptor of the upper folder, -1 when not open.
        lower_fds: descriptors of the lower folders, -1 when not open.
        impure: some entry in the upper folder keeps an older inode number.
        setgid: new entries take the folder's group.
        default_acl: it has a default ACL; None when not yet known.
        entries: the known nodes in it, by name.
        listing: its entries, once read.
        lower_names: which lower folders hold a name, for folders with many.
        misses: how many names were looked for in vain.
        expanded: all entries are here (lazy trees only).
        pins: names of known files and folders in it; while there are any it is kept, so
            that a rename of it reaches all of them.
    """

    __slots__ = (
        "default_acl",
        "entries",
        "expanded",
        "fd",
        "impure",
        "listing",
        "lower_fds",
        "lower_names",
        "lowers",
        "misses",
        "name",
        "parent",
        "pins",
        "setgid",
        "upper",
    )

    def __init__(
        self,
        number: int,
        ino: int,
        parent: Dir | None,
        name: bytes,
        upper: bool,
        lowers: tuple[LowerDir, ...],
    ) -> None:
        super().__init__(number, ino)
        self.parent = parent if parent is not None else self
        self.name = name
        self.upper = upper
        self.lowers = lowers
        self.fd = -1
        self.lower_fds = [-1] * len(lowers)
        self.impure = False
        self.setgid = False
        self.default_acl: bool | None = None
        self.listing: Listing | None = None
        self.lower_names: dict[bytes, tuple[int, ...]] | None = None
        self.misses = 0
        self.expanded = False
        self.pins = 0
        self.entries: dict[bytes, Node] = {}
        self.parent.pins += 1
        if parent is not None:
            parent.entries[name] = self

    def move(self, parent: Dir, name: bytes) -> None:
        """Note that it was renamed."""
        parent.pins += 1
        self.parent.pins -= 1
        if self.parent.entries.get(self.name) is self:
            del self.parent.entries[self.name]
        self.parent, self.name = parent, name
        parent.entries[name] = self


@dataclass(frozen=True, slots=True)
class LowerFile:
    """A file in a lower layer: ``name`` in the lower folder ``index`` of ``folder``."""

    folder: Dir
    index: int
    name: bytes


class File(Node):
    """Anything but a folder.

    Attributes:
        kind: ``S_IFMT`` of its mode.
        real: device and inode number of the file that holds its data.
        names: folder and name, to whether the name is in the upper layer.
        lower: where it lies below, while it is not copied up.
        index: its name in the index of hard links, or empty.
        links: links of an indexed file that are not links on disk.
        origin: it carries the inode number it had before copy-up.
        orphan: descriptor that holds it when it has no name, else -1.
        copying: a worker is copying it up.
        successor: the node that took its place when it was copied up under readers.
        backing: id of its registered backing file, 0 for none.
        backing_upper: that file lies in the upper layer.
        backing_writable: it was registered by a descriptor open for writing.
        through: opens that use the backing file.
        plain: opens that go through the server.
        writers: opens for writing.
        written: it was opened for writing: a mapping may write to it still.
        privileged: it has set-id bits or capabilities; None when not yet known.
        cached: the kernel holds its attributes for long.
        content: what is known of a file that is still being fetched (lazy trees only).
    """

    __slots__ = (
        "backing",
        "backing_upper",
        "backing_writable",
        "cached",
        "content",
        "copying",
        "index",
        "kind",
        "links",
        "lower",
        "names",
        "origin",
        "orphan",
        "plain",
        "privileged",
        "real",
        "successor",
        "through",
        "writers",
        "written",
    )

    def __init__(self, number: int, ino: int, kind: int, real: tuple[int, int]) -> None:
        # All of Node's too: a call costs as much as five of these.
        self.id = number
        self.ino = ino
        self.lookups = 0
        self.dead = False
        self.kind = kind
        self.real = real
        self.names: dict[tuple[Dir, bytes], bool] = {}
        self.lower: LowerFile | None = None
        self.index = b""
        self.links = 0
        self.origin = False
        self.orphan = -1
        self.copying = False
        self.successor: File | None = None
        self.backing = 0
        self.backing_upper = False
        self.backing_writable = False
        self.through = 0
        self.plain = 0
        self.writers = 0
        self.written = False
        self.privileged: bool | None = None
        self.cached = False
        self.content: object = None

    @property
    def upper(self) -> bool:
        """Whether its data lies in the upper layer (or nowhere else any more)."""
        return self.lower is None

    def add_name(self, folder: Dir, name: bytes, in_upper: bool) -> None:
        """Note a name, or where it lies."""
        place = (folder, name)
        if place not in self.names:
            folder.pins += 1
        folder.entries[name] = self
        self.names[place] = in_upper

    def drop_name(self, folder: Dir, name: bytes) -> None:
        """Note that a name is gone."""
        if self.names.pop((folder, name), None) is not None:
            folder.pins -= 1
            if folder.entries.get(name) is self:
                del folder.entries[name]

    def close_orphan(self) -> None:
        """Let go of the descriptor that kept it."""
        if self.orphan >= 0:
            os.close(self.orphan)
            self.orphan = -1


class Handle:
    """One open of a file.

    Attributes:
        node: the file.
        flags: access mode of the open.
        fd: descriptor, -1 until needed.
        upper: ``fd`` is of the file in the upper layer.
        through: the kernel reads and writes the backing file itself.
    """

    __slots__ = ("fd", "flags", "node", "through", "upper")

    def __init__(self, node: File, flags: int, fd: int, through: bool) -> None:
        self.node = node
        self.flags = flags
        self.fd = fd
        self.upper = node.lower is None
        self.through = through

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY
