"""Build contexts: packing one on the client's side, unpacking one on the daemon's.

A context that arrives is hostile: it is unpacked by the same reader as image layers, which
never leaves its folder, within limits of size; devices in it are refused.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.ignore import Ignore, read_lines
from lazarette.runtime.builds.parser import MAX_SIZE
from lazarette.runtime.builds.sources import SourceTree
from lazarette.runtime.builds.tree import Tree, walk
from lazarette.runtime.images.compression import Unpacked, UnpackLimits
from lazarette.storage import beneath
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.layers.apply import LayerReader
from lazarette.storage.layers.tar import TreeWriter

DOCKERFILE: Final = "Dockerfile"
IGNORE_FILE: Final = ".dockerignore"
LIMITS: Final = UnpackLimits(size=64 << 30)


@dataclass(frozen=True)
class Context:
    """An unpacked context.

    Attributes:
        source: its files, with what ``.dockerignore`` hides already hidden.
        dockerfile: the Dockerfile's bytes.
        name: the Dockerfile's name, for messages.
    """

    source: SourceTree
    dockerfile: bytes
    name: str


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


@contextmanager
def opened(root: Path, wanted: str, given: bytes | None = None) -> Iterator[Context]:
    """Open an unpacked context for the length of the block.

    Args:
        root: its folder.
        wanted: the ``dockerfile`` asked for; empty for the default.
        given: the Dockerfile itself, where it does not come from the context.

    Raises:
        ContextError: there is no such Dockerfile.
    """
    with Tree(root) as tree:
        name = wanted or DOCKERFILE
        if given is None:
            name, given = _dockerfile(tree, wanted)
        ignore = _ignore(tree, name)
        # A folder that can be taken apart by the daemon only; everything in it is root's.
        yield Context(SourceTree(tree, "the build context", True, {}, ignore), given, name)


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


def _ignore(tree: Tree, dockerfile: str) -> Ignore | None:
    for name in (f"{dockerfile}{IGNORE_FILE}", IGNORE_FILE):
        try:
            text = tree.read(os.fsencode(name), MAX_SIZE).decode(errors="surrogateescape")
        except OSError:
            continue
        return Ignore(read_lines(text))
    return None


@dataclass(frozen=True)
class Packed:
    """What a client sends.

    Attributes:
        dockerfile: value for the ``dockerfile`` parameter.
        files: how many entries were packed.
    """

    dockerfile: str
    files: int


def pack(
    folder: Path,
    out: BinaryIO,
    *,
    dockerfile: str = "",
    dockerfile_bytes: bytes | None = None,
    working_folder: Path | None = None,
) -> Packed:
    """Write a folder as a context's tar, without what ``.dockerignore`` names.

    The Dockerfile and the ignore file are always sent, since the daemon needs them.

    Args:
        folder: the context.
        out: where the tar goes.
        dockerfile: path of the Dockerfile, relative to ``working_folder``; it may lie
            outside of the context.
        dockerfile_bytes: the Dockerfile itself, e.g. from standard input.
        working_folder: where relative names start; the context when None.

    Raises:
        ContextError: the folder or the Dockerfile is not there.
    """
    if not folder.is_dir():
        raise ContextError(f"build context {folder} is not a folder")
    extra: bytes | None = dockerfile_bytes
    if extra is None:
        inside, extra = _located(folder, dockerfile, working_folder)
    else:
        inside = f".dockerfile.{secrets.token_hex(10)}"
    writer = TreeWriter(out)
    count = 0
    with Tree(folder) as tree:
        ignore = _ignore(tree, inside)
        prunes = ignore.prunes if ignore is not None else None
        for entry in walk(tree.fd, prunes):
            path = os.fsdecode(entry.path)
            if not path or _left_out(ignore, path, inside):
                continue
            writer.entry(entry.path, entry.parent, entry.name, entry.status)
            count += 1
    if extra is not None:
        _add_file(writer, inside, extra)
        count += 1
    writer.close()
    return Packed(inside, count)


def _located(
    folder: Path, dockerfile: str, working_folder: Path | None
) -> tuple[str, bytes | None]:
    """The Dockerfile's name within the context, and its bytes where it lies outside."""
    if not dockerfile:
        for name in (DOCKERFILE, DOCKERFILE.lower()):
            if (folder / name).is_file():
                return name, None
        raise ContextError(f"no {DOCKERFILE} in {folder}", hint="name one with -f")
    path = (working_folder or folder) / dockerfile
    if not path.is_file():
        raise ContextError(f"no Dockerfile at {path}")
    real, top = path.resolve(), folder.resolve()
    if real.is_relative_to(top):
        return str(real.relative_to(top)), None
    return f".dockerfile.{secrets.token_hex(10)}", path.read_bytes()


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


def discard(root: Path) -> None:
    """Remove an unpacked context."""
    beneath.remove_path(root)
