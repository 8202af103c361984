"""What hosts tell one another about overlay networks, through etcd.

Keys below the prefix::

    /hosts/HOST                 address of a live host                       leased
    /doors/HOST                 its WireGuard key and port, if it has any    leased
    /networks/ID                a network, for all hosts
    /names/NAME                 its id: names are unique in the cluster
    /vnis/NUMBER                its id: VXLAN identifiers are, too
    /pools/SUBNET               its id
    /claims/ID/ADDRESS          host and endpoint an address belongs to
    /records/ID/ENDPOINT        names, addresses and host of an endpoint     leased

Semantics:

1. A claim is made in a transaction that fails if there is one: an address has one holder.
2. A host keeps one lease alive; when it dies, its leased keys vanish after the TTL, and
   with them names, neighbours and forwarding entries on the other hosts.
3. A claim of a host that lives is never taken over.  One of a dead host may be, in a
   transaction that holds only while that host has no lease; such addresses are given last.
4. A host that comes back announces only what it still has claims for, and takes the rest
   away from its containers before anybody is sent to them.
5. While etcd cannot be reached everything stays as it was last known: hosts go on talking;
   only new endpoints on overlays must wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.networks.etcd import Check, ClusterConfig, ClusterUnavailable, EtcdStore
from lazarette.runtime.networks.model import AddressConflict, Network, NetworkExists
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.wireguard import Door
from lazarette.storage.errors import LazaretteError

log = logging.getLogger(__name__)

FIRST_VNI, LAST_VNI = 4096, 1 << 24
_LOOK_SECONDS = 3.0
_RETRY_SECONDS = 0.5


class Claim(msgspec.Struct, frozen=True):
    """Whose an address is."""

    host: str


class Record(msgspec.Struct, frozen=True):
    """An endpoint, as other hosts need it.

    Attributes:
        host: the id of its host.
        via: address the host is reached at.
        network, endpoint: ids.
        name: its first name.
        names: all of them.
        ip, ipv6, mac: its addresses.
    """

    host: str
    via: str
    network: str
    endpoint: str
    name: str
    names: tuple[str, ...]
    ip: str
    ipv6: str
    mac: str


@dataclass(frozen=True)
class View:
    """The cluster at one moment.

    Attributes:
        hosts: address by id of live hosts.
        doors: of those that encrypt, by id.
        networks: by id.
        records: by endpoint id.
        claims: holder by (network id, address).
    """

    hosts: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict)
    claims: Mapping[tuple[str, str], Claim] = field(default_factory=dict)
    doors: Mapping[str, Door] = field(default_factory=dict)


class Cluster:
    """This host's part in it.

    Args:
        config: where etcd is and how this host is reached.
        host_id: stays the same over restarts.
        namespace: the host's.
        changed: told of every new view, in a thread of the cluster's.
        lost: told of endpoints whose address another host has now.
    """

    def __init__(
        self,
        config: ClusterConfig,
        host_id: str,
        namespace: NetNamespace,
        changed: Callable[[View], None],
        lost: Callable[[Record], None],
    ) -> None:
        self.config = config
        self.host_id = host_id
        self.view = View()
        self._store = EtcdStore(config, namespace)
        self._changed = changed
        self._lost = lost
        self._lock = threading.RLock()
        self._lease = 0
        self._announced: dict[str, Record] = {}
        self._claims: set[str] = set()
        self._door: Door | None = None
        self._untidy = False
        self._stop = threading.Event()
        self._let_go = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, name="cluster-lease", daemon=True),
            threading.Thread(target=self._follow, name="cluster-watch", daemon=True),
        ]

    def start(self, announced: list[Record]) -> None:
        """Join, and go on in the background; etcd need not be there yet.

        Args:
            announced: endpoints that run on this host.
        """
        self._announced = {record.endpoint: record for record in announced}
        self._claims = {key for record in announced for key in _claim_keys(record)}
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop taking part; leased keys stay for their time, so that a restart is not seen."""
        keeper, follower = self._threads
        for event, thread in ((self._stop, follower), (self._let_go, keeper)):
            event.set()  # the follower may take seconds: the lease is kept until then
            if thread.is_alive():
                thread.join()
        self._store.close()

    def leave(self) -> None:
        """Tell the others that this host goes for good."""
        with self._lock:
            if self._lease:
                self._store.revoke(self._lease)
                self._lease = 0

    def register(self, network: Network, complete: Callable[[int], Network]) -> Network:
        """Make a network known to all hosts.

        Args:
            network: without VXLAN identifier.
            complete: gives the network with the identifier found for it.

        Returns:
            The network with it.

        Raises:
            NetworkExists: the name is taken on some host.
            AddressConflict: its subnet is.
            ClusterUnavailable: etcd cannot be reached.
        """
        seen = self._store.snapshot().values
        if f"/names/{network.name}" in seen:
            raise NetworkExists(f"network with name {network.name} already exists")
        taken = {int(key.rpartition("/")[2]) for key in seen if key.startswith("/vnis/")}
        for vni in range(FIRST_VNI, LAST_VNI):
            if vni in taken:
                continue
            keys = [f"/names/{network.name}", f"/vnis/{vni}", *_pool_keys(network)]
            owner = network.id.encode()
            done = complete(vni)
            body = {**dict.fromkeys(keys, owner), f"/networks/{network.id}": _pack(done)}
            if self._store.change([Check(key, None) for key in keys], body):
                return done
            again = self._store.snapshot().values
            if any(key in again for key in keys if not key.startswith("/vnis/")):
                break
        raise AddressConflict(
            f"network {network.name} was made on another host at the same time", hint="try again"
        )

    def unregister(self, network: Network, vni: int) -> None:
        """Take a network from all hosts."""
        keys = [f"/names/{network.name}", f"/vnis/{vni}", *_pool_keys(network)]
        self._store.change([], {}, [f"/networks/{network.id}", *keys])
        self._store.delete_below(f"/claims/{network.id}")

    def users(self, network_id: str) -> list[str]:
        """Names of a network's endpoints on live hosts."""
        seen = self._store.snapshot().values
        return [
            jsontext.decode(body, type=Record).name
            for key, body in seen.items()
            if key.startswith(f"/records/{network_id}/")
        ]

    def elsewhere(self, network_id: str) -> list[Record]:
        """A network's endpoints on other live hosts, as last seen."""
        return [
            record
            for record in self.view.records.values()
            if record.network == network_id and record.host != self.host_id
        ]

    def claim(self, network_id: str, address: str) -> bool:
        """Claim an address for this host; False if it belongs to another.

        Raises:
            ClusterUnavailable: etcd cannot be reached.
        """
        key = f"/claims/{network_id}/{address}"
        with self._lock:
            self._claims.add(key)
        try:
            claimed = self._claim(key)
        except BaseException:
            with self._lock:
                self._claims.discard(key)
                self._untidy = True
            raise
        if not claimed:
            with self._lock:
                self._claims.discard(key)
        return claimed

    def _claim(self, key: str) -> bool:
        mine = msgspec.json.encode(Claim(self.host_id))
        if self._store.change([Check(key, None)], {key: mine}):
            return True
        held = self._store.snapshot().values.get(key)
        if held is None:
            return self._store.change([Check(key, None)], {key: mine})
        owner = jsontext.decode(held, type=Claim).host
        if owner == self.host_id:
            return True
        dead = [Check(key, held), Check(f"/hosts/{owner}", None)]
        return self._store.change(dead, {key: mine})

    def claimed_elsewhere(self, network_id: str) -> set[str]:
        """Addresses other hosts have claimed, dead or alive, as last seen."""
        return {
            address
            for (network, address), claim in self.view.claims.items()
            if network == network_id and claim.host != self.host_id
        }

    def release(self, network_id: str, address: str) -> None:
        """Give a claim back; done later if etcd is away."""
        key = f"/claims/{network_id}/{address}"
        mine = msgspec.json.encode(Claim(self.host_id))
        with self._lock:
            self._claims.discard(key)
        try:
            self._store.change([Check(key, mine)], {}, [key])
        except ClusterUnavailable:
            self._untidy = True
            log.warning("the claim on %s is given back when etcd is there again", address)

    def announce(self, record: Record) -> None:
        """Tell all hosts of an endpoint.

        Raises:
            ClusterUnavailable: etcd cannot be reached.
        """
        with self._lock:
            self._announced[record.endpoint] = record
            if self._lease:
                key = f"/records/{record.network}/{record.endpoint}"
                self._store.change([], {key: msgspec.json.encode(record)}, lease=self._lease)

    def withdraw(self, network_id: str, endpoint_id: str) -> None:
        """It is gone; fine if it was not announced."""
        with self._lock:
            self._announced.pop(endpoint_id, None)
        try:
            self._store.change([], {}, [f"/records/{network_id}/{endpoint_id}"])
        except ClusterUnavailable:
            self._untidy = True
            log.warning("endpoint %s is withdrawn when etcd is there again", endpoint_id[:12])

    def offer(self, door: Door | None) -> None:
        """Tell all hosts how to reach this one encrypted, or that they cannot any more;
        done later if etcd is away."""
        with self._lock:
            self._door = door
            if not self._lease:
                return
            key = f"/doors/{self.host_id}"
            try:
                if door is None:
                    self._store.change([], {}, [key])
                else:
                    self._store.change([], {key: msgspec.json.encode(door)}, lease=self._lease)
            except ClusterUnavailable:
                self._lease = 0  # everything is told anew with the next one
                log.warning("the way to this host is told when etcd is there again")

    def _keep(self) -> None:
        """Keep the lease alive; get a new one, and announce all anew, when it is lost."""
        pause = 0.0
        while not self._let_go.wait(pause):
            pause = self.config.ttl / 3
            try:
                lost: list[Record] = []
                with self._lock:
                    if not self._lease or not self._store.keep_alive(self._lease):
                        lost = self._join()
                    elif self._untidy:
                        self._tidy(self._store.snapshot().values)
                for record in lost:
                    self._lost(record)
            except ClusterUnavailable as error:
                log.info("%s", error)
                pause = _RETRY_SECONDS
            except LazaretteError as error:
                log.warning("an endpoint lost to another host is still there: %s", error)

    def _join(self) -> list[Record]:
        """Announce everything with a new lease; what is no longer this host's is returned."""
        lost = []
        self._lease = 0
        lease = self._store.lease(self.config.ttl)
        seen = self._store.snapshot().values
        presence = {f"/hosts/{self.host_id}": self.config.advertise.encode()}
        if self._door is not None:
            presence[f"/doors/{self.host_id}"] = msgspec.json.encode(self._door)
        self._store.change([], presence, lease=lease)
        mine = msgspec.json.encode(Claim(self.host_id))
        for record in list(self._announced.values()):
            claims = _claim_keys(record)
            for key in claims:
                if key not in seen:
                    self._store.change([Check(key, None)], {key: mine})
            body = {f"/records/{record.network}/{record.endpoint}": msgspec.json.encode(record)}
            checks = [Check(key, mine) for key in claims]
            if not self._store.change(checks, body, lease=lease):
                del self._announced[record.endpoint]
                lost.append(record)
        self._tidy(seen)
        self._lease = lease
        return lost

    def _tidy(self, seen: Mapping[str, bytes]) -> None:
        """Give back what this host had before and has no longer."""
        stale = []
        for key, body in seen.items():
            if key.startswith("/claims/") and key not in self._claims:
                if jsontext.decode(body, type=Claim).host == self.host_id:
                    stale.append(key)
            elif key.startswith("/records/"):
                record = jsontext.decode(body, type=Record)
                if record.host == self.host_id and record.endpoint not in self._announced:
                    stale.append(key)
        for key in stale:
            self._store.change([Check(key, seen[key])], {}, [key])
        self._untidy = False

    def _follow(self) -> None:
        """Tell of every change, and look by itself now and then."""
        while not self._stop.is_set():
            try:
                snapshot = self._store.snapshot()
                view = _view(snapshot.values)
                if view != self.view:
                    self._changed(view)
                    self.view = view
                self._store.wait(snapshot.revision, _LOOK_SECONDS, self._stop)
            except ClusterUnavailable as error:
                log.info("%s", error)
                self._stop.wait(_RETRY_SECONDS)
            except LazaretteError as error:
                log.warning("this host does not follow the cluster yet: %s", error)
                self._stop.wait(_RETRY_SECONDS)


