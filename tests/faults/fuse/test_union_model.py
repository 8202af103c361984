"""A union against a model in memory, over random operations, remounts, kills and copy-ups.

``LAZ_EXAMPLES`` sets how many random runs are made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.unions import Union, kill, kill_mount, prepare

from lazarette.fuse import mount

EXAMPLES = int(os.environ.get("LAZ_EXAMPLES", "3"))

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.timeout(max(300, 60 * EXAMPLES)),
]

NAMES = ("a", "b", "c")
names = st.sampled_from(NAMES)
paths = st.lists(names, min_size=1, max_size=3).map(tuple)
Path_ = tuple[str, ...]


@dataclass(eq=False)
class FileNode:
    data: bytearray
    mode: int = 0o644
    hidden: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class DirNode:
    entries: dict[str, FileNode | DirNode] = field(default_factory=dict)
    lower: bool = False


class Model:
    """What POSIX says a tree does; errors are raised as ``OSError``."""

    def __init__(self) -> None:
        self.root = DirNode()

    def find(self, path: Path_) -> FileNode | DirNode:
        node: FileNode | DirNode = self.root
        for name in path:
            if isinstance(node, FileNode):
                raise OSError(errno.ENOTDIR, "")
            if name not in node.entries:
                raise OSError(errno.ENOENT, "")
            node = node.entries[name]
        return node

    def parent(self, path: Path_) -> DirNode:
        node = self.find(path[:-1])
        if isinstance(node, FileNode):
            raise OSError(errno.ENOTDIR, "")
        return node

    def file(self, path: Path_) -> FileNode:
        node = self.find(path)
        if isinstance(node, DirNode):
            raise OSError(errno.EISDIR, "")
        return node

    def write(self, path: Path_, offset: int, data: bytes) -> None:
        file = self.file(path)
        if offset > len(file.data):
            file.data.extend(bytes(offset - len(file.data)))
        file.data[offset : offset + len(data)] = data

    def create(self, path: Path_, data: bytes) -> None:
        parent = self.parent(path)
        if path[-1] in parent.entries:
            raise OSError(errno.EEXIST, "")
        parent.entries[path[-1]] = FileNode(bytearray(data))

    def mkdir(self, path: Path_) -> None:
        parent = self.parent(path)
        if path[-1] in parent.entries:
            raise OSError(errno.EEXIST, "")
        parent.entries[path[-1]] = DirNode()

    def unlink(self, path: Path_) -> None:
        self.file(path)
        del self.parent(path).entries[path[-1]]

    def rmdir(self, path: Path_) -> None:
        node = self.find(path)
        if isinstance(node, FileNode):
            raise OSError(errno.ENOTDIR, "")
        if node.entries:
            raise OSError(errno.ENOTEMPTY, "")
        del self.parent(path).entries[path[-1]]

    def link(self, old: Path_, new: Path_) -> None:
        node = self.find(old)
        parent = self.parent(new)
        if new[-1] in parent.entries:
            raise OSError(errno.EEXIST, "")
        if isinstance(node, DirNode):
            raise OSError(errno.EPERM, "")
        parent.entries[new[-1]] = node

    def rename(self, old: Path_, new: Path_) -> None:
        source, target_dir = self.parent(old), self.parent(new)
        if old[-1] not in source.entries:
            raise OSError(errno.ENOENT, "")
        node = source.entries[old[-1]]
        if isinstance(node, DirNode) and new[: len(old)] == old and new != old:
            raise OSError(errno.EINVAL, "")
        target = target_dir.entries.get(new[-1])
        if old[: len(new)] == new and old != new:
            raise OSError(errno.ENOTEMPTY, "")
        if target is node:
            return
        if isinstance(target, DirNode):
            if isinstance(node, FileNode):
                raise OSError(errno.EISDIR, "")
            if target.entries:
                raise OSError(errno.ENOTEMPTY, "")
        elif target is not None and isinstance(node, DirNode):
            raise OSError(errno.ENOTDIR, "")
        if isinstance(node, DirNode) and node.lower:
            raise OSError(errno.EXDEV, "")
        del source.entries[old[-1]]
        target_dir.entries[new[-1]] = node


class UnionMachine(RuleBasedStateMachine):
    """Every operation on both; results and, after each, the whole trees are equal."""

    passthrough = True
    redirect = False

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="laz-model-"))
        self.model = Model()
        self.union: Union = prepare(
            self.base, lowers=2, passthrough=self.passthrough, redirect=self.redirect
        )
        self.numbers: dict[FileNode, int] = {}

    @initialize(top=st.sets(paths, max_size=5), bottom=st.sets(paths, max_size=5))
    def layers(self, top: set[Path_], bottom: set[Path_]) -> None:
        for index, wanted in ((1, bottom), (0, top)):
            for path in sorted(wanted):
                with contextlib.suppress(OSError):
                    target = self.union.lower(index).joinpath(*path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes("/".join(path).encode() * (index + 1))
        with contextlib.suppress(OSError):
            os.link(self.union.lower(1) / "a", self.union.lower(1) / "c")
        self.union.mounted.start()
        self.adopt((), self.model.root, {})

    def adopt(self, path: Path_, folder: DirNode, seen: dict[int, FileNode]) -> None:
        """The model starts as what two layers merge to."""
        candidates: dict[str, Path] = {}
        hidden: list[int] = []
        for index in (0, 1):
            here = self.union.lower(index).joinpath(*path)
            if here.is_dir():
                for child in here.iterdir():
                    if candidates.setdefault(child.name, child) is not child:
                        hidden.append(child.stat().st_ino)
            elif here.exists():
                break
        for name, child in candidates.items():
            if child.is_dir():
                folder.entries[name] = deeper = DirNode(lower=True)
                self.adopt((*path, name), deeper, seen)
            else:
                known = seen.setdefault(
                    child.stat().st_ino, FileNode(bytearray(child.read_bytes()))
                )
                # Links that another layer hides count, as with the kernel's overlay.
                known.hidden += hidden.count(child.stat().st_ino)
                folder.entries[name] = known

    def path(self, path: Path_) -> Path:
        return self.union.root.joinpath(*path)

    def both(self, real: object, model: object) -> None:
        """Run both; the same error, or none."""
        results = []
        for each in (real, model):
            assert callable(each)
            try:
                each()
            except OSError as error:
                results.append(error.errno)
            else:
                results.append(0)
        same = {errno.EEXIST: errno.ENOTEMPTY}
        assert same.get(results[0], results[0]) == same.get(results[1], results[1]), results

    @rule(path=paths, data=st.binary(max_size=40))
    def create(self, path: Path_, data: bytes) -> None:
        def real() -> None:
            with self.path(path).open("xb") as stream:
                stream.write(data)

        self.both(real, lambda: self.model.create(path, data))

    @rule(path=paths, offset=st.integers(0, 9000), data=st.binary(min_size=1, max_size=5000))
    def write(self, path: Path_, offset: int, data: bytes) -> None:
        def real() -> None:
            fd = os.open(self.path(path), os.O_WRONLY)
            try:
                os.pwrite(fd, data, offset)
            finally:
                os.close(fd)

        self.both(real, lambda: self.model.write(path, offset, data))

    @rule(path=paths, size=st.integers(0, 300))
    def truncate(self, path: Path_, size: int) -> None:
        def model() -> None:
            file = self.model.file(path)
            del file.data[size:]
            file.data.extend(bytes(size - len(file.data)))

        self.both(lambda: os.truncate(self.path(path), size), model)

    @rule(path=paths, mode=st.sampled_from((0o600, 0o755)))
    def chmod(self, path: Path_, mode: int) -> None:
        def model() -> None:
            node = self.model.find(path)
            if isinstance(node, FileNode):
                node.mode = mode

        self.both(lambda: os.chmod(self.path(path), mode), model)

    @rule(path=paths, value=st.binary(max_size=10))
    def setxattr(self, path: Path_, value: bytes) -> None:
        def model() -> None:
            node = self.model.find(path)
            if isinstance(node, FileNode):
                node.xattrs["user.x"] = value

        self.both(lambda: os.setxattr(self.path(path), "user.x", value), model)

    @rule(path=paths)
    def mkdir(self, path: Path_) -> None:
        self.both(lambda: self.path(path).mkdir(), lambda: self.model.mkdir(path))

    @rule(path=paths)
    def unlink(self, path: Path_) -> None:
        self.both(lambda: self.path(path).unlink(), lambda: self.model.unlink(path))

    @rule(path=paths)
    def rmdir(self, path: Path_) -> None:
        self.both(lambda: self.path(path).rmdir(), lambda: self.model.rmdir(path))

    @rule(old=paths, new=paths)
    def rename(self, old: Path_, new: Path_) -> None:
        self.both(
            lambda: os.rename(self.path(old), self.path(new)), lambda: self.model.rename(old, new)
        )

    @rule(old=paths, new=paths)
    def link(self, old: Path_, new: Path_) -> None:
        self.both(
            lambda: os.link(self.path(old), self.path(new)), lambda: self.model.link(old, new)
        )

    @rule()
    def remount(self) -> None:
        self.union.remount()

    @rule()
    def kill(self) -> None:
        kill_mount(self.union.mounted)
        self.union.mounted.ensure()

    @rule()
    def hand_over(self) -> None:
        kill(self.union.mounted.status().pid)

    @invariant()
    def trees_are_equal(self) -> None:
        if mount.is_mounted(self.union.spec.mountpoint):
            counts: dict[FileNode, int] = {}
            self.compare((), self.model.root, counts)
            self.check_links((), self.model.root, counts)

    def compare(self, path: Path_, folder: DirNode, counts: dict[FileNode, int]) -> None:
        assert sorted(os.listdir(self.path(path))) == sorted(folder.entries)
        for name, node in folder.entries.items():
            child = (*path, name)
            if isinstance(node, DirNode):
                self.compare(child, node, counts)
                continue
            counts[node] = counts.get(node, 0) + 1
            here = self.path(child)
            assert here.read_bytes() == node.data
            seen = here.stat()
            assert self.numbers.setdefault(node, seen.st_ino) == seen.st_ino
            assert dict.fromkeys(os.listxattr(here)) == dict.fromkeys(node.xattrs)

    def check_links(self, path: Path_, folder: DirNode, counts: dict[FileNode, int]) -> None:
        for name, node in folder.entries.items():
            if isinstance(node, DirNode):
                self.check_links((*path, name), node, counts)
            else:
                assert self.path((*path, name)).stat().st_nlink == counts[node] + node.hidden

    def teardown(self) -> None:
        if mount.is_mounted(self.union.spec.mountpoint):
            self.union.mounted.stop()
        log = self.union.log()
        shutil.rmtree(self.base)
        assert log == ""


class PlainMachine(UnionMachine):
    """The same without passthrough."""

    passthrough = False


_settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestUnionModel = UnionMachine.TestCase
TestUnionModel.settings = _settings
TestPlainModel = PlainMachine.TestCase
TestPlainModel.settings = _settings
