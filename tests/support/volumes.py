"""Volume drivers and trees for suites: one driver of each kind a session, cleaned up after."""

from __future__ import annotations

import mmap
import os
import random
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lazarette.storage import beneath, copying
from lazarette.storage.changes import Change, ChangeKind
from lazarette.storage.clock import SystemClock
from lazarette.storage.volumes.bind import BindVolumeDriver
from lazarette.storage.volumes.btrfs import BtrfsVolumeDriver
from lazarette.storage.volumes.contract import VolumeDriver
from lazarette.storage.volumes.fuse import FuseVolumeDriver
from lazarette.storage.volumes.overlay import OverlayVolumeDriver
from lazarette.storage.volumes.tmpfs import TmpfsVolumeDriver

POOL = 4 << 30


@dataclass(frozen=True)
class Kind:
    """A driver with one set of options."""

    id: str
    make: Callable[[Path], VolumeDriver]
    options: dict[str, str] = field(default_factory=dict)
    device: bool = False


KINDS = (
    Kind("btrfs", lambda root: BtrfsVolumeDriver(root, SystemClock(), pool_size=POOL)),
    Kind(
        "btrfs-nodatacow",
        lambda root: BtrfsVolumeDriver(root, SystemClock(), pool_size=POOL),
        {"nodatacow": "true"},
    ),
    Kind(
        "btrfs-zstd",
        lambda root: BtrfsVolumeDriver(root, SystemClock(), pool_size=POOL),
        {"compression": "zstd"},
    ),
    Kind(
        "btrfs-size",
        lambda root: BtrfsVolumeDriver(root, SystemClock(), pool_size=POOL),
        {"size": "1g"},
    ),
    Kind("overlay", lambda root: OverlayVolumeDriver(root, SystemClock(), pool_size=POOL)),
    Kind(
        "overlay-size",
        lambda root: OverlayVolumeDriver(root, SystemClock(), pool_size=POOL),
        {"size": "256m"},
    ),
    Kind("fuse", lambda root: FuseVolumeDriver(root, SystemClock(), pool_size=POOL)),
    Kind(
        "fuse-size",
        lambda root: FuseVolumeDriver(root, SystemClock(), pool_size=POOL),
        {"size": "256m"},
    ),
    Kind("tmpfs", lambda root: TmpfsVolumeDriver(root, SystemClock())),
    Kind("tmpfs-size", lambda root: TmpfsVolumeDriver(root, SystemClock()), {"size": "64m"}),
    Kind("bind", lambda root: BindVolumeDriver(root, SystemClock())),
    Kind("bind-device", lambda root: BindVolumeDriver(root, SystemClock()), device=True),
)


class Bench:
    """A driver of one kind and the volumes that a test makes with it."""

    def __init__(self, kind: Kind, driver: VolumeDriver, root: Path) -> None:
        self.kind = kind
        self.driver = driver
        self.root = root
        self._made: list[str] = []

    def name(self) -> str:
        """A fresh name; whatever has it at the end of the test is removed."""
        name = f"v{secrets.token_hex(6)}"
        self._made.append(name)
        return name

    def options(self) -> dict[str, str]:
        """Options for one volume of this kind."""
        options = dict(self.kind.options)
        if self.kind.device:
            device = self.root / "devices" / secrets.token_hex(6)
            device.mkdir(parents=True)
            device.chmod(0o755)
            options["device"] = str(device)
        return options

    def volume(self) -> tuple[str, Path]:
        """A fresh mounted volume."""
        name = self.name()
        self.driver.create(name, self.options())
        return name, self.driver.mount(name)

    def clean(self) -> None:
        """Remove everything a test made."""
        for name in self._made:
            self.driver.unmount(name)
            self.driver.remove(name)
        self._made.clear()


@contextmanager
def bench(kind: Kind, root: Path) -> Iterator[Bench]:
    """A driver for a session."""
    driver = kind.make(root / "driver")
    driver.recover()
    try:
        yield Bench(kind, driver, root)
    finally:
        for name in driver.names():
            driver.remove(name)
        driver.close()
        assert not [m for m in _mounts() if m.startswith(os.fsencode(root) + b"/")]


def _mounts() -> list[bytes]:
    with open("/proc/self/mountinfo", "rb") as table:
        return [line.split(b" ")[4] for line in table.read().splitlines()]


