"""Networks made and removed: records, links, other hosts, and who is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import nullcontext

from lazarette.runtime.networks.alone import alone
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.contract import NetworkDriver
from lazarette.runtime.networks.joining import Tell
from lazarette.runtime.networks.model import (
    PREDEFINED,
    Network,
    NetworkInUse,
    NetworkNotFound,
    NetworkSpec,
    PruneRunning,
)
from lazarette.storage.errors import Forbidden, LazaretteError

log = logging.getLogger(__name__)


class Maker:
    """Makes networks and removes them.

    Args:
        catalogue: of networks.
        driver: who wires a network.
        users: names of a network's endpoints on this host.
        rebuild: makes the firewall's table anew.
        lock: held while the catalogue changes; the manager's.
        tell: told of each network made or removed.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        driver: Callable[[Network], NetworkDriver | None],
        users: Callable[[Network], list[str]],
        rebuild: Callable[[], None],
        lock: threading.RLock,
        tell: Tell,
    ) -> None:
        self._catalogue = catalogue
        self._driver = driver
        self._users = users
        self._rebuild = rebuild
        self._lock = lock
        self._tell = tell
        self._pruning = threading.Lock()

    def make_again(self) -> None:
        """Bring up what is recorded; what cannot be is told in the log."""
        for network in self._catalogue.all():
            driver = self._driver(network)
            if driver is None:
                continue
            try:
                driver.make(network)
            except LazaretteError as error:
                log.warning("network %s cannot be brought up: %s", network.name, error)

    def take_down(self) -> None:
        """Remove the links of all networks; their records stay."""
        for network in self._catalogue.all():
            driver = self._driver(network)
            if driver is not None:
                driver.unmake(network)

    def create(self, spec: NetworkSpec) -> Network:
        """See :meth:`~lazarette.runtime.networks.manager.NetworkManager.create`."""
        if spec.name in PREDEFINED:
            raise Forbidden(f"operation is not permitted on predefined {spec.name} network")
        with alone() if spec.driver == "bridge" else nullcontext():
            network = self._catalogue.add(spec)
            driver = self._driver(network)
            try:
                if driver is not None:
                    driver.make(network)
                    self._rebuild()
            except BaseException:
                self._retire(network)
                self._unmake(network)
                raise
        self._tell(network, "create")
        return network

    def remove(self, ref: str) -> None:
        """See :meth:`~lazarette.runtime.networks.manager.NetworkManager.remove`."""
        network = self._catalogue.inspect(ref)
        if not network.user_defined:
            raise NetworkInUse(f"{network.name} is a pre-defined network and cannot be removed")
        shared = self._catalogue.shared(network)
        elsewhere = shared.users(network) if shared is not None else []
        with self._lock:
            users = list(dict.fromkeys([*self._users(network), *elsewhere]))
            if users:
                raise NetworkInUse(
                    f"error while removing network: network {network.name} id {network.id} "
                    f"has active endpoints ({', '.join(users)})",
                    hint="disconnect or stop them first",
                )
            self._catalogue.forget(network)
        self._retire(network)
        self._unmake(network)
        self._tell(network, "destroy")

    def prune(self, wanted: Collection[str]) -> list[str]:
        """See :meth:`~lazarette.runtime.networks.manager.NetworkManager.prune`."""
        if not self._pruning.acquire(blocking=False):
            raise PruneRunning("a prune operation is already running")
        removed = []
        try:
            for network in self._catalogue.all():
                if not network.user_defined or network.id not in wanted:
                    continue
                try:
                    self.remove(network.id)
                    removed.append(network.name)
                except (NetworkInUse, NetworkNotFound):
                    continue
        finally:
            self._pruning.release()
        return removed

    def _retire(self, network: Network) -> None:
        shared = self._catalogue.shared(network)
        if shared is not None:
            shared.retire(network)

    def _unmake(self, network: Network) -> None:
        self._catalogue.forget(network)
        driver = self._driver(network)
        if driver is not None:
            driver.unmake(network)
            self._rebuild()
        self._catalogue.erase(network)
