"""What a run needs of leases: that others see it, and that it knows when it lost its own.

The leases themselves are :mod:`lazarette.backup.repository.leases`; prune's protocol is
written against this much of them, so that a model can stand in for them in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Protocol

from lazarette.storage.errors import LazaretteError


class LeaseLost(LazaretteError):
    """A run's lease ran out before it was done; somebody may have pruned meanwhile."""

    number = 225
    exit_code = 35
    http_status = 409


class Kind(Enum):
    """Shared leases (backup, restore, check) live side by side; exclusive ones do not."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Guard(Protocol):
    """A lease that is held."""

    def check(self) -> None:
        """Return only while the lease is certainly still alive.

        Raises:
            LeaseLost: it may have run out.
        """
        ...

    def others(self) -> set[str]:
        """Names of all other leases that are alive, read from the store now."""
        ...


class Guards(Protocol):
    """Where leases come from."""

    def hold(self, kind: Kind, purpose: str) -> AbstractContextManager[Guard]:
        """Hold a lease for the length of a block.

        Raises:
            InUse: an exclusive lease is held by another.
        """
        ...


class _Unguarded:
    def check(self) -> None:
        """Always alive."""

    def others(self) -> set[str]:
        """Nobody else."""
        return set()


class NoGuards:
    """For a store that only one process uses, such as a copy on a disk in a drawer."""

    @contextmanager
    def hold(self, kind: Kind, purpose: str) -> Iterator[Guard]:
        """See :meth:`Guards.hold`."""
        del kind, purpose
        yield _Unguarded()
