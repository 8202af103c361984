"""This host's picture of the others: networks they made, endpoints they run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.cluster import Record, View
from lazarette.runtime.networks.directory import Directory, Entry
from lazarette.runtime.networks.model import Network
from lazarette.runtime.networks.overlay import OverlayDriver
from lazarette.storage.errors import LazaretteError

log = logging.getLogger(__name__)


class Peers:
    """Follows the cluster: networks come and go, names and forwarding entries with them.

    Args:
        host_id: this host's.
        catalogue: of networks.
        directory: of names.
        driver: that forwards.
        in_use: whether a network has endpoints on this host.
        rebuild: makes the firewall's table anew.
    """

    def __init__(
        self,
        host_id: str,
        catalogue: Catalogue,
        directory: Directory,
        driver: OverlayDriver,
        in_use: Callable[[str], bool],
        rebuild: Callable[[], None],
    ) -> None:
        self._host_id = host_id
        self._catalogue = catalogue
        self._directory = directory
        self._driver = driver
        self._in_use = in_use
        self._rebuild = rebuild
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._known: dict[str, Record] = {}

    def expect(self, networks: list[Network]) -> None:
        """Networks that were recorded before; those the cluster has no longer will go."""
        self._seen |= {network.id for network in networks if network.driver == self._driver.name}

    def follow(self, view: View) -> None:
        """Bring this host in line with a view of the cluster."""
        with self._lock:
            changed = False
            for network in view.networks.values():
                if self._catalogue.get(network.id) is None and network.id not in self._seen:
                    changed |= self._adopt(network)
                self._seen.add(network.id)
            for network_id in self._seen - view.networks.keys():
                changed |= self._drop(network_id)
            if changed:
                self._rebuild()
            elsewhere = {
                id_: record for id_, record in view.records.items() if record.host != self._host_id
            }
            self._name(elsewhere)
            self._driver.connect(view.doors, view.hosts)
            for network in view.networks.values():
                records = {id_: r for id_, r in elsewhere.items() if r.network == network.id}
                self._driver.apply(network, records)

    def _adopt(self, network: Network) -> bool:
        if not self._catalogue.adopt(network):
            return False
        try:
            self._driver.make(network)
        except LazaretteError as error:
            log.warning("network %s of the cluster cannot be made here: %s", network.name, error)
            return False
        return True

    def _drop(self, network_id: str) -> bool:
        network = self._catalogue.get(network_id)
        if network is None:
            self._seen.discard(network_id)
            return False
        if self._in_use(network_id):
            log.warning("network %s was removed elsewhere but is in use here", network.name)
            return False
        self._seen.discard(network_id)
        self._catalogue.forget(network)
        self._driver.unmake(network)
        self._catalogue.erase(network)
        return True

    def _name(self, elsewhere: dict[str, Record]) -> None:
        for id_, record in list(self._known.items()):
            if elsewhere.get(id_) != record:
                self._directory.withdraw(record.network, id_)
                del self._known[id_]
        for id_, record in elsewhere.items():
            network = self._catalogue.get(record.network)
            if id_ in self._known or network is None:
                continue
            entry = Entry(
                owner=id_,
                name=record.name.lower(),
                names=tuple(name.lower() for name in record.names),
                ipv4=record.ip,
                ipv6=record.ipv6,
            )
            self._directory.publish(record.network, network.name, entry)
            self._known[id_] = record
