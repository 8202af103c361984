"""The C module does what its Python versions do."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazarette.fuse import native, records, requests, serving
from lazarette.fuse.filesystem import Sync
from lazarette.fuse.requests import Request
from lazarette.fuse.serving import NOT_ACCEPTED, NOT_BEGUN, RUN, UNHINDERED, UNUSUAL, Route

FIELDS = (
    *("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"),
    *("st_blocks", "st_blksize", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)


def test_the_c_module_is_built() -> None:
    assert native.status is not native.status_plain, "run scripts/setup"
    assert serving.serve is not serving.serve_plain, "run scripts/setup"
    assert records.Region is not records.RegionPlain, "run scripts/setup"


def values(st: native.Status | None) -> list[int]:
    assert st is not None
    return [getattr(st, name) for name in FIELDS]


def test_attributes_are_those_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "\udcff odd"
    path.write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to(path.name)
    os.utime(path, ns=(-1, 20_000_000_000 * 10**9 + 7))
    name, wanted = os.fsencode(path.name), os.stat(path)
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert values(native.seek(fd, name)) == values(wanted)
        assert values(native.status(fd, b"link", True)) == values(wanted)
        assert stat.S_ISLNK(native.status(fd, b"link", False).st_mode)
        assert values(native.status(None, os.fsencode(path), False)) == values(wanted)
        assert values(native.opened(fd)) == values(os.stat(tmp_path))
        assert native.seek(fd, b"nothing") is None
        with pytest.raises(FileNotFoundError, match="nothing"):
            native.status(fd, b"nothing", False)
        with pytest.raises(NotADirectoryError):
            native.seek(fd, name + b"/below")
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.opened(-7)


@pytest.mark.parametrize("times", [(1, 2), (-1, -1_500_000_000), (2**40, 5)])
def test_replies_are_the_same_bytes(tmp_path: Path, times: tuple[int, int]) -> None:
    path = tmp_path / "file"
    path.touch(0o640)
    os.utime(path, ns=times)
    ours, plain = native.status(None, os.fsencode(path), False), os.stat(path)
    wanted = native.entry_reply_plain(2**63, 2**62 + 1, plain, 3, 86400, 1)
    for st in (ours, plain, native.Shown(*values(plain))):
        assert native.entry_reply(2**63, 2**62 + 1, st, 3, 86400, 1) == wanted
        assert native.attr_reply(7, st, 1, 0) == native.attr_reply_plain(7, plain, 1, 0)
    name = os.fsencode(path)
    for links in (-1, 0, 5):
        wanted = native.attr_reply_plain(7, plain, 1 if links < 0 else links, 2)
        for attr_at in (native.attr_at, native.attr_at_plain):
            assert attr_at(None, name, False, 7, links, 2) == wanted
        with path.open() as stream:
            for attr_of in (native.attr_of, native.attr_of_plain):
                assert attr_of(stream.fileno(), 7, links, 2) == wanted
    device = os.stat("/dev/null")
    assert native.attr_reply(7, device, 1, 0) == native.attr_reply_plain(7, device, 1, 0)


@pytest.mark.parametrize("set_times", [native.set_times, native.set_times_plain])
def test_times_are_set_each_by_itself(tmp_path: Path, set_times: Callable[..., None]) -> None:
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=(5, 6))
    fd = os.open(tmp_path, os.O_PATH)
    try:
        set_times(fd, b"file", False, 0, native.UTIME_OMIT, -3, 250)
        st = path.stat()
        assert (st.st_atime_ns, st.st_mtime_ns) == (5, -3 * 10**9 + 250)
        set_times(fd, b"file", False, 0, native.UTIME_NOW, 0, native.UTIME_OMIT)
        assert path.stat().st_atime_ns > 10**18
        assert path.stat().st_mtime_ns == st.st_mtime_ns
        with pytest.raises(FileNotFoundError):
            set_times(fd, b"nothing", False, 0, 0, 0, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("body", [b"", b"body"])
def test_an_answer_is_one_message(body: bytes) -> None:
    receive, send = os.pipe()
    try:
        native.answer(send, 9, body)
        assert os.read(receive, 100) == struct.pack("=IiQ", 16 + len(body), 0, 9) + body
    finally:
        os.close(receive)
        os.close(send)


BOTH = pytest.mark.parametrize("kind", ["", "_plain"])


def call(name: str, kind: str) -> Callable[..., Any]:
    module = serving if name == "serve" else native
    function: Callable[..., Any] = getattr(module, name + kind)
    return function


@BOTH
def test_names_are_opened_and_removed(tmp_path: Path, kind: str) -> None:
    open_at, remove_file = call("open_at", kind), call("remove_file", kind)
    folder = os.open(tmp_path, os.O_PATH)
    try:
        fd = open_at(folder, b"f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        assert not os.get_inheritable(fd)
        assert os.stat(fd).st_mode == stat.S_IFREG | 0o600
        os.close(fd)
        with pytest.raises(FileExistsError):
            open_at(folder, b"f", os.O_CREAT | os.O_EXCL, 0o600)
        call("set_mode", kind)(folder, b"f", 0o640)
        assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
        call("set_owner", kind)(folder, b"f", False, -1, os.getgid())
        assert (tmp_path / "f").stat().st_uid == os.getuid()
        if os.geteuid() == 0:
            call("set_owner", kind)(folder, b"f", False, 2**32 - 2, 5)
            assert (tmp_path / "f").stat().st_uid == 2**32 - 2
        remove_file(folder, b"f")
        with pytest.raises(FileNotFoundError, match="f"):
            remove_file(folder, b"f")
        for change in ("set_mode", "set_owner"):
            with pytest.raises(FileNotFoundError):
                call(change, kind)(folder, b"f", *([0] if change == "set_mode" else [0, 0, 0]))
        with pytest.raises(OSError) as raised:
            call("backing_open", kind)(folder, folder)
        assert raised.value.errno in (errno.ENOTTY, errno.EBADF)
        with pytest.raises(OSError, match=r"."):
            call("backing_close", kind)(folder, 1)
    finally:
        os.close(folder)


class Notes:
    """A journal that only remembers."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, bytes]] = []
        self.commits = 0

    def done(self, unique: int, reply: bytes) -> None:
        self.replies.append((unique, reply))

    def commit(self) -> None:
        self.commits += 1


