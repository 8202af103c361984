"""The merged tree: finding names through the layers, and the table of nodes.

Only reading happens here; :mod:`lazarette.fuse.copyup` and :mod:`lazarette.fuse.union`
change layers.  Callers hold the filesystem's lock.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import deque
from collections.abc import Sequence

import msgspec

from lazarette.fuse import layers, native, protocol
from lazarette.fuse.journal import Journal
from lazarette.fuse.layers import DIRECTORY, Format, LowerDir, Stack, is_whiteout
from lazarette.fuse.native import Shown, Status
from lazarette.fuse.nodes import Dir, File, Listing, LowerFile, Node

_MANY_LOWERS = 3
UPPER = -1


class Found(msgspec.Struct, gc=False):
    """Where a name was found.

    Attributes:
        st: of the topmost entry.
        index: lower folder of the parent that holds it, or ``UPPER``.
        lowers: for a folder, the lower folders it merges.
        bottom: for a folder with lowers, the inode number it shows.
    """

    st: Status
    index: int
    lowers: tuple[LowerDir, ...] = ()
    bottom: int = 0

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return stat.S_ISDIR(self.st.st_mode)


class Tree:
    """Nodes of one union and the way from each to the layers.

    Args:
        stack: the layers.
        form: names of the on-disk xattrs.
        index: descriptor of the folder with the index of hard links, -1 without an upper layer.

    Attributes:
        next_number: node id that is given next.
        journal: where what the kernel knows is noted.
    """

    exact_links = True
    """A file that has neither an index nor lost its names has the links of the real file."""

    CONFLICT = 1 << 61
    """Flips in the inode number of the second of two nodes with the same."""

    def __init__(self, stack: Stack, form: Format, index: int) -> None:
        self.stack = stack
        self.form = form
        self.index = index
        lowers = tuple(LowerDir(layer, b"") for layer in stack.lowers)
        bottom = stack.lowers[-1] if stack.lowers else stack.upper
        if bottom is None:
            raise OSError(errno.EINVAL, "a union needs at least one layer")
        ino = stack.number(bottom, os.stat(bottom.fd).st_ino)
        self.root = Dir(protocol.ROOT_ID, ino, None, b"", stack.upper is not None, lowers)
        self.root.lookups = 1
        if stack.upper is not None:
            self.root.fd = stack.upper.fd
            self._load(self.root)
        self.root.lower_fds = [layer.fd for layer in stack.lowers]
        self.nodes: dict[int, Node] = {protocol.ROOT_ID: self.root}
        self.by_ino: dict[int, Node] = {ino: self.root}
        self.next_number = protocol.ROOT_ID + 1
        self.journal = Journal()
        self._opened: deque[tuple[Dir, int]] = deque()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = max(64, min(soft // 3, 50_000))

    # -- nodes --------------------------------------------------------------------------

    def node(self, number: int) -> Node:
        """The node the kernel calls ``number``, or the one that took its place."""
        node = self.nodes.get(number)
        if node is None:
            raise OSError(errno.ESTALE, "unknown node")
        while isinstance(node, File) and node.successor is not None:
            node = node.successor
        return node

    def dir(self, number: int) -> Dir:
        """The folder the kernel calls ``number``."""
        node = self.nodes.get(number)
        if not isinstance(node, Dir):
            raise OSError(errno.ENOTDIR if node else errno.ESTALE, "not a folder")
        return node

    def new_number(self) -> int:
        """A node id never used before."""
        number = self.next_number
        self.next_number += 1
        return number

    def add(self, node: Node) -> None:
        """Enter a node."""
        self.nodes[node.id] = node
        self.by_ino[node.ino] = node

    def drop(self, node: Node) -> None:
        """Forget a node the kernel has forgotten, and close what it held.

        A folder stays while names in it are known; it goes with the last of them.
        """
        if isinstance(node, File):
            self._erase(node)
            if node.orphan >= 0:
                node.close_orphan()
            for folder, name in list(node.names) if node.names else ():
                node.drop_name(folder, name)
                self._drop_idle(folder)
            if node.successor is not None:
                node.successor.lookups -= 1
                self.journal.forget(node.successor.id, 1)
                if node.successor.lookups <= 0:
                    self.drop(node.successor)
        elif isinstance(node, Dir):
            self._drop_idle(node)

    def _erase(self, node: Node) -> None:
        self.nodes.pop(node.id, None)
        self.journal.gone(node.id)
        if self.by_ino.get(node.ino) is node:
            del self.by_ino[node.ino]

    def _drop_idle(self, folder: Dir) -> None:
        while folder.lookups <= 0 and not folder.pins and folder is not self.root:
            if folder.id not in self.nodes:
                return
            self._erase(folder)
            self.close_dir(folder)
            folder.parent.pins -= 1
            if folder.parent.entries.get(folder.name) is folder:
                del folder.parent.entries[folder.name]
            folder = folder.parent

    def close(self) -> None:
        """Close every descriptor but those of the layers' roots."""
        for node in self.nodes.values():
            if isinstance(node, File):
                node.close_orphan()
            elif isinstance(node, Dir):
                self.close_dir(node)
        self.nodes.clear()
        self.by_ino.clear()

    def forget_all(self) -> None:
        """Forget every node but the root: the tree is about to be rebuilt."""
        for node in list(self.nodes.values()):
            if isinstance(node, Dir) and node is not self.root:
                self.close_dir(node)
        self.nodes = {self.root.id: self.root}
        self.by_ino = {self.root.ino: self.root}
        self.root.entries.clear()
        self.root.pins = 1
        self._opened.clear()

    def close_dir(self, folder: Dir) -> None:
        """Close the descriptors of a folder."""
        for index in range(UPPER, len(folder.lower_fds)):
            self._close_one(folder, index)
        folder.listing = None

    # -- descriptors --------------------------------------------------------------------

    def _close_one(self, folder: Dir, index: int) -> None:
        fd = folder.fd if index == UPPER else folder.lower_fds[index]
        if fd < 0 or folder is self.root:
            return
        os.close(fd)
        if index == UPPER:
            folder.fd = -1
        else:
            folder.lower_fds[index] = -1

    def trim(self) -> None:
        """Close the oldest folder descriptors when many are open; only between requests."""
        if len(self._opened) <= self._most_open:
            return
        for _ in range(len(self._opened) // 2):
            folder, index = self._opened.popleft()
            if folder.dead:
                continue  # cannot be opened again: stays until forgotten
            self._close_one(folder, index)

    def upper_fd(self, folder: Dir) -> int:
        """Descriptor of the folder in the upper layer (O_PATH)."""
        if folder.fd >= 0:
            return folder.fd
        chain = []
        current = folder
        while current.fd < 0:
            if current.dead or current.parent is current:
                raise OSError(errno.ENOENT, "folder is gone")
            chain.append(current)
            current = current.parent
        fd = current.fd
        for each in reversed(chain):
            fd = os.open(each.name, DIRECTORY, dir_fd=fd)
            each.fd = fd
            self._opened.append((each, UPPER))
        return fd

    def lower_fd(self, folder: Dir, index: int) -> int:
        """Descriptor of one of the lower folders (O_PATH)."""
        fd = folder.lower_fds[index]
        if fd < 0:
            lower = folder.lowers[index]
            fd = layers.open_beneath(lower.layer.fd, lower.path)
            folder.lower_fds[index] = fd
            self._opened.append((folder, index))
        return fd

    def top_fd(self, folder: Dir) -> int:
        """Descriptor of the folder whose attributes are shown."""
        return self.upper_fd(folder) if folder.upper else self.lower_fd(folder, 0)

    def locate(self, node: File) -> tuple[int | None, bytes, bool]:
        """Folder descriptor, path and whether to follow a final link, to reach a file."""
        if node.orphan >= 0:
            return None, layers.descriptor_path(node.orphan), True
        if node.lower is not None:
            lower = node.lower
            return self.lower_fd(lower.folder, lower.index), lower.name, False
        if node.index:
            return self.index, node.index, False
        for (folder, name), in_upper in node.names.items():
            if in_upper:
                return folder.fd if folder.fd >= 0 else self.upper_fd(folder), name, False
        raise OSError(errno.ESTALE, "file has no name")

    def place(self, node: Node) -> tuple[int | None, bytes, bool]:
        """As :meth:`locate`, for any node."""
        if isinstance(node, Dir):
            return None, layers.descriptor_path(self.top_fd(node)), True
        assert isinstance(node, File)
        return self.locate(node)

    def path(self, node: Node) -> tuple[bytes, bool]:
        """A path to a node for calls without a folder descriptor, and whether to follow it."""
        if isinstance(node, Dir):
            return layers.descriptor_path(self.top_fd(node)), True
        assert isinstance(node, File)
        fd, name, follow = self.locate(node)
        return (name, follow) if fd is None else (layers.entry_path(fd, name), False)

    def stat(self, node: Node) -> Status:
        """Attributes of the real file or folder."""
        if isinstance(node, Dir):
            return native.opened(self.top_fd(node))
        assert isinstance(node, File)
        st = native.status(*self.locate(node))
        if node.kind == stat.S_IFCHR and stat.S_ISREG(st.st_mode):
            return seen_as_whiteout(st)
        return st

    def open(self, node: File, flags: int) -> int:
        """Open the real file; ``flags`` without O_CREAT."""
        fd, name, follow = self.locate(node)
        if not follow:
            flags |= os.O_NOFOLLOW
        return native.open_at(fd, name, flags, 0)

    def links(self, node: Node, st: Status) -> int:
        """``st_nlink`` to show."""
        if isinstance(node, Dir):
            if node.dead:
                return 0
            return 1 if node.lowers else st.st_nlink
        assert isinstance(node, File)
        if node.index:
            return max(0, st.st_nlink - 1 + node.links)
        if node.dead and node.lower is not None:
            return 0
        return st.st_nlink

    # -- finding ------------------------------------------------------------------------

    def find(self, parent: Dir, name: bytes) -> Found | None:
        """Where a name is, or None; makes no node."""
        if parent.dead:
            return None
        if parent.upper:
            fd = parent.fd if parent.fd >= 0 else self.upper_fd(parent)
            st: Status | None = native.seek(fd, name)
            if st is not None:
                mode = st.st_mode
                if mode == stat.S_IFREG and st.st_size == 0:
                    st = self._as_seen(st, layers.entry_path(fd, name))
                elif is_whiteout(st):
                    return None
                found = Found(st, UPPER)
                if self.stack.lowers and stat.S_ISDIR(mode):
                    self._merge_upper(parent, name, found)
                return found
        return self.find_below(parent, name) if parent.lowers else None

    def find_below(self, parent: Dir, name: bytes) -> Found | None:
        """Where the lower layers have a name, whatever the upper layer says."""
        for index in self._candidates(parent, name):
            st: Status | None = native.seek(self.lower_fd(parent, index), name)
            if st is None:
                continue
            if is_whiteout(st):
                return None
            if st.st_mode == stat.S_IFREG and st.st_size == 0:
                st = self._as_seen(st, layers.entry_path(self.lower_fd(parent, index), name))
            found = Found(st, index)
            if stat.S_ISDIR(st.st_mode):
                found.lowers, found.bottom = self._descend(parent.lowers[index:], name)
            return found
        return None

    def _as_seen(self, st: Status, path: bytes) -> Status:
        """Attributes of an empty file without permissions: a user's whiteout, perhaps."""
        return seen_as_whiteout(st) if self.form.read(path, self.form.node) else st

    def _candidates(self, parent: Dir, name: bytes) -> Sequence[int]:
        """Lower folders that may hold a name; exact when the folder merges many."""
        count = len(parent.lowers)
        if count <= _MANY_LOWERS:
            return range(count)
        if parent.lower_names is None:
            holders: dict[bytes, list[int]] = {}
            for index in range(count):
                path = layers.descriptor_path(self.lower_fd(parent, index))
                for each in os.listdir(path):
                    holders.setdefault(each, []).append(index)
            parent.lower_names = {each: tuple(where) for each, where in holders.items()}
        return parent.lower_names.get(name, ())

    def _merge_upper(self, parent: Dir, name: bytes, found: Found) -> None:
        """Find the lower folders under a folder of the upper layer."""
        path = layers.entry_path(self.upper_fd(parent), name)
        redirect = self.form.read(path, self.form.redirect)
        if redirect is None and not parent.lowers:
            return
        if self.form.read(path, self.form.opaque) == b"y":
            return
        candidates = self._candidates(parent, redirect or name)
        if redirect is not None and redirect.startswith(b"/"):
            found.lowers, found.bottom = self._descend_path(self.root.lowers, redirect)
        elif candidates:
            lowers = [parent.lowers[index] for index in candidates]
            found.lowers, found.bottom = self._descend(lowers, redirect or name)

    def _descend(
        self, folders: Sequence[LowerDir], name: bytes
    ) -> tuple[tuple[LowerDir, ...], int]:
        """The folders ``name`` in a pile of lower folders, and the inode number of the last."""
        found: list[LowerDir] = []
        bottom = 0
        for position, folder in enumerate(folders):
            deeper = folder.below(name)
            try:
                fd = layers.open_beneath(folder.layer.fd, deeper.path)
            except FileNotFoundError:
                continue
            except NotADirectoryError:
                break  # a file or a whiteout hides what is below
            try:
                found.append(deeper)
                bottom = self.stack.number(folder.layer, os.stat(fd).st_ino)
                rest = folders[position + 1 :]
                if folder.layer is self.stack.lowers[-1]:
                    break
                path = layers.descriptor_path(fd)
                if self.form.read(path, self.form.opaque, follow=True) == b"y":
                    break
                redirect = self.form.read(path, self.form.redirect, follow=True)
            finally:
                os.close(fd)
            if redirect is not None:
                if redirect.startswith(b"/"):
                    after = self.stack.lowers.index(folder.layer) + 1
                    roots = [LowerDir(layer, b"") for layer in self.stack.lowers[after:]]
                    more, last = self._descend_path(roots, redirect)
                else:
                    more, last = self._descend(rest, redirect)
                return (*found, *more), last or bottom
        return tuple(found), bottom

    def _descend_path(
        self, roots: Sequence[LowerDir], path: bytes
    ) -> tuple[tuple[LowerDir, ...], int]:
        """Follow an absolute redirect from the roots of the layers below."""
        current: tuple[LowerDir, ...] = tuple(roots)
        bottom = 0
        for part in path.strip(b"/").split(b"/"):
            current, bottom = self._descend(current, part)
        return current, bottom

    # -- nodes from findings ------------------------------------------------------------

    def lookup(self, parent: Dir, name: bytes) -> tuple[Node, Status] | None:
        """The node behind a name with its attributes, made if it is new."""
        found = self.find(parent, name)
        if found is None:
            return None
        if found.is_dir:
            return self._dir_node(parent, name, found), found.st
        return self._file_node(parent, name, found)

    def present(self, parent: Dir, name: bytes) -> tuple[Node, Status] | None:
        """As :meth:`lookup`, without looking for what is known: only we change the layers."""
        node = parent.entries.get(name)
        if node is not None:
            return node, self.stat(node)
        return self.lookup(parent, name)

    def _load(self, folder: Dir) -> None:
        """Read what is remembered about a folder of the upper layer."""
        path = layers.descriptor_path(self.upper_fd(folder))
        folder.impure = self.form.read(path, self.form.impure, follow=True) == b"y"
        folder.setgid = bool(native.opened(self.upper_fd(folder)).st_mode & stat.S_ISGID)

    def shown_ino(self, parent: Dir, name: bytes, found: Found) -> tuple[int, bool]:
        """The inode number to show, and whether it comes from before a copy-up."""
        if found.is_dir and found.bottom:
            return found.bottom, False
        if found.index == UPPER:
            layer = self.stack.upper
            assert layer is not None
            if parent.impure and not found.is_dir:
                kept = self.form.read_ino(layers.entry_path(self.upper_fd(parent), name))
                if kept is not None:
                    return kept, True
        else:
            layer = parent.lowers[found.index].layer
            if not found.is_dir and self._lower_impure(parent, found.index):
                path = layers.entry_path(self.lower_fd(parent, found.index), name)
                kept = self.form.read_ino(path)
                if kept is not None:
                    return kept, True
        return self.stack.number(layer, found.st.st_ino), False

    def _lower_impure(self, parent: Dir, index: int) -> bool:
        path = layers.descriptor_path(self.lower_fd(parent, index))
        return self.form.read(path, self.form.impure, follow=True) == b"y"

    def _dir_node(self, parent: Dir, name: bytes, found: Found) -> Dir:
        ino, _ = self.shown_ino(parent, name, found)
        known = self.by_ino.get(ino)
        if isinstance(known, Dir) and known.parent is parent and known.name == name:
            parent.entries[name] = known
            return known
        if known is not None:
            ino ^= self.CONFLICT
            known = self.by_ino.get(ino)
            if isinstance(known, Dir) and known.parent is parent and known.name == name:
                return known
        node = Dir(self.new_number(), ino, parent, name, found.index == UPPER, found.lowers)
        self.add(node)
        if node.upper:
            self._load(node)
        else:
            node.setgid = bool(found.st.st_mode & stat.S_ISGID)
        return node

    def _file_node(self, parent: Dir, name: bytes, found: Found) -> tuple[File, Status]:
        ino, origin = self.shown_ino(parent, name, found)
        st = found.st
        in_upper = found.index == UPPER
        indexed: Status | None = None
        index = b""
        if self.index >= 0 and st.st_nlink > 1 and (origin or not in_upper):
            index = self.index_name(ino)
            indexed = self._indexed(index)
            if indexed is not None:
                st = indexed
        real = (st.st_dev, st.st_ino)
        known = self.by_ino.get(ino)
        if known is not None and not (isinstance(known, File) and known.real == real):
            ino ^= self.CONFLICT
            known = self.by_ino.get(ino)
        if isinstance(known, File) and known.real == real:
            known.add_name(parent, name, in_upper)
            return known, st
        node = File(self.new_number(), ino, stat.S_IFMT(st.st_mode), real)
        node.add_name(parent, name, in_upper)
        node.origin = origin or indexed is not None or is_whiteout(st)
        if indexed is not None:
            node.index = index
            links = self.form.read_links(layers.entry_path(self.index, index))
            node.links = links if links is not None else 0
        elif not in_upper:
            node.lower = LowerFile(parent, found.index, name)
        self.add(node)
        return node, st

    def known(self, parent: Dir, name: bytes) -> Node | None:
        """The node behind a name: one that is known without asking, or looked up."""
        node = parent.entries.get(name)
        if node is not None:
            return node
        if parent.listing is not None and name not in parent.listing:
            return None
        found = self.lookup(parent, name)
        return found[0] if found is not None else None

    def fresh(self, parent: Dir, name: bytes, st: Status) -> File:
        """The node of a regular file that was just made in the upper layer."""
        upper, real = self.stack.upper, st.st_ino
        assert upper is not None
        ino = self.stack.number(upper, real)
        if ino in self.by_ino:
            return self._file_node(parent, name, Found(st, UPPER))[0]
        number = self.next_number
        self.next_number = number + 1
        node = File(number, ino, stat.S_IFREG, (st.st_dev, real))
        node.names[(parent, name)] = True
        parent.pins += 1
        parent.entries[name] = self.nodes[number] = self.by_ino[ino] = node
        return node

    @staticmethod
    def index_name(ino: int) -> bytes:
        """Name of a file in the index of hard links."""
        return b"%016x" % ino

    def _indexed(self, index: bytes) -> Status | None:
        return native.seek(self.index, index)

    # -- listings -----------------------------------------------------------------------

    def listing(self, folder: Dir) -> Listing:
        """The merged entries of a folder, read on first use."""
        if folder.listing is None:
            folder.listing = self._read_listing(folder)
        return folder.listing

    def _read_listing(self, folder: Dir) -> Listing:
        listing = Listing()
        if folder.dead:
            return listing
        hidden: set[bytes] = set()
        merged: set[bytes] = set()
        piles = [UPPER] if folder.upper else []
        piles.extend(range(len(folder.lowers)))
        for index in piles:
            self._read_one(folder, index, listing, hidden, merged)
        for name in merged:
            found = self.find(folder, name)
            if found is not None:
                listing.put(name, self.shown_ino(folder, name, found)[0], _kind(found.st.st_mode))
        return listing

    def _read_one(
        self, folder: Dir, index: int, listing: Listing, hidden: set[bytes], merged: set[bytes]
    ) -> None:
        """Add the entries of one layer that no layer above has or hides."""
        if index == UPPER:
            fd, layer, impure = self.upper_fd(folder), self.stack.upper, folder.impure
        else:
            fd, layer = self.lower_fd(folder, index), folder.lowers[index].layer
            impure = self._lower_impure(folder, index)
        assert layer is not None
        several = bool(folder.lowers) and len(folder.lowers) + folder.upper > 1
        with os.scandir(layers.descriptor_path(fd)) as entries:
            for entry in entries:
                name = entry.name
                if several and (name in hidden or name in listing):
                    continue
                if entry.is_file(follow_symlinks=False):
                    kind = stat.S_IFREG >> 12
                elif entry.is_dir(follow_symlinks=False):
                    kind = stat.S_IFDIR >> 12
                    if several:
                        merged.add(name)
                elif entry.is_symlink():
                    kind = stat.S_IFLNK >> 12
                else:
                    try:
                        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if is_whiteout(st):
                        hidden.add(name)
                        continue
                    kind = _kind(st.st_mode)
                if impure:
                    merged.add(name)
                listing.put(name, self.stack.number(layer, entry.inode()), kind)


def seen_as_whiteout(st: Status) -> Status:
    """The attributes with the type of a whiteout: character device 0:0."""
    same = {each: getattr(st, each) for each in Shown.__slots__ if each != "st_mode"}
    return Shown(stat.S_IFCHR | 0o600, **same)


def _kind(mode: int) -> int:
    return stat.S_IFMT(mode) >> 12
