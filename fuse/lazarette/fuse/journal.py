"""What the kernel knows of this server, kept where a successor finds it.

The kernel goes on using node ids, file handles and backing ids whoever serves the mount.  A
server therefore notes each of them, before it answers, in memory that outlives it: a memfd
that its standby (:mod:`lazarette.fuse.standby`) shares.  Nothing of it is on disk: a mount does
not outlive the machine either.

Layout.  A header page of 64-bit integers, then a region of records; when that is full the
whole present state is written to another region, and then the header names that one.  The
last store of each step is one aligned integer, so SIGKILL leaves the state before the step or
after it.  A record is its length (32 bits), its kind (8 bits) and a body; later records replace
what earlier ones say.

A request whose effect is on disk but not in the journal can only be the one during which the
server was killed: all records of a request are committed at once, with the filesystem's lock
held.  Removing and renaming are announced before (:meth:`Journal.intend`), since what they
moved is not found again where the journal says.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from lazarette.fuse.nodes import Dir, File, Handle, Node
from lazarette.fuse.protocol import UNIQUE_RESEND
from lazarette.fuse.records import HANDLE_RECORD, NAME_RECORD, NODE_RECORD, Region

VERSION = 0x4C415A4A_00000001
"""First word of the header; changes with the meaning of any record."""

_PAGE = mmap.PAGESIZE
_FIRST_REGION = 256 << 10
_ROOM = 8
_MOST_ROOM = 8 << 20
"""A region has room for so many times what is in it at first, but no more bytes than this unless
its content alone takes more: writing all anew costs as much as a few requests for each node."""

_REMEMBERED = 1024
"""Replies and lookups a new region repeats: more than requests can be unanswered at a time."""

# words of the header
_VERSION, _ACTIVE, _SLOTS = 0, 1, 2  # two slots of start, head, end
_DEVICE, _LISTENER, _KEEPER, _ENDED, _HANDOVERS, _FAILURES = 8, 9, 10, 11, 12, 13

# kinds of records
META, NODE, GONE, LOOKUP, SEEN, FORGET, BACKING = 1, 2, 3, 4, 5, 6, 7
HANDLE, CLOSED = 8, 9
INTENT, CANCEL, DONE, ATTEMPT = 10, 11, 12, 13

_FRAME = struct.Struct("=IB")
_PAIR = struct.Struct("=IBQQ")
_ONE = struct.Struct("=IBQ")
_INTENT = struct.Struct("=IBQIQQII")
_BACKING = struct.Struct("=IBQiI")

DEAD, WRITTEN, IS_DIR = 1, 2, 4
UPPER_BACKING, WRITABLE_BACKING = 1, 2


class Meta(msgspec.Struct):
    """What a server is, beside its nodes.

    Attributes:
        spec: the JSON it was started with.
        granted, minor: what was agreed with the kernel.
        passthrough, reason: who reads and writes, and why.
        next_node, next_handle: numbers not given yet.
        extra: of the filesystem.
    """

    spec: bytes = b""
    granted: int = 0
    minor: int = 0
    passthrough: bool = False
    reason: str = ""
    next_node: int = 2
    next_handle: int = 1
    extra: dict[str, float] = {}


class NodeState(msgspec.Struct):
    """One node as journaled; fields as of :class:`lazarette.fuse.nodes.File`.

    Attributes:
        lower: of a file without a name that lies in a lower layer: which one of the folder
            that ``names`` then gives; else -1.
    """

    id: int
    ino: int
    lookups: int
    kind: int
    flags: int
    backing: int
    backing_flags: int
    successor: int
    real: tuple[int, int]
    orphan: int
    lower: int
    names: list[tuple[int, bytes]]


class HandleState(msgspec.Struct):
    """One open file as journaled."""

    number: int
    node: int
    flags: int
    fd: int
    through: bool


class Intent(msgspec.Struct):
    """A removal or renaming that was begun."""

    opcode: int
    flags: int
    parent: int
    name: bytes
    parent2: int
    name2: bytes


class State(msgspec.Struct):
    """All a journal says.

    Attributes:
        done: replies by request, of requests that must not be done twice.
        seen: nodes whose lookups a request counted.
        attempts: how often a repeated request was begun.
    """

    meta: Meta = msgspec.field(default_factory=Meta)
    nodes: dict[int, NodeState] = msgspec.field(default_factory=dict)
    handles: dict[int, HandleState] = msgspec.field(default_factory=dict)
    intents: dict[int, Intent] = msgspec.field(default_factory=dict)
    done: dict[int, bytes] = msgspec.field(default_factory=dict)
    seen: dict[int, list[int]] = msgspec.field(default_factory=dict)
    attempts: dict[int, int] = msgspec.field(default_factory=dict)

    def descriptors(self) -> set[int]:
        """Descriptors a successor must not close."""
        held = {node.orphan for node in self.nodes.values()}
        return {fd for fd in held | {each.fd for each in self.handles.values()} if fd >= 0}


class Journal:
    """Keeps nothing: of servers without a successor."""

    def commit(self) -> None:
        """Make what was noted since the last commit count, as one step."""

    def node(self, node: Node) -> None:
        """Note all that matters of a node, as it is now."""

    def lookup(self, node: int, unique: int) -> None:
        """A request counts one lookup of a node."""

    def forget(self, node: int, lookups: int) -> None:
        """The kernel gave lookups back."""

    def gone(self, node: int) -> None:
        """A node is forgotten."""

    def backing(self, node: File) -> None:
        """The backing file of a node changed."""

    def handle(self, number: int, handle: Handle) -> None:
        """A file was opened."""

    def closed(self, number: int) -> None:
        """A file was closed."""

    def done(self, unique: int, reply: bytes) -> None:
        """A request that must not be done twice is done."""

    def attempt(self, unique: int) -> int:
        """A request is begun that other servers had begun; how many."""
        return 0

    def intend(self, unique: int, intent: Intent) -> None:
        """A removal or renaming is about to be done; counts at once."""

    def cancel(self, unique: int) -> None:
        """It failed."""

    def rewrite(self) -> None:
        """Write the whole state anew."""


class Shared:
    """The memory itself.

    Args:
        fd: of the memfd.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, _PAGE)
        self.words = memoryview(self._page).cast("Q")
        if self.words[_VERSION] != VERSION:
            raise OSError(errno.EPROTO, "the journal is of another version")

    @classmethod
    def create(cls) -> Shared:
        """New memory, without state."""
        fd = os.memfd_create("lazarette-fuse", os.MFD_CLOEXEC)
        os.ftruncate(fd, _PAGE)
        os.pwrite(fd, VERSION.to_bytes(8, "little"), 0)
        return cls(fd)

    def _descriptor(self, word: int) -> int:
        return int(self.words[word]) - 1

    @property
    def device(self) -> int:
        """Descriptor of ``/dev/fuse``, -1 before the mount."""
        return self._descriptor(_DEVICE)

    @device.setter
    def device(self, fd: int) -> None:
        self.words[_DEVICE] = fd + 1

    @property
    def listener(self) -> int:
        """Descriptor of the control socket, -1 before there is one."""
        return self._descriptor(_LISTENER)

    @listener.setter
    def listener(self, fd: int) -> None:
        self.words[_LISTENER] = fd + 1

    @property
    def keeper(self) -> int:
        """Process that takes over when the server dies, 0 for none."""
        return int(self.words[_KEEPER])

    @keeper.setter
    def keeper(self, pid: int) -> None:
        self.words[_KEEPER] = pid

    @property
    def ended(self) -> bool:
        """The mount is gone: there is nothing to take over."""
        return bool(self.words[_ENDED])

    @ended.setter
    def ended(self, value: bool) -> None:
        self.words[_ENDED] = int(value)

    @property
    def handovers(self) -> int:
        """How many servers have served this mount before the present one."""
        return int(self.words[_HANDOVERS])

    @handovers.setter
    def handovers(self, count: int) -> None:
        self.words[_HANDOVERS] = count

    @property
    def failures(self) -> int:
        """Servers in a row that died before they could serve."""
        return int(self.words[_FAILURES])

    @failures.setter
    def failures(self, count: int) -> None:
        self.words[_FAILURES] = count

    def slot(self) -> tuple[int, int, int]:
        """Start, head and end of the region that counts."""
        base = _SLOTS + 3 * int(self.words[_ACTIVE])
        return int(self.words[base]), int(self.words[base + 1]), int(self.words[base + 2])

    def records(self) -> Iterator[tuple[int, memoryview]]:
        """Kind and body of each record."""
        start, head, _ = self.slot()
        data = memoryview(os.pread(self.fd, head - start, start))
        at = 0
        while at < len(data):
            length, kind = _FRAME.unpack_from(data, at)
            yield kind, data[at : at + length]
            at += length


