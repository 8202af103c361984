"""Snapshots of a mounted union's upper layer.

A snapshot is a folder with ``upper`` and ``links`` (the index of hard links), a whole copy
in which every file shares its blocks with the live one (FICLONE), or, if nothing happened to
it, is a hard link of the file in the snapshot before.  It is made in three steps:

1. :meth:`Snapshots.prepare`, while everything runs: the previous snapshot is copied by hard
   links, and everything recorded as changed is cloned anew, which also writes out its
   dirty pages.  What changed during that is cloned again, until that is quick.
2. :meth:`Snapshots.take`, while the caller holds the writers: what changed since step 1
   began, and files open for writing whose times moved, are cloned again.
3. :meth:`Snapshots.settle`, when the writers run again: it is made durable and then gets
   its name; before, there is only ``TARGET.partial``, which the next ``prepare`` removes.

The live inodes, descriptors, mappings and backing ids stay as they are.  The upper layer must
lie on a filesystem with reflinks (xfs, btrfs): elsewhere both steps fail with EOPNOTSUPP.

Two snapshots are compared by :mod:`lazarette.fuse.differences`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

import msgspec

from lazarette.fuse import layers
from lazarette.fuse.clonetree import LINKS, UPPER, CloneTree
from lazarette.fuse.dirty import DirtyPaths, join
from lazarette.fuse.filesystem import Filesystem
from lazarette.fuse.layers import opened_beneath
from lazarette.fuse.passes import until_quick
from lazarette.fuse.urgency import urgent

_MOST_PASSES = 8
_PASS_GOAL_NS = 3_000_000


class Taken(msgspec.Struct):
    """What taking a snapshot did.

    Attributes:
        generation: its number in the life of this upper layer.
        linked: files taken over from the snapshot before.
        cloned_before: files cloned while everything ran.
        cloned_held: files cloned while the caller held the writers.
        held_ns: how long that lasted, without the caller's own part.
        whole: nothing was known of changes since the last snapshot, so all was cloned.
    """

    generation: int = 0
    linked: int = 0
    cloned_before: int = 0
    cloned_held: int = 0
    held_ns: int = 0
    whole: bool = False


class Snapshots:
    """Snapshots of one mounted union; methods run on any thread but the loop's.

    Args:
        filesystem: whose lock orders us with requests.
        dirty: the record of changes.
        upper, links: descriptors of the upper layer and of the index of hard links.
    """

    def __init__(self, filesystem: Filesystem, dirty: DirtyPaths, upper: int, links: int) -> None:
        self._filesystem = filesystem
        self._dirty = dirty
        self._upper = upper
        self._links = links
        self._copy: CloneTree | None = None
        self._result = Taken()
        self._pending: dict[bytes, bool] = {}
        self._is_taken = False

    def flush(self) -> None:
        """Write out files that are or were open for writing, without making a snapshot."""
        with self._filesystem.lock:
            paths = self._dirty.writers()
        for path in paths:
            folder, _, name = path.rpartition(b"/")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                with opened_beneath(self._upper, folder) as parent:
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    fd = os.open(name, flags, dir_fd=parent)
                    try:
                        os.fdatasync(fd)
                    finally:
                        os.close(fd)

    def prepare(self, target: str) -> None:
        """Step 1, while everything runs.

        Args:
            target: folder of the snapshot; it must not exist, its parent must, on the upper
                layer's filesystem.

        Raises:
            OSError: EEXIST; EOPNOTSUPP without reflinks; what the filesystem failed with.
        """
        if os.path.lexists(target):
            raise OSError(errno.EEXIST, "snapshot exists", target)
        self._abandon()
        self._is_taken = False
        copy = self._copy = CloneTree(self._upper, self._links, target)
        result = self._result = Taken()
        with self._filesystem.lock:
            previous = self._dirty.snapshot if self._dirty.known else ""
            self._dirty.begin()
            self._pending = self._dirty.take()
            # one that is open now may be written to and closed before step 2, which then
            # no longer finds it among those open
            self._dirty.note_writers()
            paths = self._pending | self._dirty.paths()
        try:
            if previous and os.path.isdir(previous):
                copy.link_all(previous)
                copy.apply(_named(paths, self._index_names()))
            else:
                result.whole = True
                copy.clone_all()
            self._catch_up(copy)
        except BaseException:
            self._abandon()
            raise
        result.linked, result.cloned_before = copy.linked, copy.cloned

    def _catch_up(self, copy: CloneTree) -> None:
        """Clone what changed meanwhile, until little is left for step 2 or it gets no less."""

        def once() -> None:
            with self._filesystem.lock:
                changed = self._changed()
            copy.refresh(changed)

        until_quick(once, _PASS_GOAL_NS, _MOST_PASSES)

    def _changed(self) -> dict[bytes, bool]:
        """What may have changed since it was last asked; the caller holds the lock."""
        since = self._dirty.take()
        for path, deep in since.items():
            self._pending[path] = deep or self._pending.get(path, False)
        changed = _named(since, self._index_names())
        for path in self._dirty.writers():
            changed.setdefault(join(UPPER, path), False)
        self._dirty.note_writers()
        return changed

    def _index_names(self) -> list[bytes]:
        return os.listdir(layers.descriptor_path(self._links))

    def _abandon(self) -> None:
        """Forget a snapshot that was begun; its changes are changes still."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None
            with self._filesystem.lock:
                self._dirty.give_back(self._pending)

    def take(self, target: str) -> Taken:
        """Step 2, while the caller holds the writers; step 1 too if it was left out.

        The snapshot shows this instant, but counts only after :meth:`settle`.

        Raises:
            OSError: as :meth:`prepare`.
        """
        if self._copy is None or self._copy.target != target:
            self.prepare(target)
        copy, result = self._copy, self._result
        assert copy is not None
        start = time.monotonic_ns()
        try:
            with urgent(), self._filesystem.lock:
                copy.refresh(self._changed())
        except BaseException:
            self._abandon()
            raise
        self._is_taken = True
        result.held_ns = time.monotonic_ns() - start
        result.cloned_held = copy.cloned - result.cloned_before
        return result

    def settle(self, target: str) -> Taken:
        """Step 3, writers running again: make the snapshot durable and give it its name.

        Raises:
            OSError: EINVAL when it was not taken; what the filesystem failed with.
        """
        copy, result = self._copy, self._result
        if copy is None or copy.target != target or not self._is_taken:
            raise OSError(errno.EINVAL, "no such snapshot has been taken", target)
        try:
            copy.finish()
        except BaseException:
            self._abandon()
            raise
        with self._filesystem.lock:
            self._dirty.taken(target)
            result.generation = self._dirty.generation
        copy.close()
        self._copy = None
        return result

    def changed(self) -> list[bytes]:
        """Paths that may differ from the last snapshot.

        Raises:
            OSError: EUCLEAN when that is not known (no snapshot, or a server was killed).
        """
        with self._filesystem.lock:
            if not self._dirty.known:
                raise OSError(errno.EUCLEAN, "changes since the last snapshot are not known")
            return sorted({*self._dirty.paths(), *self._dirty.writers()})


def _named(paths: dict[bytes, bool], index: list[bytes]) -> dict[bytes, bool]:
    """Paths with the tree's name before them, and those of the index."""
    named = {join(UPPER, path) if path else UPPER: deep for path, deep in paths.items()}
    named.update({join(LINKS, name): False for name in index})
    named[LINKS] = False
    return named
