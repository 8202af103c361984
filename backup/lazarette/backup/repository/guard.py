"""What a run needs of leases: that others see it, and that it knows when it lost its own.

The leases themselves are :mod:`lazarette.backup.repository.leases`; prune's protocol is
written against this much of them, so that a model can stand in for them in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Protocol

from lazarette.backup.repository.leases import Lease, LeaseLost, Leases, Mode
from lazarette.storage.errors import Forbidden, InUse

__all__ = ["UNGUARDED", "Guard", "Guards", "Kind", "LeaseGuards", "LeaseLost", "NoGuards"]

_WAIT_SECONDS = 30.0
_MAINTENANCE = "maintenance: "


class Kind(Enum):
    """What a lease is for.

    ``READ``: restore, check; done without a lease on a store that cannot be written.
    ``ADD``: backup.  ``MAINTAIN``: prune, repair; one at a time, beside the others.
    """

    READ = "read"
    ADD = "add"
    MAINTAIN = "maintain"


class Guard(Protocol):
    """A lease that is held."""

    def check(self) -> None:
        """Return only while the lease is certainly still alive; asks nobody.

        Raises:
            LeaseLost: it may have run out.
        """
        ...

    def confirm(self) -> None:
        """Renew the lease now, before a step that must not happen without it.

        Raises:
            LeaseLost: it ran out.
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
            InUse: maintenance is asked for while another one runs.
        """
        ...


class _LeaseGuard:
    def __init__(self, leases: Leases, lease: Lease) -> None:
        self._leases = leases
        self._lease = lease

    def check(self) -> None:
        """See :meth:`Guard.check`."""
        self._lease.check()

    def confirm(self) -> None:
        """See :meth:`Guard.confirm`."""
        self._lease.confirm()

    def others(self) -> set[str]:
        """See :meth:`Guard.others`."""
        own = self._lease.holder.token
        return {holder.token for holder in self._leases.holders() if holder.token != own}


class LeaseGuards:
    """Leases of the repository itself.

    All are shared ones: prune never needs the others gone, only to know whom to wait for.
    Maintenance takes itself back when it sees another one.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    @contextmanager
    def hold(self, kind: Kind, purpose: str) -> Iterator[Guard]:
        """See :meth:`Guards.hold`."""
        if kind is Kind.MAINTAIN:
            purpose = _MAINTENANCE + purpose
        try:
            lease = self._leases.acquire(Mode.SHARED, purpose, wait=_WAIT_SECONDS)
        except Forbidden:
            if kind is not Kind.READ:
                raise
            yield _Unguarded()
            return
        with lease.kept():
            if kind is Kind.MAINTAIN:
                self._refuse_second(lease)
            yield _LeaseGuard(self._leases, lease)

    def _refuse_second(self, lease: Lease) -> None:
        for holder in self._leases.holders():
            other = holder.token != lease.holder.token
            if other and holder.purpose.startswith(_MAINTENANCE):
                raise InUse(
                    f"{holder.purpose} on {holder.host} (process {holder.pid}) is at work",
                    hint="wait until it ends; a dead one is removed by itself",
                )


class _Unguarded:
    def check(self) -> None:
        """Always alive."""

    def confirm(self) -> None:
        """Always alive."""

    def others(self) -> set[str]:
        """Nobody else."""
        return set()


UNGUARDED: Guard = _Unguarded()
"""A lease that is always good, where none is needed."""


class NoGuards:
    """For a store that only one process uses, such as a copy on a disk in a drawer."""

    @contextmanager
    def hold(self, kind: Kind, purpose: str) -> Iterator[Guard]:
        """See :meth:`Guards.hold`."""
        del kind, purpose
        yield _Unguarded()
