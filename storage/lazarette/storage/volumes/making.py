"""Snapshots on their way: what is done before writers are held, meanwhile, and after.

A group of volumes is taken at one instant by going through the methods in their order, each
for all volumes before the next one for any.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lazarette.fuse.passes import until_quick
from lazarette.fuse.urgency import urgent
from lazarette.storage import beneath
from lazarette.storage.clock import Clock
from lazarette.storage.refresh import RefreshedCopy, copy_tree
from lazarette.storage.syscalls import syncfs

# what a pass leaves to the next one is what is written while it runs, so passes get shorter
_PASS_GOAL_NS = 20_000_000
_MOST_PASSES = 6


class SnapshotMaking:
    """The snapshot of one volume.

    Args:
        staged: an empty folder for its content.

    Attributes:
        holds_writers: it holds the writers by itself, so that nobody else need.
    """

    holds_writers = False

    def __init__(self, staged: Path) -> None:
        self.staged = staged

    def prepare(self) -> None:
        """Do what can be done while writers run."""

    def hold(self) -> None:
        """Hold the writers, where it does so by itself."""

    def take(self) -> None:
        """Writers are held: take what is there now."""
        raise NotImplementedError

    def release(self) -> None:
        """Let the writers go on; also when :meth:`hold` or :meth:`take` failed."""

    def settle(self) -> None:
        """Writers run again: make it durable."""

    def close(self) -> None:
        """Let go of everything; called once, whatever happened."""


class CopyMaking(SnapshotMaking):
    """A copy of a folder made while writers are held.

    Args:
        source: the volume's content.
        staged: an empty folder for the snapshot's.
    """

    def __init__(self, source: Path, staged: Path) -> None:
        super().__init__(staged)
        self._opened = ExitStack()
        with ExitStack() as opening:
            self._source = opening.enter_context(beneath.opened(source))
            self._target = opening.enter_context(beneath.opened(staged))
            self._opened = opening.pop_all()

    def prepare(self) -> None:
        """Write back what is dirty."""
        syncfs(self._source)

    def take(self) -> None:
        """Copy the folder."""
        copy_tree(self._source, self._target)

    def settle(self) -> None:
        """Write the copy out."""
        syncfs(self._target)

    def close(self) -> None:
        """Close both folders."""
        self._opened.close()


class ReflinkMaking(CopyMaking):
    """A copy by reflinks: made while writers run, brought up to date while they are held.

    Args:
        source: the volume's content.
        staged: an empty folder for the snapshot's, on the same filesystem.
        clock: to see how long a pass takes.
    """

    def __init__(self, source: Path, staged: Path, clock: Clock) -> None:
        super().__init__(source, staged)
        self._clock = clock
        self._copy = RefreshedCopy(self._source, self._target)

    def prepare(self) -> None:
        """Copy, and bring up to date until that is quick or gets no quicker."""
        super().prepare()
        until_quick(self._copy.refresh, _PASS_GOAL_NS, _MOST_PASSES, self._clock.monotonic_ns)

    def take(self) -> None:
        """Bring the copy up to date, before anybody else has the processor."""
        with urgent():
            self._copy.refresh()
