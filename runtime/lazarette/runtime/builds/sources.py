"""What COPY and ADD take: finding it, and naming it by its content.

A source is looked for in a :class:`SourceTree`, the build context or the final
filesystem of a stage or image.  A :class:`Selected` is one thing found; its digest covers
names, types, modes, owners, links and contents, never times.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.ignore import Ignore, component_regex
from lazarette.runtime.builds.tree import Tree
from lazarette.storage import beneath

_CHUNK = 1 << 20
_WILD = re.compile(rb"(?:[^\\]|^)(?:\\\\)*[*?\[]")


@dataclass(frozen=True)
class SourceTree:
    """A tree files are copied from.

    Attributes:
        tree: where.
        name: for messages.
        is_context: everything in it belongs to root, whoever packed it.
        digests: SHA-256 of regular files that are known already, by real path.
        ignore: what is as good as not there.
    """

    tree: Tree
    name: str
    is_context: bool
    digests: Mapping[bytes, bytes] = field(default_factory=dict)
    ignore: Ignore | None = None

    def hidden(self, path: bytes) -> bool:
        """Whether ``.dockerignore`` takes it away."""
        return self.ignore is not None and self.ignore.excludes(os.fsdecode(path))

    def owner(self, status: os.stat_result) -> tuple[int, int]:
        """Uid and gid a copy of it has unless told otherwise."""
        return (0, 0) if self.is_context else (status.st_uid, status.st_gid)


@dataclass(frozen=True)
class Item:
    """An entry to be copied.

    Attributes:
        path: below what was selected; ``b""`` for that itself.
        parent: descriptor of its folder, valid until the next item.
        name: its name there.
        status: its own status, links not followed.
        full: its path in the source tree.
    """

    path: bytes
    parent: int
    name: bytes
    status: os.stat_result
    full: bytes

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.status.st_mode)


@dataclass(frozen=True)
class Selected:
    """One source that was found.

    Attributes:
        source: the tree it is in.
        path: its real path there.
        shown: name below the destination: base name, or the path kept by ``--parents``.
        status: of it, links followed.
        exclude: patterns of ``--exclude``.
        pattern: how it is written in the Dockerfile.
    """

    source: SourceTree
    path: bytes
    shown: bytes
    status: os.stat_result
    exclude: Ignore
    pattern: str

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory, whose contents are copied."""
        return stat.S_ISDIR(self.status.st_mode)

    def items(self) -> Iterator[Item]:
        """Everything to copy, folders before what is in them, itself first."""
        if not self.is_folder:
            with self.source.tree.parent(self.path) as (parent, name):
                yield Item(b"", parent, name, self.status, self.path)
            return
        kept: set[bytes] = set()
        held: dict[bytes, Item] = {}
        with self.source.tree.folder(self.path) as top:
            for entry in beneath.walk(top, self._prunes()):
                full = (
                    self.path + b"/" + entry.path
                    if self.path and entry.path
                    else (self.path or entry.path)
                )
                item = Item(entry.path, entry.parent, entry.name, entry.status, full)
                if entry.path and self._left_out(entry.path, full):
                    if item.is_folder:
                        held[entry.path] = item
                    continue
                # A folder that is left out appears after all if something in it is not.
                for above in _ancestors(entry.path):
                    if above in held and above not in kept:
                        kept.add(above)
                        yield held.pop(above)
                yield item

    def _prunes(self) -> Callable[[bytes], bool] | None:
        """Folders of which nothing can be selected, by their path below this."""
        ignore = self.source.ignore
        if ignore is None and not self.exclude.patterns:
            return None
        prefix = self.path + b"/" if self.path else b""

        def prunes(path: bytes) -> bool:
            hidden = ignore is not None and ignore.prunes(prefix + path)
            return hidden or self.exclude.prunes(path)

        return prunes

    def _left_out(self, path: bytes, full: bytes) -> bool:
        return self.source.hidden(full) or self.exclude.excludes(os.fsdecode(path))

    def digest(self, mode_key: str = "") -> str:
        """``file:…`` or ``dir:…`` with the SHA-256 of all that matters."""
        sums: list[bytes] = []
        for item in self.items():
            sums.append(self._item_digest(item))
        whole = hashlib.sha256(mode_key.encode())
        for one in sorted(sums):
            whole.update(one)
        return ("dir:" if self.is_folder else "file:") + whole.hexdigest()

    def _item_digest(self, item: Item) -> bytes:
        status = item.status
        uid, gid = self.source.owner(status)
        kind = stat.S_IFMT(status.st_mode)
        made = hashlib.sha256()
        shown = item.path or (b"" if self.is_folder else self.shown)
        size = status.st_size if kind == stat.S_IFREG else 0
        made.update(
            b"%s\0%o\0%o\0%d\0%d\0%d\0%d\0"
            % (shown, kind, stat.S_IMODE(status.st_mode), uid, gid, size, status.st_rdev)
        )
        if kind == stat.S_IFLNK:
            made.update(os.readlink(item.name, dir_fd=item.parent))
        elif kind == stat.S_IFREG:
            known = self.source.digests.get(item.full)
            made.update(known or self._file_digest(item))
        return made.digest()

    def _file_digest(self, item: Item) -> bytes:
        with opened_file(item) as file:
            made = hashlib.sha256()
            while data := os.read(file, _CHUNK):
                made.update(data)
            try:
                made.update(os.getxattr(file, "security.capability"))
            except OSError:
                pass  # it has none, or the filesystem knows none
            return made.digest()


