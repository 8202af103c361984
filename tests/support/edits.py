"""Random edits of a tree, each telling which changes a volume driver would report."""

from __future__ import annotations

import os
import random
from pathlib import Path

from lazarette.storage.changes import ByteRange, Change, ChangeKind


class Editor:
    """Edits a tree and keeps the record of changes since :meth:`take`.

    Args:
        root: the tree.
        chance: decides everything.
    """

    def __init__(self, root: Path, chance: random.Random) -> None:
        self._root = root
        self._chance = chance
        self._number = 0
        self._changes: list[Change] = []

    def take(self) -> list[Change]:
        """The record so far; the next one begins empty."""
        taken, self._changes = self._changes, []
        return taken

    def step(self) -> None:
        """One edit."""
        self._chance.choice(
            (
                self._new_file,
                self._new_file,
                self._overwrite,
                self._overwrite,
                self._append,
                self._truncate,
                self._delete,
                self._rename,
                self._new_directory,
                self._metadata,
                self._link,
                self._symlink,
                self._punch,
            )
        )()

    def _paths(self, directories: bool) -> list[Path]:
        return sorted(
            path
            for path in self._root.rglob("*")
            if not path.is_symlink() and path.is_dir() == directories
        )

    def _relative(self, path: Path) -> bytes:
        return b"" if path == self._root else os.fsencode(path.relative_to(self._root))

    def _report(
        self,
        kind: ChangeKind,
        path: Path,
        ranges: tuple[ByteRange, ...] | None = None,
        origin: Path | None = None,
    ) -> None:
        came = None if origin is None else self._relative(origin)
        self._changes.append(Change(kind, self._relative(path), came, ranges))
        if kind is not ChangeKind.MODIFIED:
            self._changes.append(Change(ChangeKind.MODIFIED, self._relative(path.parent), None, ()))

    def _name(self) -> str:
        self._number += 1
        return f"n{self._number}"

    def _directory(self) -> Path:
        return self._chance.choice([self._root, *self._paths(True)])

    def _file(self) -> Path | None:
        files = self._paths(False)
        return self._chance.choice(files) if files else None

    def _new_file(self) -> None:
        path = self._directory() / self._name()
        size = self._chance.choice((0, 10, 8192, 70_000, 300_000, 262_144, 1_500_000))
        path.write_bytes(self._chance.randbytes(size))
        self._report(ChangeKind.ADDED, path)

    def _overwrite(self) -> None:
        path = self._file()
        if path is None or path.stat().st_size == 0:
            return
        size = path.stat().st_size
        at = self._chance.randrange(size)
        length = min(size - at, self._chance.choice((1, 4096, 100_000)))
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(self._chance.randbytes(length))
        start = at // 4096 * 4096
        whole = ByteRange(start, -(-(at + length) // 4096) * 4096 - start)
        self._report(ChangeKind.MODIFIED, path, (whole,))

    def _append(self) -> None:
        path = self._file()
        if path is None:
            return
        size = path.stat().st_size
        data = self._chance.randbytes(self._chance.choice((1, 8192, 200_000)))
        with open(path, "ab") as file:
            file.write(data)
        start = size // 4096 * 4096
        self._report(ChangeKind.MODIFIED, path, (ByteRange(start, size + len(data) - start),))

    def _truncate(self) -> None:
        path = self._file()
        if path is not None:
            size = self._chance.randrange(path.stat().st_size + 1)
            os.truncate(path, size)
            last = size // 4096 * 4096
            self._report(ChangeKind.MODIFIED, path, (ByteRange(last, 4096),))

    def _punch(self) -> None:
        """Grow by a hole with an island at its end."""
        path = self._file()
        if path is None:
            return
        size = path.stat().st_size
        far = size + (1 << 20)
        with open(path, "r+b") as file:
            file.seek(far)
            file.write(b"island")
        start = size // 4096 * 4096
        self._report(ChangeKind.MODIFIED, path, (ByteRange(start, far + 6 - start),))

    def _delete(self) -> None:
        path = self._file()
        if path is None:
            return
        inode = path.stat().st_ino
        path.unlink()
        self._report(ChangeKind.REMOVED, path)
        # what was written to it before is reported under a name that it still has (C6)
        for other in self._paths(False):
            if other.stat().st_ino == inode:
                self._report(ChangeKind.MODIFIED, other)

    def _rename(self) -> None:
        path = self._chance.choice([self._file(), *self._paths(True)[:1]])
        if path is None:
            return
        target = self._directory() / self._name()
        if path == target.parent or path in target.parents:
            return
        before = [self._relative(one) for one in path.rglob("*")] if path.is_dir() else []
        if any(
            change.path in before or change.path == self._relative(path) for change in self._changes
        ):
            return
        path.rename(target)
        self._report(ChangeKind.REMOVED, path)
        self._changes.pop()
        self._changes.pop()
        self._changes.append(Change(ChangeKind.MODIFIED, self._relative(path.parent), None, ()))
        self._report(ChangeKind.RENAMED, target, (), path)

    def _new_directory(self) -> None:
        path = self._directory() / self._name()
        path.mkdir()
        self._report(ChangeKind.ADDED, path)

    def _metadata(self) -> None:
        path = self._file() or self._root
        os.chmod(path, self._chance.choice((0o600, 0o644, 0o755)))
        os.setxattr(path, "user.note", self._chance.randbytes(10))
        self._report(ChangeKind.MODIFIED, path, ())

    def _link(self) -> None:
        path = self._file()
        if path is not None:
            other = self._directory() / self._name()
            os.link(path, other)
            self._report(ChangeKind.ADDED, other)

    def _symlink(self) -> None:
        path = self._directory() / self._name()
        path.symlink_to("anywhere")
        self._report(ChangeKind.ADDED, path)