def _claim_keys(record: Record) -> list[str]:
    addresses = [address for address in (record.ip, record.ipv6) if address]
    return [f"/claims/{record.network}/{address}" for address in addresses]


def _pool_keys(network: Network) -> list[str]:
    return [f"/pools/{pool.subnet.replace('/', '_')}" for pool in network.spec.pools]


def _pack(network: Network) -> bytes:
    return msgspec.json.encode(network)


def _view(values: Mapping[str, bytes]) -> View:
    hosts: dict[str, str] = {}
    networks: dict[str, Network] = {}
    records: dict[str, Record] = {}
    claims: dict[tuple[str, str], Claim] = {}
    doors: dict[str, Door] = {}
    for key, body in values.items():
        kind, _, rest = key[1:].partition("/")
        try:
            if kind == "hosts":
                hosts[rest] = body.decode()
            elif kind == "doors":
                doors[rest] = jsontext.decode(body, type=Door)
            elif kind == "networks":
                networks[rest] = jsontext.decode(body, type=Network)
            elif kind == "records":
                record = jsontext.decode(body, type=Record)
                records[record.endpoint] = record
            elif kind == "claims":
                network, _, address = rest.partition("/")
                claims[network, address] = jsontext.decode(body, type=Claim)
        except (msgspec.DecodeError, UnicodeDecodeError) as bad:
            log.warning("key %s in etcd is not understood: %s", key, bad)
    return View(hosts, networks, records, claims, doors)
