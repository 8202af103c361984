"""Build contexts: packing one on the client's side, unpacking one on the daemon's.

A context that arrives is hostile: it is unpacked by the same reader as image layers, which
never leaves its folder, within limits of size; devices in it are refused.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, cast

from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.ignore import Ignore, read_lines
from lazarette.runtime.builds.parser import MAX_SIZE
from lazarette.runtime.builds.sources import SourceTree
from lazarette.runtime.builds.tree import Tree
from lazarette.runtime.images.compression import Unpacked, UnpackLimits
from lazarette.storage import beneath
from lazarette.storage.beneath import walk
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.layers.apply import LayerReader
from lazarette.storage.layers.tar import TreeWriter

DOCKERFILE: Final = "Dockerfile"
IGNORE_FILE: Final = ".dockerignore"
LIMITS: Final = UnpackLimits(size=64 << 30)
_PIECE = 1 << 20


@dataclass
class Memo:
    """What was found in a context of the same bytes before.

    Attributes:
        dockerfiles: name asked for → name found and content.
        digests: Dockerfile's name and a step's words → digest of what the step takes.
    """

    dockerfiles: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    digests: dict[tuple[str, str], str] = field(default_factory=dict)


class Memos:
    """Those of the last contexts, so that an unchanged build need not unpack its own."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: dict[str, Memo] = {}

    def of(self, digest: str) -> Memo:
        """The memo of a context by the SHA-256 of its bytes as sent."""
        with self._lock:
            memo = self._kept.pop(digest, None) or Memo()
            self._kept[digest] = memo
            while len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
            return memo


class Context:
    """A context; unpacked when its files are first asked for.

    Args:
        opened: opens its tree; asked again, gives the same one.
        wanted: the ``dockerfile`` asked for; empty for the default.
        memo: what is known of it.
        given: the Dockerfile itself, where it does not come from the context.

    Attributes:
        name: the Dockerfile's name, for messages.
        dockerfile: its bytes.
        memo: what is known of it.

    Raises:
        ContextError: there is no such Dockerfile.
    """

    def __init__(
        self, opened: Callable[[], Tree], wanted: str, memo: Memo, given: bytes | None = None
    ) -> None:
        self._opened = opened
        self._lock = threading.Lock()
        self._source: SourceTree | None = None
        self.memo = memo
        if given is not None:
            self.name, self.dockerfile = wanted or DOCKERFILE, given
            return
        if wanted not in memo.dockerfiles:
            self.name, self.dockerfile = _dockerfile(opened(), wanted)
            self._source = self._opened_source()  # a broken ignore file is told at once
            memo.dockerfiles[wanted] = (self.name, self.dockerfile)
        self.name, self.dockerfile = memo.dockerfiles[wanted]

    def remember(self, step: str, digest: str) -> None:
        """Note what a step takes of it."""
        self.memo.digests[self.name, step] = digest

    def known(self, step: str) -> str | None:
        """What a step took when a context of the same bytes was here before."""
        return self.memo.digests.get((self.name, step))

    @property
    def source(self) -> SourceTree:
        """Its files, with what ``.dockerignore`` hides already hidden."""
        with self._lock:
            if self._source is None:
                self._source = self._opened_source()
            return self._source

    def _opened_source(self) -> SourceTree:
        tree = self._opened()
        return SourceTree(tree, "the build context", True, {}, ignore_of(tree, self.name))


def spool(stream: BinaryIO, target: Path, limits: UnpackLimits = LIMITS) -> str:
    """Write a context as it comes to a file.

    Returns:
        The SHA-256 of its bytes.

    Raises:
        ContextError: it is too large.
    """
    made = hashlib.sha256()
    size = 0
    with target.open("wb") as file:
        while data := stream.read(_PIECE):
            size += len(data)
            if size > limits.size:
                raise ContextError(f"build context is larger than {limits.size} bytes")
            made.update(data)
            file.write(data)
    return made.hexdigest()


def unpack(stream: BinaryIO, into: Path, limits: UnpackLimits = LIMITS) -> None:
    """Unpack a context's tar, compressed or not, into an empty folder.

    Raises:
        ContextError: it is broken, hostile or too large.
    """
    plain = Unpacked(stream, limits)
    with beneath.opened(into) as folder:
        try:
            LayerReader(folder, None).apply(cast(BinaryIO, plain))
        except InvalidArgument as bad:
            raise ContextError(f"build context cannot be read: {bad.message}") from bad
        _refuse_devices(folder)