class LiveJournal(Journal):
    """Keeps the journal of a server in shared memory; callers hold the filesystem's lock.

    Records are written behind the head of the region; committing moves the head.  Those for
    which there is no room are left out: the commit then writes the whole state anew.

    Args:
        shared: the memory.
        describe: gives the records of the whole present state.
        attempts: of the state that was taken over.
    """

    def __init__(
        self,
        shared: Shared,
        describe: Callable[[], Iterable[bytes]],
        attempts: dict[int, int],
    ) -> None:
        self._attempts = attempts
        self._shared = shared
        self._describe = describe
        self._words = shared.words
        self._data: mmap.mmap | None = None
        self._region = Region(bytearray(), shared.words, 0, 0, 0)
        self._region.close()
        self._intents: dict[int, bytes] = {}
        self._done: deque[tuple[int, bytes]] = deque(maxlen=_REMEMBERED)
        self._seen: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
        if shared.slot()[2]:
            self._remember()

    def _remember(self) -> None:
        """Keep what the server before did for requests that may not have been answered."""
        for kind, record in self._shared.records():
            if kind == DONE:
                self._done.append((_ONE.unpack_from(record)[2], bytes(record[_ONE.size :])))
            elif kind in (LOOKUP, SEEN):
                _, _, node, unique = _PAIR.unpack_from(record)
                self._seen.append((node, unique))

    # -- noting -------------------------------------------------------------------------

    def node(self, node: Node) -> None:
        """See the base."""
        if not isinstance(node, File) or node.successor is not None:
            self._region.put(node_record(node))
            return
        names = node.names
        if len(names) == 1:
            ((folder, name),) = names
            parent = folder.id
        elif names or node.lower is not None:
            self._region.put(node_record(node))
            return
        else:
            parent, name = 0, b""
        device, real = node.real
        self._region.file(
            node.id,
            node.ino,
            node.lookups,
            node.kind,
            node.dead * DEAD | node.written * WRITTEN,
            node.backing,
            node.backing_upper * UPPER_BACKING | node.backing_writable * WRITABLE_BACKING,
            device,
            real,
            node.orphan,
            parent,
            name,
        )

    def lookup(self, node: int, unique: int) -> None:
        """See the base."""
        self._seen.append((node, unique))
        self._region.pair(LOOKUP, node, unique)

    def forget(self, node: int, lookups: int) -> None:
        """See the base."""
        self._region.pair(FORGET, node, lookups)

    def gone(self, node: int) -> None:
        """See the base."""
        self._region.one(GONE, node)

    def backing(self, node: File) -> None:
        """See the base."""
        flags = node.backing_upper * UPPER_BACKING | node.backing_writable * WRITABLE_BACKING
        self._region.put(_BACKING.pack(_BACKING.size, BACKING, node.id, node.backing, flags))

    def handle(self, number: int, handle: Handle) -> None:
        """See the base."""
        node, flags = handle.node.id, handle.flags
        self._region.handle(number, node, flags, handle.fd, handle.through)

    def closed(self, number: int) -> None:
        """See the base."""
        self._region.one(CLOSED, number)

    def done(self, unique: int, reply: bytes) -> None:
        """See the base."""
        self._intents.pop(unique, None)
        unique &= ~UNIQUE_RESEND
        self._done.append((unique, reply))
        self._region.text(DONE, unique, reply)

    def attempt(self, unique: int) -> int:
        """See the base."""
        unique &= ~UNIQUE_RESEND
        before = self._attempts.get(unique, 0)
        self._attempts[unique] = before + 1
        self._region.pair(ATTEMPT, unique, before + 1)
        self.commit()
        return before

    def intend(self, unique: int, intent: Intent) -> None:
        """See the base."""
        head = _INTENT.pack(
            _INTENT.size + len(intent.name) + len(intent.name2),
            INTENT,
            unique & ~UNIQUE_RESEND,
            intent.opcode,
            intent.parent,
            intent.parent2,
            intent.flags,
            len(intent.name),
        )
        record = head + intent.name + intent.name2
        self._intents[unique] = record
        self._region.put(record)
        self.commit()

    def cancel(self, unique: int) -> None:
        """See the base."""
        if self._intents.pop(unique, None) is not None:
            self._region.one(CANCEL, unique & ~UNIQUE_RESEND)

    # -- storing ------------------------------------------------------------------------

    def commit(self) -> None:
        """See the base."""
        if not self._region.commit():
            self.rewrite()

    def rewrite(self) -> None:
        """See the base."""
        records = bytearray()
        for each in (*self._unanswered(), *self._describe(), *self._intents.values()):
            records += each
        for unique, count in list(self._attempts.items())[-_REMEMBERED:]:
            records += _PAIR.pack(21, ATTEMPT, unique, count)
        length = len(records)
        size = length + max(_FIRST_REGION, length, min(_ROOM * length, _MOST_ROOM))
        size += -size % _PAGE
        before_start, _, before_end = self._shared.slot()
        start = _PAGE
        if before_end and before_start - _PAGE < size:
            start = before_end
        if os.fstat(self._shared.fd).st_size < start + size:
            os.ftruncate(self._shared.fd, start + size)
        data = mmap.mmap(self._shared.fd, size, offset=start)
        data[:length] = bytes(records)
        slot = 1 - int(self._words[_ACTIVE]) if before_end else 0
        base = _SLOTS + 3 * slot
        self._words[base], self._words[base + 1] = start, start + length
        self._words[base + 2] = start + size
        self._words[_ACTIVE] = slot
        self._region.close()
        if self._data is not None:
            self._data.close()
        self._data = data
        self._region = Region(data, self._words, base + 1, start, length)
        if start == _PAGE:
            os.ftruncate(self._shared.fd, start + size)

    def _unanswered(self) -> Iterator[bytes]:
        """Records about requests whose replies may not have reached the kernel."""
        for unique, reply in self._done:
            yield _ONE.pack(13 + len(reply), DONE, unique) + reply
        for node, unique in self._seen:
            yield _PAIR.pack(21, SEEN, node, unique & ~UNIQUE_RESEND)


