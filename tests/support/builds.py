"""A builder on real layers, contexts made of plain tables, and trees as lines of text."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.images import busybox_archive
from tests.support.layers import KINDS, Kind

from lazarette.runtime.builds.builder import Builder
from lazarette.runtime.builds.ocirunner import OciStepRunner
from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.containers.cgroups import Group, detect
from lazarette.runtime.containers.oci import choose
from lazarette.runtime.containers.spec import find_facts
from lazarette.runtime.events import EventBus
from lazarette.runtime.images.archive import load
from lazarette.runtime.images.model import Image
from lazarette.runtime.images.store import ImageStore
from lazarette.storage import beneath
from lazarette.storage.clock import SystemClock
from lazarette.storage.state import State

Entry = str | Mapping[str, object]


@dataclass
class Outcome:
    """A finished build: its image and every message."""

    image: Image
    messages: list[Mapping[str, object]]

    @property
    def text(self) -> str:
        """The stream as a person sees it."""
        return text_of(self.messages)

    @property
    def cached(self) -> int:
        """Steps that came from the cache."""
        return self.text.count("---> Using cache")


def text_of(messages: list[Mapping[str, object]]) -> str:
    """The ``stream`` parts of messages."""
    return "".join(str(message.get("stream", "")) for message in messages)


class Bench:
    """A store and a builder in a folder of their own, with a busybox image."""

    def __init__(self, root: Path, loop_of: EventBus, kind: Kind = KINDS[0]) -> None:
        self.clock = SystemClock()
        self.state = State(root / "state.db")
        self.layers = kind.make(root / "layers")
        self.layers.recover()
        self.images = ImageStore(root / "images", self.layers, self.state, loop_of, self.clock)
        hierarchies = detect()
        self._group = Group(hierarchies, f"/laz-test-{os.getpid()}")
        runtime = choose("", hierarchies, root / "exec")
        runner = OciStepRunner(
            runtime, find_facts(hierarchies, None), root / "steps", self._group.path
        )
        self.builder = Builder(
            self.images, self.layers, runner, self.state, self.clock, root / "builds"
        )
        with busybox_archive().open("rb") as archive:
            load(self.images, archive)

    def close(self) -> None:
        """Close database and driver, take the control group away."""
        self.state.close()
        self.layers.close()
        self._group.remove(self.clock)

    def build(
        self,
        dockerfile: str | bytes,
        context: Mapping[str, Entry] | None = None,
        options: BuildOptions | None = None,
        stop: threading.Event | None = None,
        messages: list[Mapping[str, object]] | None = None,
    ) -> Outcome:
        """Build a Dockerfile with a context."""
        files: dict[str, Entry | bytes] = dict(context or {})
        given = options or BuildOptions()
        name = given.dockerfile or "Dockerfile"
        raw = dockerfile if isinstance(dockerfile, bytes) else os.fsencode(dockerfile)
        files.setdefault(name, raw)
        told = messages if messages is not None else []
        built = self.builder.build_blocking(
            io.BytesIO(context_tar(files)), given, told.append, stop
        )
        return Outcome(self.images.get(built.image_id), told)

    @contextlib.contextmanager
    def mounted(self, image: Image) -> Iterator[Path]:
        """An image's tree."""
        if image.layer is None:
            raise AssertionError("the image has no layers")
        path = self.layers.mount(image.layer)
        try:
            yield path
        finally:
            self.layers.unmount(image.layer)

    def tree(self, image: Image, base: Image | None = None) -> list[str]:
        """An image's entries as lines, without those its base has alike.

        ``path mode uid:gid``, then ``/`` for a folder, ``= 'content'`` or ``= binary`` for a file,
        ``-> target`` for a link; ``- path`` for what the base had.
        """
        now = self._entries(image)
        before = self._entries(base) if base is not None else {}
        lines = [line for path, (line, _) in now.items() if now[path] != before.get(path)]
        return sorted(lines + [f"- {path}" for path in before if path not in now])

    def _entries(self, image: Image) -> dict[str, tuple[str, int]]:
        if image.layer is None:
            return {}
        found: dict[str, tuple[str, int]] = {}
        with self.mounted(image) as root, beneath.opened(root) as top:
            for entry in beneath.walk(top):
                if not entry.path:
                    continue
                path = os.fsdecode(entry.path)
                folder = stat.S_ISDIR(entry.status.st_mode)
                found[path] = (_line(path, entry), 0 if folder else entry.status.st_mtime_ns)
        return found


def _line(path: str, entry: beneath.Entry) -> str:
    status = entry.status
    head = f"{path} {stat.S_IMODE(status.st_mode):04o} {status.st_uid}:{status.st_gid}"
    if entry.is_folder:
        return f"{head} /"
    if stat.S_ISLNK(status.st_mode):
        return f"{path} {status.st_uid}:{status.st_gid} -> " + os.fsdecode(
            os.readlink(entry.name, dir_fd=entry.parent)
        )
    if not stat.S_ISREG(status.st_mode):
        return f"{head} {stat.S_IFMT(status.st_mode):o}"
    with open(os.open(entry.name, os.O_RDONLY, dir_fd=entry.parent), "rb") as file:
        content = file.read(200)
    if b"\0" in content:
        return f"{head} = binary"
    return f"{head} = {content.decode(errors='backslashreplace')!r}"


def context_tar(files: Mapping[str, Entry | bytes]) -> bytes:
    """A context of a table: path to content, or to a table of attributes.

    Attributes: ``content``, ``mode`` (text, octal), ``uid``, ``gid``, ``link``, ``hard``,
    ``folder``, ``fifo``, ``device``, ``mtime``, ``capability`` (the attribute, in hex),
    ``tar`` (a table again) and ``pack`` (gzip,
    bzip2, xz, zstd) for archives.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, entry in files.items():
            info, data = _member(name, entry)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def _member(name: str, entry: Entry | bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mtime = 1_600_000_000
    info.uid = info.gid = 1234
    if isinstance(entry, str | bytes):
        data = entry if isinstance(entry, bytes) else entry.encode()
        info.mode, info.size = 0o644, len(data)
        return info, data
    data = str(entry.get("content", "")).encode()
    if isinstance(inner := entry.get("tar"), Mapping):
        data = packed_as(context_tar(inner), str(entry.get("pack", "")))
    info.mode = int(str(entry.get("mode", "755" if entry.get("folder") else "644")), 8)
    info.uid = int(str(entry.get("uid", 1234)))
    info.gid = int(str(entry.get("gid", 1234)))
    info.mtime = int(str(entry.get("mtime", 1_600_000_000)))
    if "capability" in entry:
        value = bytes.fromhex(str(entry["capability"])).decode("utf-8", "surrogateescape")
        info.pax_headers = {"SCHILY.xattr.security.capability": value}
    for key, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
        if key in entry:
            info.type, info.linkname = kind, str(entry[key])
            return info, b""
    for key, kind in (
        ("folder", tarfile.DIRTYPE),
        ("fifo", tarfile.FIFOTYPE),
        ("device", tarfile.CHRTYPE),
    ):
        if entry.get(key):
            info.type = kind
            info.devmajor, info.devminor = 1, 3
            return info, b""
    info.size = len(data)
    return info, data


def packed_as(data: bytes, kind: str) -> bytes:
    """Bytes compressed as ``gzip``, ``bzip2``, ``xz`` or ``zstd``; as they are for ``""``."""
    if kind == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
    }
    return packers[kind](data)


def discard(root: Path) -> None:
    """Remove a bench's folder."""
    beneath.remove_path(root)
    shutil.rmtree(root, ignore_errors=True)