class LockGate:
    """A gate over threads that write under a lock; counts how often it was used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = 0
        self.opened = 0
        self._held = False

    def close(self) -> None:
        self.lock.acquire()
        self._held = True
        self.closed += 1

    def open(self) -> None:
        if self._held:
            self._held = False
            self.opened += 1
            self.lock.release()


@dataclass(frozen=True)
class Node:
    """All that a backup must keep of an entry."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int
    links: int
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]


def snapshot_of(root: Path) -> dict[bytes, Node]:
    """Every entry below a folder, the folder itself as ``b""``."""
    found: dict[bytes, Node] = {}
    with beneath.opened(root) as folder:
        for entry in beneath.walk(folder):
            status = entry.status
            content = b""
            if stat.S_ISREG(status.st_mode):
                file = os.open(entry.name, os.O_RDONLY, dir_fd=entry.parent)
                with open(file, "rb") as reading:
                    content = reading.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(entry.name, dir_fd=entry.parent)
            found[entry.path] = Node(
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_rdev,
                1 if stat.S_ISDIR(status.st_mode) else status.st_nlink,
                content,
                tuple(copying.read_xattrs(entry.parent, entry.name).items()),
            )
    return found


VERBS = (
    *("new", "new", "write", "write", "unlink", "rename", "link", "mkdir", "chmod"),
    *("xattr", "unxattr", "truncate", "symlink", "move", "map"),
)


def mutate(root: Path, rnd: random.Random, count: int) -> None:
    """Change a tree at random; what cannot be done is left out."""
    for _ in range(count):
        files = [Path(d) / f for d, _, names in os.walk(root) for f in names]
        folders = [Path(d) for d, _, _ in os.walk(root)]
        place = rnd.choice(folders) / f"n{rnd.randrange(30)}"
        file = rnd.choice(files) if files else place
        verb = rnd.choice(VERBS)
        try:
            if verb == "new":
                place.write_bytes(rnd.randbytes(rnd.choice([0, 100, 50_000])))
            elif verb == "write":
                with open(file, "r+b") as writing:
                    writing.seek(rnd.randrange(1 + file.stat().st_size))
                    writing.write(b"changed")
            elif verb == "unlink":
                file.unlink()
            elif verb == "rename":
                os.rename(file, place)
            elif verb == "link":
                os.link(file, place)
            elif verb == "mkdir":
                place.mkdir()
            elif verb == "chmod":
                file.chmod(rnd.choice([0o600, 0o644, 0o4755]))
            elif verb == "xattr":
                os.setxattr(rnd.choice([*files, *folders]), "user.k", rnd.randbytes(3))
            elif verb == "unxattr":
                os.removexattr(rnd.choice([*files, *folders]), "user.k")
            elif verb == "truncate":
                os.truncate(file, rnd.randrange(60_000))
            elif verb == "symlink":
                place.symlink_to("x")
            elif verb == "move" and len(folders) > 2:
                os.rename(rnd.choice(folders[1:]), place)
            elif verb == "map":
                with open(file, "r+b") as mapped, mmap.mmap(mapped.fileno(), 0) as memory:
                    memory[rnd.randrange(len(memory))] = rnd.randrange(256)
        except (OSError, ValueError):
            continue


def replay(
    base: dict[bytes, Node], changes: list[Change], target: dict[bytes, Node]
) -> dict[bytes, Node]:
    """The target as somebody would rebuild it who has the base and reads only what changed."""
    built = dict(base)
    for change in changes:
        if change.kind is ChangeKind.REMOVED:
            built.pop(change.path, None)
        elif change.kind is ChangeKind.RENAMED and change.origin is not None:
            built.pop(change.origin, None)
    for change in changes:
        if change.kind is ChangeKind.REMOVED:
            continue
        new = target[change.path]
        old = base.get(change.origin or change.path)
        if change.kind is ChangeKind.ADDED or change.ranges is None or old is None:
            built[change.path] = new
            continue
        content = bytearray(old.content[: len(new.content)].ljust(len(new.content), b"\0"))
        for part in change.ranges:
            content[part.offset : part.end] = new.content[part.offset : part.end]
        body = bytes(content) if stat.S_ISREG(new.mode) else new.content
        built[change.path] = Node(
            new.mode, new.uid, new.gid, new.mtime_ns, new.rdev, new.links, body, new.xattrs
        )
    return built
