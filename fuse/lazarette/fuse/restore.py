"""Making a union go on where its journal says that the server before stopped.

Nodes are found again by their names, one by one; those without a name by the descriptor that
held them.  What is not found (someone changed the layers) is answered ESTALE.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat

from lazarette.fuse import dirty
from lazarette.fuse.files import Files
from lazarette.fuse.journal import (
    DEAD,
    IS_DIR,
    UPPER_BACKING,
    WRITABLE_BACKING,
    WRITTEN,
    HandleState,
    Intent,
    NodeState,
    State,
)
from lazarette.fuse.nodes import Dir, File, Handle, LowerFile, Node
from lazarette.fuse.protocol import Opcode
from lazarette.fuse.syscalls import RENAME_EXCHANGE
from lazarette.fuse.tree import Tree

_SOMEWHERE = 1 << 30
"""``NodeState.lower`` of a file whose removal was not noted."""

_NO_ENTRY = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


class Restorer:
    """Rebuilds nodes and handles.

    Args:
        tree, files: of a union nobody uses yet.
        record: of changes, to note files that a mapping may still write to.
        state: what the journal says; intents that took effect are entered into it.

    Attributes:
        lost: nodes that were not found again.
    """

    def __init__(
        self, tree: Tree, files: Files, record: dirty.DirtyPaths | None, state: State
    ) -> None:
        self._tree = tree
        self._files = files
        self._record = record
        self._state = state
        self._failed: set[int] = set()
        self.lost = 0

    def run(self) -> None:
        """Rebuild everything."""
        state = self._state
        self._settle_intents()
        opened = {each.node for each in state.handles.values()}
        for number, wanted in list(state.nodes.items()):
            if self._node(number) is None and (number in opened or not wanted.flags & DEAD):
                # One that has neither name nor opens was just being forgotten.
                self.lost += 1
        for each in state.nodes.values():
            self._finish(each)
        for handle in state.handles.values():
            self._handle(handle)
        self._tree.next_number = state.meta.next_node
        self._files.next_number = state.meta.next_handle

    # -- nodes --------------------------------------------------------------------------

    def _node(self, number: int) -> Node | None:
        """The node called ``number``, made with its parents if need be."""
        known = self._tree.nodes.get(number)
        if known is not None:
            return known
        wanted = self._state.nodes.get(number)
        if wanted is None or number in self._failed:
            return None
        self._failed.add(number)  # also ends a circle, which a sound journal does not have
        try:
            node = self._dir(wanted) if wanted.flags & IS_DIR else self._file(wanted)
        except OSError as error:
            if error.errno not in _NO_ENTRY:
                raise
            return None
        if node is not None:
            self._failed.discard(number)
        return node

    def _parent(self, number: int) -> Dir | None:
        node = self._node(number)
        return node if isinstance(node, Dir) else None

    def _dir(self, wanted: NodeState) -> Dir | None:
        tree = self._tree
        if wanted.flags & DEAD:
            node = Dir(wanted.id, wanted.ino, None, b"", True, ())
            node.dead = True
            node.parent, node.pins = tree.root, 0
            tree.root.pins += 1
            if _is_open(wanted.orphan, wanted.real):
                node.fd = wanted.orphan
            tree.nodes[node.id] = node
            return node
        ((parent_id, name),) = wanted.names
        parent = self._parent(parent_id)
        if parent is None:
            return None
        tree.next_number = wanted.id
        found = tree.lookup(parent, name)
        if found is None or not isinstance(found[0], Dir) or found[0].id != wanted.id:
            return None
        self._number(found[0], wanted)
        return found[0]

    def _file(self, wanted: NodeState) -> File | None:
        tree = self._tree
        node: File | None = None
        if not wanted.flags & DEAD:
            for parent_id, name in wanted.names:
                parent = self._parent(parent_id)
                if parent is None:
                    continue
                tree.next_number = wanted.id
                found = tree.lookup(parent, name)
                if found is not None and isinstance(found[0], File) and found[0].id == wanted.id:
                    node = found[0]
        if node is None:
            held = _is_open(wanted.orphan, wanted.real)
            lower = self._lower(wanted)
            if not held and lower is None and not wanted.successor:
                return None
            node = File(wanted.id, wanted.ino, wanted.kind, wanted.real)
            node.lower = lower
            node.dead = bool(wanted.flags & DEAD)
            node.orphan = wanted.orphan if held else -1
            tree.nodes[node.id] = node
        self._number(node, wanted)
        return node

    def _lower(self, wanted: NodeState) -> LowerFile | None:
        """Where a file that was removed above lies below."""
        if wanted.lower < 0 or len(wanted.names) != 1:
            return None
        ((parent_id, name),) = wanted.names
        parent = self._parent(parent_id)
        if parent is None:
            return None
        if wanted.lower == _SOMEWHERE:
            found = self._tree.find_below(parent, name)
            if found is None or (found.st.st_dev, found.st.st_ino) != wanted.real:
                return None
            return LowerFile(parent, found.index, name)
        if wanted.lower >= len(parent.lowers):
            return None
        return LowerFile(parent, wanted.lower, name)

    def _number(self, node: Node, wanted: NodeState) -> None:
        """Give a node the inode number it had: that may depend on who was there first."""
        if node.ino != wanted.ino:
            if self._tree.by_ino.get(node.ino) is node:
                del self._tree.by_ino[node.ino]
            node.ino = wanted.ino
            self._tree.by_ino.setdefault(node.ino, node)

    def _finish(self, wanted: NodeState) -> None:
        node = self._tree.nodes.get(wanted.id)
        if node is None:
            return
        node.lookups = wanted.lookups
        if not isinstance(node, File):
            return
        node.backing = wanted.backing
        node.backing_upper = bool(wanted.backing_flags & UPPER_BACKING)
        node.backing_writable = bool(wanted.backing_flags & WRITABLE_BACKING)
        node.cached = True  # perhaps
        successor = self._tree.nodes.get(wanted.successor)
        if isinstance(successor, File):
            node.successor = successor
            # The name, and so the number, are the successor's.
            self._tree.by_ino[successor.ino] = successor
        if wanted.flags & WRITTEN:
            node.written = True
            if self._record is not None:
                self._record.writer(node)
        self._files.idle(node)

    def _handle(self, wanted: HandleState) -> None:
        node = self._tree.nodes.get(wanted.node)
        if not isinstance(node, File):
            return
        fd = wanted.fd if _is_open(wanted.fd, node.real) else -1
        self._files.adopt(wanted.number, Handle(node, wanted.flags, fd, wanted.through))

    # -- what was under way -------------------------------------------------------------

    def _settle_intents(self) -> None:
        """Enter the removal or renaming that was done, but not noted; at most one was."""
        state = self._state
        for unique, intent in list(state.intents.items()):
            if self._took_effect(intent):
                self._enter(intent)
                state.done[unique] = b""
                self._tree.forget_all()
                self._failed.clear()
                return

    def _shown(self, parent: int, name: bytes) -> int | None:
        """Inode number shown under a name now, None for no such name."""
        folder = self._parent(parent)
        if folder is None:
            raise OSError(errno.ESTALE, "folder is not found")
        found = self._tree.find(folder, name)
        return self._tree.shown_ino(folder, name, found)[0] if found is not None else None

    def _named(self, parent: int, name: bytes) -> NodeState | None:
        """The node the journal has under a name."""
        for node in self._state.nodes.values():
            if (parent, name) in node.names and not node.flags & DEAD and not node.successor:
                return node
        return None

    def _took_effect(self, intent: Intent) -> bool:
        with contextlib.suppress(OSError):
            if intent.opcode in (Opcode.UNLINK, Opcode.RMDIR):
                return self._shown(intent.parent, intent.name) is None
            moving = self._named(intent.parent, intent.name)
            if moving is None:
                return False
            there = self._shown(intent.parent2, intent.name2)
            replaced = self._named(intent.parent2, intent.name2)
            if replaced is not None and replaced.id == moving.id:
                return False  # two names of one file: nothing is done
            return there is not None and _same(there, moving.ino)
        return False

    def _enter(self, intent: Intent) -> None:
        """Change the journaled nodes as the request would have."""
        place, target = (intent.parent, intent.name), (intent.parent2, intent.name2)
        if intent.opcode in (Opcode.UNLINK, Opcode.RMDIR):
            self._vanish(self._named(*place), place)
            return
        moving, other = self._named(*place), self._named(*target)
        assert moving is not None
        if intent.flags & RENAME_EXCHANGE:
            if other is not None:
                other.names = [place if each == target else each for each in other.names]
        else:
            self._vanish(other, target)
        moving.names = [target if each == place else each for each in moving.names]

    @staticmethod
    def _vanish(node: NodeState | None, place: tuple[int, bytes]) -> None:
        """Take a name from a node."""
        if node is None:
            return
        if node.flags & IS_DIR:
            node.flags |= DEAD
            return
        if len(node.names) > 1:
            node.names.remove(place)
            return
        node.flags |= DEAD
        if node.orphan < 0:
            node.lower = _SOMEWHERE


def _same(one: int, other: int) -> bool:
    """Whether two inode numbers are one, whichever of two nodes with it came first."""
    return one == other or one == other ^ Tree.CONFLICT


def _is_open(fd: int, real: tuple[int, int]) -> bool:
    """Whether a descriptor is still what the journal says."""
    if fd < 0:
        return False
    try:
        st = os.fstat(fd)
    except OSError:
        return False
    return (st.st_dev, st.st_ino) == real


def is_connection(fd: int) -> bool:
    """Whether a descriptor is one of ``/dev/fuse``, of a mount that is still there."""
    try:
        st = os.fstat(fd)
    except OSError:
        return False
    if not stat.S_ISCHR(st.st_mode) or st.st_rdev != os.makedev(10, 229):
        return False
    asked = select.poll()
    asked.register(fd, 0)
    return not asked.poll(0)  # POLLERR once it was unmounted