def message(opcode: int, unique: int, body: bytes) -> bytes:
    return requests.IN_HEADER.pack(40 + len(body), opcode, unique, 7, 1, 2, 3, 0, 0) + body


class Readers:
    """What lets a thread block, or not."""

    def __init__(self) -> None:
        self.free = True
        self.inside = 0
        self.entered = 0

    def enter(self) -> bool:
        self.inside += self.free
        self.entered += self.free
        return self.free

    def leave(self) -> None:
        self.inside -= 1


class Kernel:
    """The other end of the connection."""

    def __init__(self, kind: str) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.serve = call("serve", kind)
        self.lock = threading.Lock()
        self.journal = Notes()
        self.readers = Readers()
        self.routes: list[Route | None] = [None] * 8
        self.buffer = bytearray(9000)

    def run(self, *messages: bytes) -> tuple[Request, int, int, object]:
        for each in messages:
            self.theirs.send(each)
        request, size, why, outcome = self.serving()
        assert request is not None
        return request, size, why, outcome

    def serving(self) -> tuple[Request | None, int, int, object]:
        """Serve what comes."""
        result: tuple[Request | None, int, int, object] = self.serve(
            self.ours.fileno(),
            *(self.buffer, self.routes, Request, self.lock, self.journal, self.readers),
        )
        return result

    def replies(self) -> list[tuple[int, int, bytes]]:
        self.theirs.setblocking(False)
        found: list[tuple[int, int, bytes]] = []
        while True:
            try:
                data = self.theirs.recv(9000)
            except BlockingIOError:
                return found
            size, code, unique = struct.unpack_from("=IiQ", data)
            assert size == len(data)
            found.append((unique, code, data[16:]))

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@BOTH
def test_requests_are_taken_apart_as_their_parsers_do(kind: str) -> None:
    rng = random.Random(8)
    kernel = Kernel(kind)
    try:
        for parse, shape in requests.SHAPES.items():
            body = rng.randbytes(struct.calcsize("=" + shape.layout.decode().strip("=")))
            body += b"".join(
                rng.choice([b"n\xff me\0", b"x" * 255 + b"\0"]) for _ in range(shape.names)
            )
            wanted = parse(body)
            found: list[object] = []

            def method(request: Request, *values: object, found: list[object] = found) -> bytes:
                assert (request.node, request.uid, request.gid, request.pid) == (7, 1, 2, 3)
                found.extend(values)
                return b"ok"

            def handler(request: Request, view: memoryview, wanted: Any = wanted) -> bytes:
                assert bytes(view) == body  # noqa: B023 - called within the turn
                return method(request, *wanted if isinstance(wanted, tuple) else (wanted,))

            kernel.routes[3] = Route(handler, method, False, *shape)
            request, size, why, outcome = kernel.run(message(3, 5, body), message(9, 6, b"rest"))
            assert (request.opcode, request.unique, size) == (9, 6, 44)
            assert (why, outcome) == (NOT_BEGUN, None)
            assert found == (list(wanted) if isinstance(wanted, tuple) else [wanted])
            assert kernel.replies() == [(5, 0, b"ok")]
    finally:
        kernel.close()


