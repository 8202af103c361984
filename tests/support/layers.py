"""Layer drivers for suites, and layer tars made by hand."""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazarette.storage.clock import SystemClock
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.btrfs import BtrfsLayerDriver
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.layers.copy import CopyLayerDriver
from lazarette.storage.layers.fuse import FuseLayerDriver
from lazarette.storage.layers.overlay import OverlayLayerDriver


@dataclass(frozen=True)
class Kind:
    """A layer driver with one set of options."""

    id: str
    make: Callable[[Path], LayerDriver]


KINDS = (
    Kind("overlay", lambda root: OverlayLayerDriver(root, SystemClock())),
    Kind("btrfs", lambda root: BtrfsLayerDriver(root, SystemClock(), pool_size=2 << 30)),
    Kind("copy", lambda root: CopyLayerDriver(root, SystemClock())),
    Kind("fuse", lambda root: FuseLayerDriver(root, SystemClock())),
)


class LayerBench:
    """A driver of one kind and the layers that a test makes with it."""

    def __init__(self, kind: Kind, driver: LayerDriver, root: Path) -> None:
        self.kind = kind
        self.driver = driver
        self.root = root
        self._mounted: list[tuple[str, IdMap | None]] = []

    def key(self) -> str:
        """A fresh key."""
        return f"k{secrets.token_hex(6)}"

    def mount(self, key: str, idmap: IdMap | None = None) -> Path:
        """Mount until the end of the test."""
        place = self.driver.mount(key, idmap)
        self._mounted.append((key, idmap))
        return place

    def unmount(self, key: str, idmap: IdMap | None = None) -> None:
        """Give back one mount early."""
        self._mounted.remove((key, idmap))
        self.driver.unmount(key, idmap)

    def base(self, *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> str:
        """A committed layer of a hand-made tar."""
        key = self.key()
        self.driver.apply(key, None, tar(*members))
        return key

    def child(self, parent: str | None) -> tuple[str, Path]:
        """A mounted active layer."""
        key = self.key()
        self.driver.prepare(key, parent)
        return key, self.mount(key)

    def commit(self, key: str) -> None:
        """Unmount and commit."""
        self.unmount(key)
        self.driver.commit(key)

    def diff(self, key: str) -> bytes:
        """The layer's tar."""
        with self.driver.diff(key) as stream:
            return stream.read()

    def clean(self) -> None:
        """Unmount and remove everything, children first."""
        for key, idmap in self._mounted:
            self.driver.unmount(key, idmap)
        self._mounted.clear()
        remove_all(self.driver)


def remove_all(driver: LayerDriver) -> None:
    """Remove every layer."""
    from lazarette.storage.errors import InUse

    while keys := driver.keys():
        for key in keys:
            try:
                driver.remove(key)
            except InUse:
                continue


@contextmanager
def layer_bench(kind: Kind, root: Path) -> Iterator[LayerBench]:
    """A driver for a session."""
    (root / "driver").mkdir()
    driver = kind.make(root / "driver")
    driver.recover()
    try:
        yield LayerBench(kind, driver, root)
    finally:
        remove_all(driver)
        driver.close()
        prefix = os.fsencode(root) + b"/"
        with open("/proc/self/mountinfo", "rb") as table:
            left = [line.split(b" ")[4] for line in table.read().splitlines()]
        assert not [target for target in left if target.startswith(prefix)]


# ---- tars by hand


def tar(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    """A tar of members, with content where there is some."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out,
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **fields: object
) -> tarfile.TarInfo:
    """One member."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = mode
    info.mtime = 1_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def folder(name: str, mode: int = 0o755, **fields: object) -> tarfile.TarInfo:
    """A directory."""
    return entry(name, tarfile.DIRTYPE, mode, **fields)


def file(
    name: str, content: bytes = b"x", mode: int = 0o644, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    """A regular file."""
    return entry(name, mode=mode, **fields), content


def symlink(name: str, target: str) -> tarfile.TarInfo:
    """A symbolic link."""
    return entry(name, tarfile.SYMTYPE, 0o777, linkname=target)


def hardlink(name: str, target: str) -> tarfile.TarInfo:
    """A hard link."""
    return entry(name, tarfile.LNKTYPE, linkname=target)


def names(data: bytes) -> list[str]:
    """Member names of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as read:
        return read.getnames()