def _refuse_devices(folder: int) -> None:
    for entry in beneath.walk(folder):
        if stat.S_ISCHR(entry.status.st_mode) or stat.S_ISBLK(entry.status.st_mode):
            raise ContextError(f"build context holds a device: {os.fsdecode(entry.path)}")


def _dockerfile(tree: Tree, wanted: str) -> tuple[str, bytes]:
    names = [wanted] if wanted and wanted != DOCKERFILE else [DOCKERFILE, DOCKERFILE.lower()]
    for name in names:
        clean = os.path.normpath("/" + name).lstrip("/")
        try:
            return clean, tree.read(os.fsencode(clean), MAX_SIZE)
        except OSError:
            continue
    raise ContextError(
        f"Cannot locate specified Dockerfile: {names[0]}",
        hint="name it with -f, relative to the context",
    )


def ignore_of(tree: Tree, dockerfile: str = "") -> Ignore | None:
    """What the ignore file of a context hides: the Dockerfile's own, else the general one."""
    for name in (f"{dockerfile}{IGNORE_FILE}", IGNORE_FILE):
        try:
            text = tree.read(os.fsencode(name), MAX_SIZE).decode(errors="surrogateescape")
        except OSError:
            continue
        return Ignore(read_lines(text))
    return None


@dataclass(frozen=True)
class Located:
    """Where a client's Dockerfile is.

    Attributes:
        name: value for the ``dockerfile`` parameter, its path within what is sent.
        extra: its bytes, where it does not lie in the context.
    """

    name: str
    extra: bytes | None = None


def locate(folder: Path, dockerfile: str = "", working_folder: Path | None = None) -> Located:
    """Find the Dockerfile of a folder.

    Args:
        folder: the context.
        dockerfile: its path, relative to ``working_folder``; it may lie outside of the
            context.  Empty for the default.
        working_folder: where relative names start; the context when None.

    Raises:
        ContextError: the folder or the Dockerfile is not there.
    """
    if not folder.is_dir():
        raise ContextError(f"build context {folder} is not a folder")
    if not dockerfile:
        for name in (DOCKERFILE, DOCKERFILE.lower()):
            if (folder / name).is_file():
                return Located(name)
        raise ContextError(f"no {DOCKERFILE} in {folder}", hint="name one with -f")
    path = (working_folder or folder) / dockerfile
    if not path.is_file():
        raise ContextError(f"no Dockerfile at {path}")
    real, top = path.resolve(), folder.resolve()
    if real.is_relative_to(top):
        return Located(str(real.relative_to(top)))
    return sent_along(path.read_bytes())


def sent_along(dockerfile: bytes) -> Located:
    """A Dockerfile that is no file of the context, e.g. from standard input."""
    return Located(f".dockerfile.{secrets.token_hex(10)}", dockerfile)


def pack(folder: Path, out: BinaryIO, located: Located | None) -> None:
    """Write a folder as a context's tar, without what ``.dockerignore`` names.

    The Dockerfile, if there is one, and the ignore file are always sent, since the daemon
    needs them.
    """
    dockerfile = located.name if located is not None else ""
    writer = TreeWriter(out)
    with Tree(folder) as tree:
        ignore = ignore_of(tree, dockerfile)
        prunes = ignore.prunes if ignore is not None else None
        for entry in walk(tree.fd, prunes):
            path = os.fsdecode(entry.path)
            if path and not _left_out(ignore, path, dockerfile):
                writer.entry(entry.path, entry.parent, entry.name, entry.status)
    if located is not None and located.extra is not None:
        _add_file(writer, located.name, located.extra)
    writer.close()


def _left_out(ignore: Ignore | None, path: str, dockerfile: str) -> bool:
    if ignore is None or path in (dockerfile, IGNORE_FILE, f"{dockerfile}{IGNORE_FILE}"):
        return False
    return ignore.excludes(path)


def _add_file(writer: TreeWriter, name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="laz-dockerfile-") as holder:
        file = Path(holder) / "Dockerfile"
        file.write_bytes(data)
        with beneath.opened(holder) as folder:
            writer.entry(os.fsencode(name), folder, b"Dockerfile", file.lstat())
