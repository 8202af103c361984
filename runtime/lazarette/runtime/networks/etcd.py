"""etcd as the store hosts share: keys with values, transactions, leases, changes.

Through etcd's JSON gateway with ``etcd3gw``; a cluster's members are tried in turn.  Every
call has a deadline of seconds: a host that is cut off must notice.
"""

from __future__ import annotations

import base64
import ipaddress
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception

from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument, Unavailable

T = TypeVar("T")
CALL_SECONDS = 2.0


class ClusterUnavailable(Unavailable):
    """The store hosts share cannot be reached."""

    number = 349


@dataclass(frozen=True)
class ClusterConfig:
    """How a daemon takes part in networks over several hosts.

    Attributes:
        endpoints: URLs of etcd's members, ``http://HOST:2379``.
        advertise: address other hosts reach this one's VXLAN at.
        prefix: where keys go; hosts with another see nothing of one another.
        ca, cert, key: files for TLS; empty without.
        ttl: seconds after which a host that is silent is taken for dead.
    """

    endpoints: tuple[str, ...]
    advertise: str
    prefix: str = "/lazarette"
    ca: str = ""
    cert: str = ""
    key: str = ""
    ttl: int = 6


@dataclass(frozen=True)
class Snapshot:
    """All keys of a prefix at one revision."""

    values: Mapping[str, bytes]
    revision: int
    cluster: str


@dataclass(frozen=True)
class Check:
    """A condition of a transaction: the key is absent (None) or has that value."""

    key: str
    value: bytes | None


class EtcdStore:
    """Keys below a prefix.

    Args:
        config: where etcd is.
        host: the namespace it is reached from.
    """

    def __init__(self, config: ClusterConfig, host: NetNamespace) -> None:
        self._prefix = config.prefix.rstrip("/")
        self._host = host
        self._lock = threading.Lock()
        self._members = [_client(url, config) for url in config.endpoints]
        if not self._members:
            raise InvalidArgument("no etcd endpoint is named")

    def close(self) -> None:
        """Close connections."""
        for member in self._members:
            member.session.close()

    def snapshot(self) -> Snapshot:
        """Everything there is.

        Raises:
            ClusterUnavailable: no member answers.
        """
        first, last = _encoded(f"{self._prefix}/"), _encoded(f"{self._prefix}0")
        said = self._post("/kv/range", {"key": first, "range_end": last})
        values = {
            base64.b64decode(entry["key"]).decode().removeprefix(self._prefix): base64.b64decode(
                entry.get("value", "")
            )
            for entry in said.get("kvs", [])
        }
        head = said["header"]
        return Snapshot(values, int(head["revision"]), str(head["cluster_id"]))

    def change(
        self,
        checks: Sequence[Check],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        lease: int = 0,
    ) -> bool:
        """Put and delete keys if all checks hold; whether they did.

        Raises:
            ClusterUnavailable: no member answers; it may or may not have been done.
        """
        compare = []
        for check in checks:
            key = _encoded(self._prefix + check.key)
            if check.value is None:
                compare.append({"key": key, "target": "CREATE", "create_revision": "0"})
            else:
                value = base64.b64encode(check.value).decode()
                compare.append({"key": key, "target": "VALUE", "value": value})
        steps: list[dict[str, object]] = []
        for name, data in puts.items():
            put: dict[str, object] = {
                "key": _encoded(self._prefix + name),
                "value": base64.b64encode(data).decode(),
            }
            if lease:
                put["lease"] = str(lease)
            steps.append({"request_put": put})
        for name in deletes:
            steps.append({"request_delete_range": {"key": _encoded(self._prefix + name)}})
        said = self._post("/kv/txn", {"compare": compare, "success": steps})
        return bool(said.get("succeeded", False))

    def delete_below(self, folder: str) -> None:
        """Delete all keys below a folder."""
        first, last = self._prefix + folder + "/", self._prefix + folder + "0"
        self._post("/kv/deleterange", {"key": _encoded(first), "range_end": _encoded(last)})

    def lease(self, ttl: int) -> int:
        """A new lease: keys put with it vanish when it is not kept alive for that long."""
        return int(self._post("/lease/grant", {"TTL": str(ttl)})["ID"])

    def keep_alive(self, lease: int) -> bool:
        """Keep it; False if it has expired."""
        said = self._post("/lease/keepalive", {"ID": str(lease)})
        return int(said.get("result", {}).get("TTL", 0)) > 0

    def revoke(self, lease: int) -> None:
        """End it, and its keys."""
        self._post("/lease/revoke", {"ID": str(lease)})

    def wait(self, revision: int, seconds: float, stop: threading.Event) -> None:
        """Return when something changed after a revision, or after that long.

        Raises:
            ClusterUnavailable: the member broke off.
        """
        member = self._members[0]
        watched = {
            "key": _encoded(f"{self._prefix}/"),
            "range_end": _encoded(f"{self._prefix}0"),
            "start_revision": str(revision + 1),
        }
        try:
            with (
                self._host.entered(),
                member.session.post(
                    member.get_url("/watch"),
                    json={"create_request": watched},
                    stream=True,
                    timeout=(CALL_SECONDS, seconds),
                ) as answer,
            ):
                for number, _ in enumerate(answer.iter_lines()):
                    if number or stop.is_set():  # the first line says that the watch stands
                        return
        except requests.exceptions.ConnectionError as error:
            if "timed out" not in str(error).lower():
                raise ClusterUnavailable(f"watch etcd: {error}") from error
        except requests.exceptions.Timeout:
            return
        except requests.exceptions.RequestException as error:
            raise ClusterUnavailable(f"watch etcd: {error}") from error

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        def ask(member: Etcd3Client) -> dict[str, Any]:
            answer: dict[str, Any] = member.post(member.get_url(path), json=body)
            return answer

        return self._call(ask)

    def _call(self, work: Callable[[Etcd3Client], T]) -> T:
        """``work`` with the first member that answers; it is asked first from then on."""
        failure: Exception | None = None
        for member in list(self._members):
            try:
                with self._host.entered():
                    result = work(member)
            except (Etcd3Exception, requests.exceptions.RequestException) as error:
                failure = error
                continue
            with self._lock:
                if self._members[0] is not member:
                    self._members.remove(member)
                    self._members.insert(0, member)
            return result
        raise ClusterUnavailable(
            f"etcd cannot be reached: {failure}", hint="check that etcd runs and the URL is right"
        ) from failure


def cluster_of(endpoints: Sequence[str], advertise: str) -> ClusterConfig | None:
    """The settings of a daemon as a cluster's, None if it takes part in none.

    Raises:
        InvalidArgument: one setting is there without the other.
    """
    if not endpoints:
        return None
    try:
        address = str(ipaddress.IPv4Address(advertise))
    except ValueError as bad:
        raise InvalidArgument(
            f"invalid advertise address {advertise or '(none)'} of this host",
            hint="name the IPv4 address other hosts reach it at with --advertise-address",
        ) from bad
    return ClusterConfig(tuple(endpoints), address)


def _client(url: str, config: ClusterConfig) -> Etcd3Client:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(f"invalid etcd endpoint {url}", hint="write http://HOST:2379")
    return Etcd3Client(
        host=parts.hostname,
        port=parts.port or 2379,
        protocol=parts.scheme,
        ca_cert=config.ca or None,
        cert_cert=config.cert or None,
        cert_key=config.key or None,
        timeout=CALL_SECONDS,
        api_path="/v3/",
    )


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
