"""The journal, and unions that go on from one: the server's death at each awkward instant.

No mount is needed: requests are given to the filesystem as the server gives them, and a second
filesystem on the same layers reads the memory that the first left.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazarette.fuse import journal, replies
from lazarette.fuse.journal import Meta, Shared
from lazarette.fuse.nodes import File
from lazarette.fuse.protocol import UNIQUE_RESEND, Opcode
from lazarette.fuse.requests import CreateIn, MkdirIn, OpenIn, RenameIn, Request, SetxattrIn
from lazarette.fuse.union import UnionFilesystem, UnionOptions

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts need root")

ROOT = 1


class Killed(BaseException):
    """The server dies here."""


class Served:
    """A union without a kernel, which can die and be followed by another."""

    def __init__(self, base: Path) -> None:
        for name in ("lower", "upper", "work"):
            (base / name).mkdir()
        self.base = base
        self.upper = base / "upper"
        self.shared = Shared.create()
        self.unique = 0
        self.done: dict[int, bytes] = {}
        self.seen: dict[int, list[int]] = {}
        self.fs = self._make()
        self.fs.keep_journal(self.shared, Meta(b"{}"))

    def _make(self) -> UnionFilesystem:
        base = self.base
        return UnionFilesystem(
            UnionOptions([str(base / "lower")], str(base / "upper"), str(base / "work"))
        )

    def succeed(self) -> int:
        """Another server takes over; how many nodes it did not find."""
        state = journal.read(self.shared)
        self.fs = self._make()
        lost = self.fs.resume(state)
        self.done, self.seen = state.done, state.seen
        self.fs.keep_journal(self.shared, state.meta)
        return lost

    def request(self, node: int, opcode: int = 0, resent: bool = False) -> Request:
        if not resent:
            self.unique += 2
        unique = self.unique | (UNIQUE_RESEND if resent else 0)
        return Request(0, opcode, unique, node, 0, 0, 1, 0, 0)

    def ask(self, call: Callable[[], object]) -> bytes:
        """Run a request to its end."""
        with self.fs.lock:
            reply = call()
            assert isinstance(reply, bytes)
            self.fs.journal.done(self.unique, reply)
            self.fs.journal.commit()
        return reply

    def lookup(self, name: bytes, parent: int = ROOT) -> int:
        reply = self.ask(lambda: self.fs.lookup(self.request(parent), name))
        return int(struct.unpack_from("=Q", reply)[0])

    def mkdir(self, name: bytes, parent: int = ROOT) -> int:
        args = MkdirIn(0o755, 0)
        reply = self.ask(lambda: self.fs.mkdir(self.request(parent), args, name))
        return int(struct.unpack_from("=Q", reply)[0])

    def create(self, name: bytes, parent: int = ROOT) -> tuple[int, int]:
        args = CreateIn(os.O_RDWR, stat.S_IFREG | 0o644, 0, 0)
        reply = self.ask(lambda: self.fs.create(self.request(parent), args, name))
        node, handle = struct.unpack_from("=Q", reply)[0], reply[replies.ENTRY_SIZE :]
        return node, int(struct.unpack_from("=Q", handle)[0])

    def die_in(self, call: Callable[[], object]) -> None:
        """Do what a request does on disk, and die before it is noted."""
        live = self.fs.tree.journal
        commit = live.commit
        done_on_disk = False

        def stop() -> None:
            nonlocal done_on_disk
            if done_on_disk:
                raise Killed
            commit()

        live.commit = stop  # type: ignore[method-assign]
        call()
        done_on_disk = True
        with pytest.raises(Killed):
            live.commit()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    os.close(served.shared.fd)


def file(served: Served, number: int) -> File:
    node = served.fs.tree.node(number)
    assert isinstance(node, File)
    return node


def test_nodes_and_handles_are_there_again(served: Served) -> None:
    (served.base / "lower/low").write_bytes(b"low")
    low = served.lookup(b"low")
    folder = served.mkdir(b"d")
    made, handle = served.create(b"f", folder)
    os.pwrite(served.fs.files.handles[handle].fd, b"data", 0)
    inos = {number: served.fs.tree.node(number).ino for number in (low, folder, made)}
    assert served.succeed() == 0
    assert {number: served.fs.tree.node(number).ino for number in (low, folder, made)} == inos
    assert not file(served, low).upper
    assert file(served, made).writers == 1
    assert os.pread(served.fs.files.handles[handle].fd, 9, 0) == b"data"
    assert served.lookup(b"f", folder) == made
    assert served.create(b"g")[0] > made


def test_forgotten_nodes_and_closed_handles_are_not(served: Served) -> None:
    made, handle = served.create(b"f")
    kept = served.mkdir(b"d")
    inner, other = served.create(b"g", kept)
    for each in (handle, other):
        served.fs.files.release(each)
    served.fs.forget(made, 1)
    served.fs.forget(kept, 1)
    served.fs.journal.commit()
    assert served.succeed() == 0
    nodes = served.fs.tree.nodes
    assert made not in nodes and served.fs.files.handles == {}
    assert inner in nodes and kept in nodes, "a folder stays while a name in it is known"
    served.fs.forget(inner, 1)
    assert set(nodes) == {ROOT}


def test_a_removed_file_is_reached_by_its_descriptor(served: Served) -> None:
    made, handle = served.create(b"f")
    os.pwrite(served.fs.files.handles[handle].fd, b"data", 0)
    served.ask(lambda: served.fs.unlink(served.request(ROOT, Opcode.UNLINK), b"f"))
    assert served.succeed() == 0
    assert file(served, made).dead
    assert served.fs.tree.stat(file(served, made)).st_nlink == 0
    assert os.pread(served.fs.files.handles[handle].fd, 9, 0) == b"data"


@pytest.mark.parametrize("place", ["lower", "upper"])
def test_dying_in_unlink(served: Served, place: str) -> None:
    (served.base / place / "f").write_bytes(b"data")
    made = served.lookup(b"f")
    request = served.request(ROOT, Opcode.UNLINK)
    served.die_in(lambda: served.fs.unlink(request, b"f"))
    assert served.succeed() == 0
    assert served.done[request.unique] == b"", "the repeated request is answered, not done"
    assert file(served, made).dead
    fd = served.fs.tree.open(file(served, made), os.O_RDONLY)
    assert os.read(fd, 9) == b"data"
    os.close(fd)
    assert served.lookup(b"f") == 0


def test_dying_before_unlink(served: Served) -> None:
    made, _ = served.create(b"f")
    request = served.request(ROOT, Opcode.UNLINK)
    intent = journal.Intent(Opcode.UNLINK, 0, ROOT, b"f", 0, b"")
    served.fs.journal.intend(request.unique, intent)
    assert served.succeed() == 0
    assert request.unique not in served.done
    assert not file(served, made).dead


@pytest.mark.parametrize("flags", [0, 2])
def test_dying_in_rename(served: Served, flags: int) -> None:
    """Of a folder with something known below it, over (or with) another one."""
    one, other = served.mkdir(b"one"), served.mkdir(b"other")
    inner, _ = served.create(b"f", one)
    request = served.request(ROOT, Opcode.RENAME2)
    served.die_in(lambda: served.fs.rename(request, RenameIn(ROOT, flags), b"one", b"other"))
    assert served.succeed() == 0
    assert served.done[request.unique] == b""
    assert served.lookup(b"other") == one
    assert served.lookup(b"f", one) == inner
    assert served.lookup(b"one") == (other if flags else 0)
    assert served.fs.tree.node(other).dead == (not flags)


def test_dying_in_rename_of_a_lower_file(served: Served) -> None:
    (served.base / "lower/low").write_bytes(b"low")
    low = served.lookup(b"low")
    ino = file(served, low).ino
    request = served.request(ROOT, Opcode.RENAME2)
    served.die_in(lambda: served.fs.rename(request, RenameIn(ROOT, 0), b"low", b"new"))
    assert served.succeed() == 0
    assert served.lookup(b"new") == low and served.lookup(b"low") == 0
    assert file(served, low).ino == ino and file(served, low).upper


def test_requests_that_make_something_may_come_twice(served: Served) -> None:
    """They were done, and neither noted nor answered: the successor takes what is there."""
    fs = served.fs
    made = CreateIn(os.O_RDWR, stat.S_IFREG | 0o640, 0, 0)
    calls: list[Callable[[Request], object]] = [
        lambda request: served.fs.mkdir(request, MkdirIn(0o750, 0), b"d"),
        lambda request: served.fs.symlink(request, b"s", b"target"),
        lambda request: served.fs.create(request, made, b"f"),
    ]
    for call in calls:
        served.die_in(lambda call=call: call(served.request(ROOT)))  # type: ignore[misc]
        assert served.succeed() == 0
        served.ask(lambda call=call: call(served.request(ROOT, resent=True)))  # type: ignore[misc]
        with pytest.raises(FileExistsError):
            call(served.request(ROOT))
    assert fs is not served.fs
    modes = {each.name: oct(each.lstat().st_mode & 0o777) for each in served.upper.iterdir()}
    assert modes == {"d": "0o750", "f": "0o640", "s": "0o777"}
    number = served.lookup(b"f")
    served.die_in(lambda: served.fs.link(served.request(ROOT), number, b"l"))
    assert served.succeed() == 0
    served.ask(lambda: served.fs.link(served.request(ROOT, resent=True), number, b"l"))
    assert (served.upper / "l").samefile(served.upper / "f")
    args = SetxattrIn(1, os.XATTR_CREATE, 0)
    served.die_in(lambda: served.fs.setxattr(served.request(number), args, b"user.x", b"1"))
    assert served.succeed() == 0
    again = served.request(number, resent=True)
    served.ask(lambda: served.fs.setxattr(again, args, b"user.x", b"1"))


def test_an_answer_that_was_noted_is_given_again(served: Served) -> None:
    """Also by the second successor."""
    reply = served.ask(lambda: served.fs.mkdir(served.request(ROOT), MkdirIn(0o755, 0), b"d"))
    served.succeed()
    served.succeed()
    assert served.done[served.unique] == reply


def test_a_lookup_that_was_not_answered_counts_once(served: Served) -> None:
    (served.upper / "f").touch()
    number = served.lookup(b"f")
    served.succeed()
    served.fs.unsee(served.seen[served.unique])
    served.fs.lookup(served.request(ROOT, resent=True), b"f")
    served.fs.forget(number, 1)
    assert number not in served.fs.tree.nodes


def test_readers_of_a_file_copied_up_keep_their_node(served: Served) -> None:
    (served.base / "lower/low").write_bytes(b"low")
    low = served.lookup(b"low")
    node = file(served, low)
    node.through = 1  # as if the kernel read the lower file itself
    with pytest.raises(OSError):
        served.fs.open(served.request(low), OpenIn(os.O_RDWR, 0))
    served.fs.journal.commit()
    new = served.lookup(b"low")
    assert new != low
    assert served.succeed() == 0
    assert served.fs.tree.node(low) is served.fs.tree.node(new)
    assert served.lookup(b"low") == new


def test_the_journal_is_written_anew_when_it_is_full(served: Served) -> None:
    numbers = [served.mkdir(b"d%d" % index) for index in range(300)]
    regions = {served.shared.slot()[0]}
    for _ in range(8):
        for index in range(300):
            served.lookup(b"d%d" % index)
            regions.add(served.shared.slot()[0])
    assert len(regions) > 1
    size = os.fstat(served.shared.fd).st_size
    assert size < 8 << 20, "what is noted again takes the place of what was"
    assert served.succeed() == 0
    assert [served.fs.tree.node(number).lookups for number in numbers] == [9] * 300