@BOTH
def test_what_methods_give_is_answered(kind: str) -> None:
    kernel = Kernel(kind)
    outcomes: list[object] = [
        b"",
        b"x" * 8000,
        None,
        errno.ENODATA,
        FileNotFoundError(errno.ENOENT, "no"),
        OSError(errno.EBUSY, "busy"),
        OSError("without a number"),
    ]

    def handler(request: Request, body: memoryview) -> object:
        assert kernel.lock.locked()
        outcome = outcomes[body[0]]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    try:
        kernel.routes[1] = Route(handler)
        kernel.routes[2] = Route(handler, once=True)
        for opcode in (1, 2):
            calls = [message(opcode, 2 + index, bytes([index])) for index in range(len(outcomes))]
            assert kernel.run(*calls, message(0, 1, b""))[2] == NOT_BEGUN
            assert not kernel.lock.locked()
            assert kernel.replies() == [
                (2, 0, b""),
                (3, 0, b"x" * 8000),
                (5, -errno.ENODATA, b""),
                (6, -errno.ENOENT, b""),
                (7, -errno.EBUSY, b""),
                (8, -errno.EIO, b""),
            ]
        assert kernel.journal.replies == [(2, b""), (3, b"x" * 8000)]
        assert kernel.journal.commits == 2 * len(outcomes)
    finally:
        kernel.close()


@BOTH
def test_signals_are_handled_while_nothing_is_asked(kind: str) -> None:
    kernel = Kernel(kind)
    before = signal.signal(
        signal.SIGUSR1, lambda number, frame: kernel.theirs.send(message(9, 8, b""))
    )
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert kernel.run()[0].unique == 8
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        kernel.close()


@BOTH
def test_unusual_requests_are_for_the_caller(kind: str) -> None:
    kernel = Kernel(kind)
    failure = KeyError("a bug")

    def end(request: Request, body: memoryview) -> object:
        raise SystemExit(3)

    def handler(request: Request, body: memoryview) -> object:
        if body:
            raise failure
        return [1]

    try:
        kernel.routes[1] = Route(handler)
        for body, wanted in ((b"", [1]), (b"x", failure)):
            request, size, why, outcome = kernel.run(message(1, 4, body))
            assert (request.unique, size, why) == (4, 40 + len(body), UNUSUAL)
            assert outcome == wanted and kernel.lock.locked()
            kernel.lock.release()
        assert kernel.run(message(1, 4 | 1 << 63, b""))[2:] == (NOT_BEGUN, None)
        kernel.routes[2] = Route(end)
        with pytest.raises(SystemExit):
            kernel.run(message(2, 4, b""))
        kernel.lock.release()
        assert kernel.replies() == []
        kernel.routes[1] = Route(lambda request, body: b"reply")
        kernel.theirs.shutdown(socket.SHUT_RD)
        request, _, why, outcome = kernel.run(message(1, 6, b""))
        assert (request.unique, why) == (6, NOT_ACCEPTED) and not kernel.lock.locked()
        assert isinstance(outcome, BrokenPipeError)
        kernel.ours.close()
        with pytest.raises(OSError):
            kernel.serve(
                10_000,
                *(kernel.buffer, kernel.routes, Request, kernel.lock, kernel.journal),
                kernel.readers,
            )
    finally:
        kernel.close()