def meta_record(meta: Meta) -> bytes:
    """What the server is."""
    body = msgspec.msgpack.encode(meta)
    return _FRAME.pack(5 + len(body), META) + body


def handle_record(number: int, handle: Handle) -> bytes:
    """An open file."""
    return HANDLE_RECORD.pack(
        HANDLE_RECORD.size,
        HANDLE,
        number,
        handle.node.id,
        handle.flags & 0xFFFFFFFF,
        handle.fd,
        handle.through,
    )


def node_record(node: Node) -> bytes:
    """All that matters of a node, as it is now."""
    if isinstance(node, File):
        return _file_record(node)
    assert isinstance(node, Dir)
    flags = IS_DIR | (DEAD if node.dead else 0)
    real, orphan = (0, 0), -1
    if node.dead and node.fd >= 0:
        st = os.fstat(node.fd)
        real, orphan = (st.st_dev, st.st_ino), node.fd
    name = node.name
    length = NODE_RECORD.size + NAME_RECORD.size + len(name)
    head = NODE_RECORD.pack(
        length, NODE, node.id, node.ino, node.lookups, 0, flags, 0, 0, 0, *real, orphan, -1, 1
    )
    return head + NAME_RECORD.pack(node.parent.id, len(name)) + name


def _file_record(node: File) -> bytes:
    flags = (DEAD if node.dead else 0) | (WRITTEN if node.written else 0)
    backing_flags = node.backing_upper * UPPER_BACKING | node.backing_writable * WRITABLE_BACKING
    successor = node.successor.id if node.successor is not None else 0
    lower, count = -1, len(node.names)
    if count == 1:
        ((folder, name),) = node.names
        tail = NAME_RECORD.pack(folder.id, len(name)) + name
    elif count:
        tail = b"".join([NAME_RECORD.pack(each.id, len(name)) + name for each, name in node.names])
    elif node.lower is not None and not successor:
        name, lower, count = node.lower.name, node.lower.index, 1
        tail = NAME_RECORD.pack(node.lower.folder.id, len(name)) + name
    else:
        tail = b""
    device, ino = node.real
    head = NODE_RECORD.pack(
        NODE_RECORD.size + len(tail),
        NODE,
        node.id,
        node.ino,
        node.lookups,
        node.kind,
        flags,
        node.backing,
        backing_flags,
        successor,
        device,
        ino,
        node.orphan,
        lower,
        count,
    )
    return head + tail