@contextmanager
def opened_file(item: Item) -> Iterator[int]:
    """A descriptor of a regular file for reading."""
    file = os.open(
        item.name,
        os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
        dir_fd=item.parent,
    )
    try:
        yield file
    finally:
        os.close(file)


def _ancestors(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:end]) for end in range(1, len(parts))]


def select(
    source: SourceTree, pattern: str, *, parents: bool, exclude: Sequence[str], word: str
) -> list[Selected]:
    """Everything a source word stands for.

    Args:
        source: the tree.
        pattern: path or wildcard; leading ``/`` and ``..`` stay inside the tree.
        parents: keep the folders of the path (``--parents``).
        exclude: patterns of ``--exclude``.
        word: the instruction, for messages.

    Raises:
        ContextError: nothing is there.
    """
    clean, pivot = _normal(pattern, parents)
    raw = os.fsencode(clean)
    wild = _is_wild(raw)
    paths = _glob(source, raw, deep=parents) if wild else [raw]
    ignored = Ignore(exclude)
    found: list[Selected] = []
    for path in paths:
        if (one := _select_one(source, path, pivot if parents else None, ignored, pattern)) is None:
            continue
        if not one.is_folder and ignored.excludes(os.fsdecode(one.shown)):
            continue
        found.append(one)
    if not found and not wild and not exclude:
        raise ContextError(_missing(source, clean, word))
    if not found and not exclude:
        raise ContextError(f"{word} failed: no source files were specified: {pattern}")
    return found


def _is_wild(path: bytes) -> bool:
    """Whether it has ``*``, ``?`` or ``[`` that no backslash escapes."""
    return _WILD.search(path) is not None


def _missing(source: SourceTree, path: str, word: str) -> str:
    if source.is_context:
        return (
            f"{word} failed: file not found in build context or excluded by .dockerignore:"
            f" stat {path}: file does not exist"
        )
    return f"{word} failed: stat {path}: file does not exist in {source.name}"


def _normal(pattern: str, parents: bool) -> tuple[str, int]:
    """The path relative to the root, and how many leading components ``/./`` cuts off."""
    pivot = 0
    if parents:
        before, mark, after = ("/" + pattern.lstrip("/")).partition("/./")
        if mark:
            pivot = len([part for part in before.split("/") if part not in ("", ".")])
            pattern = f"{before}/{after}"
    parts: list[str] = []
    for part in pattern.split("/"):
        if part in ("", "."):
            continue
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return "/".join(parts), pivot


def _select_one(
    source: SourceTree, path: bytes, pivot: int | None, exclude: Ignore, pattern: str
) -> Selected | None:
    status = source.tree.status(path or b".", follow=True)
    if status is None:
        return None
    if source.hidden(path) and not (stat.S_ISDIR(status.st_mode) and _reachable(source, path)):
        return None
    real = source.tree.real(path or b".")
    if real != path and source.hidden(real) and not stat.S_ISDIR(status.st_mode):
        return None
    shown = os.path.basename(path)
    if pivot is not None:
        shown = b"/".join(path.split(b"/")[pivot:])
    return Selected(source, real, shown, status, exclude, pattern)


def _reachable(source: SourceTree, path: bytes) -> bool:
    """Whether an ignored folder has something that is taken back."""
    return source.ignore is not None and not source.ignore.prunes(os.fsdecode(path))


def _glob(source: SourceTree, pattern: bytes, *, deep: bool) -> list[bytes]:
    """Paths a wildcard matches, component by component, sorted."""
    found = [b""]
    for part in pattern.split(b"/"):
        following: list[bytes] = []
        if part == b"**" and deep:
            for folder in found:
                following += _folders_below(source, folder)
        elif _is_wild(part):
            regex = component_regex(os.fsdecode(part))
            for folder in found:
                if source.tree.is_folder(folder or b"."):
                    following += [
                        folder + b"/" + name if folder else name
                        for name in source.tree.names(folder)
                        if regex.fullmatch(os.fsdecode(name))
                    ]
        else:
            plain = part.replace(b"\\", b"")
            following = [folder + b"/" + plain if folder else plain for folder in found]
            following = [p for p in following if source.tree.status(p) is not None]
        found = following
    return sorted(set(found))


def _folders_below(source: SourceTree, folder: bytes) -> list[bytes]:
    found = [folder]
    if not source.tree.is_folder(folder or b"."):
        return []
    with source.tree.folder(folder) as top:
        for entry in beneath.walk(top):
            if entry.is_folder and entry.path:
                found.append(folder + b"/" + entry.path if folder else entry.path)
    return found