@BOTH
def test_a_run_of_requests_that_block_nobody_is_told(tmp_path: Path, kind: str) -> None:
    kernel = Kernel(kind)
    kernel.routes[1] = Route(lambda request, body: b"")
    kernel.routes[2] = Route(
        lambda request, body: Sync(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), False)
    )
    asked = [1] * 100 + [2] + [1] * (RUN + 5)
    answered = 0

    def ask() -> None:
        nonlocal answered
        for opcode in asked:
            kernel.theirs.send(message(opcode, 2, b""))
            if not kernel.theirs.recv(100):
                return
            answered += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert kernel.serving() == (None, 0, UNHINDERED, None)
        kernel.ours.shutdown(socket.SHUT_WR)
        asking.join()
        assert answered == 101 + RUN, "counted since the last one that blocked"
    finally:
        kernel.close()


@BOTH
@pytest.mark.parametrize("data_only", [False, True])
def test_a_descriptor_is_written_out_and_closed(tmp_path: Path, kind: str, data_only: bool) -> None:
    kernel = Kernel(kind)
    readers = kernel.readers
    given: list[Sync] = []

    def handler(request: Request, body: memoryview) -> object:
        fd = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR) if body else os.pipe()[0]
        given.append(Sync(fd, data_only))
        return given[-1]

    try:
        kernel.routes[1] = Route(handler, once=True)
        kernel.run(message(1, 2, b"file"), message(1, 3, b""), message(0, 1, b""))
        assert kernel.replies() == [(2, 0, b""), (3, -errno.EINVAL, b"")]
        assert not kernel.lock.locked() and kernel.journal.replies == []
        assert (readers.inside, readers.entered) == (0, 2)
        for sync in given:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(sync.fd)
        readers.free = False
        request, _, why, outcome = kernel.run(message(1, 4, b"file"))
        assert (request.unique, why, outcome) == (4, UNUSUAL, given[-1])
        assert kernel.lock.locked() and readers.inside == 0
        kernel.lock.release()
        assert given[-1].work() == b""
        readers.free = True
        kernel.theirs.shutdown(socket.SHUT_RD)
        request, _, why, outcome = kernel.run(message(1, 6, b"file"))
        assert (request.unique, why) == (6, NOT_ACCEPTED) and not kernel.lock.locked()
        assert isinstance(outcome, BrokenPipeError) and readers.inside == 0
    finally:
        kernel.close()


@BOTH
def test_records_count_when_they_are_committed(kind: str) -> None:
    memory, words = bytearray(4096), memoryview(bytearray(64)).cast("Q")
    region = (records.RegionPlain if kind else records.Region)(memory, words, 3, 8192, 5)
    assert region.commit() and words[3] == 0, "nothing was put"
    region.one(4, 2**64 - 1)
    region.pair(5, 6, 7)
    region.text(8, 9, b"body")
    region.put(b"as it is")
    region.handle(1, 2, 2**32 - 1, -1, True)
    file = (11, 12, 1, stat.S_IFREG, 3, -1, 2, 2**64 - 1, 14, -1)
    region.file(*file, 0, b"")
    region.file(*file, 15, b"name")
    assert words[3] == 0
    node = struct.Struct("=IBQQqIIiIQQQiiI")
    fields = (11, 12, 1, stat.S_IFREG, 3, -1, 2, 0, 2**64 - 1, 14, -1, -1)
    wanted = b"".join(
        [
            struct.pack("=IBQ", 13, 4, 2**64 - 1),
            struct.pack("=IBQQ", 21, 5, 6, 7),
            struct.pack("=IBQ", 17, 8, 9) + b"body",
            b"as it is",
            struct.pack("=IBQQIiI", 33, 8, 1, 2, 2**32 - 1, -1, 1),
            node.pack(node.size, 2, *fields, 0),
            node.pack(node.size + 16, 2, *fields, 1) + struct.pack("=QI", 15, 4) + b"name",
        ]
    )
    assert memory[5 : 5 + len(wanted)] == wanted
    assert region.commit() and words[3] == 8192 + 5 + len(wanted)
    region.put(bytes(4096))
    region.one(1, 1)
    assert not region.commit() and words[3] == 8192 + 5 + len(wanted), "one was left out"
    region.close()
    region.pair(1, 2, 3)
    assert not region.commit()
    memory.extend(b"nothing holds the memory any more")