def _parse_node(record: memoryview) -> NodeState:
    fields = NODE_RECORD.unpack_from(record)
    _, _, number, ino, lookups, kind, flags, backing, backing_flags, successor = fields[:10]
    names = []
    at = NODE_RECORD.size
    for _ in range(fields[14]):
        parent, length = NAME_RECORD.unpack_from(record, at)
        at += NAME_RECORD.size
        names.append((parent, bytes(record[at : at + length])))
        at += length
    return NodeState(
        number,
        ino,
        lookups,
        kind,
        flags,
        backing,
        backing_flags,
        successor,
        (fields[10], fields[11]),
        fields[12],
        fields[13],
        names,
    )


def read(shared: Shared) -> State:
    """What the journal in ``shared`` says."""
    state = State()
    nodes = state.nodes
    for kind, record in shared.records():
        if kind == LOOKUP:
            _, _, number, unique = _PAIR.unpack_from(record)
            if number in nodes:
                nodes[number].lookups += 1
            state.seen.setdefault(unique & ~UNIQUE_RESEND, []).append(number)
        elif kind == NODE:
            node = _parse_node(record)
            nodes[node.id] = node
            state.meta.next_node = max(state.meta.next_node, node.id + 1)
        elif kind == FORGET:
            _, _, number, count = _PAIR.unpack_from(record)
            if number in nodes:
                nodes[number].lookups -= count
        elif kind == GONE:
            nodes.pop(_ONE.unpack_from(record)[2], None)
        elif kind == HANDLE:
            _, _, number, owner, flags, fd, through = HANDLE_RECORD.unpack_from(record)
            state.handles[number] = HandleState(number, owner, flags, fd, bool(through))
            state.meta.next_handle = max(state.meta.next_handle, number + 1)
            if flags & os.O_ACCMODE != os.O_RDONLY and owner in nodes:
                nodes[owner].flags |= WRITTEN
        elif kind == CLOSED:
            state.handles.pop(_ONE.unpack_from(record)[2], None)
        elif kind == BACKING:
            _, _, number, backing, flags = _BACKING.unpack_from(record)
            if number in nodes:
                nodes[number].backing, nodes[number].backing_flags = backing, flags
        else:
            _read_request(state, kind, record)
    return state


def _read_request(state: State, kind: int, record: memoryview) -> None:
    """Records about requests, and of the server as a whole."""
    if kind == META:
        state.meta = msgspec.msgpack.decode(record[_FRAME.size :], type=Meta)
    elif kind == INTENT:
        _, _, unique, opcode, parent, parent2, flags, length = _INTENT.unpack_from(record)
        names = bytes(record[_INTENT.size :])
        state.intents[unique] = Intent(
            opcode, flags, parent, names[:length], parent2, names[length:]
        )
    elif kind == ATTEMPT:
        _, _, unique, count = _PAIR.unpack_from(record)
        state.attempts[unique] = count
    elif kind == SEEN:
        _, _, number, unique = _PAIR.unpack_from(record)
        state.seen.setdefault(unique, []).append(number)
    else:
        unique = _ONE.unpack_from(record)[2]
        state.intents.pop(unique, None)
        if kind == DONE:
            state.done[unique] = bytes(record[_ONE.size :])
