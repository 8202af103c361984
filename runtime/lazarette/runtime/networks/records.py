"""What is remembered: networks for good, endpoints and ports until the next boot.

Networks are in the daemon's database.  Endpoints and published ports live and die with
network namespaces, so their records are in a database of their own next to those: it
needs no sync to the disk, and what it says is void after a boot.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.networks.model import Endpoint, Network, PortBinding
from lazarette.storage.state import State

_NETWORKS = """
CREATE TABLE networks (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body BLOB NOT NULL
) STRICT
"""

_IDENTITY = "CREATE TABLE cluster_host (id TEXT NOT NULL) STRICT"

_LIVE = """
CREATE TABLE boot (id TEXT NOT NULL) STRICT;
CREATE TABLE endpoints (
    container TEXT NOT NULL,
    network TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (container, network)
) STRICT;
CREATE TABLE ports (container TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE dns (container TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT
"""


class NetworkRecords:
    """Networks by id, in the daemon's database."""

    def __init__(self, state: State) -> None:
        self._state = state
        state.migrate("networks", [_NETWORKS, _IDENTITY])

    def host_id(self) -> str:
        """What this host is called among others; made once."""
        row = self._state.row("SELECT id FROM cluster_host")
        if row is not None:
            return str(row["id"])
        made = secrets.token_hex(16)
        with self._state.write() as db:
            db.execute("INSERT INTO cluster_host VALUES (?)", (made,))
        return made

    def load(self) -> list[Network]:
        """All of them."""
        rows = self._state.rows("SELECT body FROM networks")
        return [jsontext.decode(row["body"], type=Network) for row in rows]

    def save(self, network: Network) -> None:
        """Keep one; on the disk when this returns."""
        with self._state.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO networks VALUES (?, ?, ?)",
                (network.id, network.name, msgspec.json.encode(network)),
            )

    def forget(self, network_id: str) -> None:
        """Drop one."""
        with self._state.write() as db:
            db.execute("DELETE FROM networks WHERE id = ?", (network_id,))


class LiveRecords:
    """Endpoints and ports of sandboxes, valid for this boot of the host."""

    def __init__(self, folder: Path) -> None:
        self._state = State(folder / "networks.db")
        self._state.rows("PRAGMA synchronous=OFF")
        self._state.migrate("live", [_LIVE])
        self.expire(Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def close(self) -> None:
        """Close the database."""
        self._state.close()

    def expire(self, boot: str) -> None:
        """Drop all that was kept during another boot."""
        row = self._state.row("SELECT id FROM boot")
        if row is not None and row["id"] == boot:
            return
        with self._state.write() as db:
            for table in ("boot", "endpoints", "ports", "dns"):
                db.execute(f"DELETE FROM {table}")
            db.execute("INSERT INTO boot VALUES (?)", (boot,))

    def endpoints(self) -> list[Endpoint]:
        """All endpoints."""
        rows = self._state.rows("SELECT body FROM endpoints ORDER BY rowid")
        return [jsontext.decode(row["body"], type=Endpoint) for row in rows]

    def save_endpoint(self, endpoint: Endpoint) -> None:
        """Keep one; before anything is made for it."""
        with self._state.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO endpoints VALUES (?, ?, ?)",
                (endpoint.container, endpoint.network, msgspec.json.encode(endpoint)),
            )

    def forget_endpoint(self, endpoint: Endpoint) -> None:
        """Drop one."""
        with self._state.write() as db:
            db.execute(
                "DELETE FROM endpoints WHERE container = ? AND network = ?",
                (endpoint.container, endpoint.network),
            )

    def ports(self) -> dict[str, list[PortBinding]]:
        """Published ports by container."""
        rows = self._state.rows("SELECT container, body FROM ports")
        return {
            row["container"]: jsontext.decode(row["body"], type=list[PortBinding]) for row in rows
        }

    def save_ports(self, container: str, bindings: list[PortBinding]) -> None:
        """Keep a container's published ports; none drops the record."""
        with self._state.write() as db:
            if bindings:
                db.execute(
                    "INSERT OR REPLACE INTO ports VALUES (?, ?)",
                    (container, msgspec.json.encode(bindings)),
                )
            else:
                db.execute("DELETE FROM ports WHERE container = ?", (container,))

    def dns(self) -> dict[str, list[str]]:
        """Resolvers containers were given."""
        rows = self._state.rows("SELECT container, body FROM dns")
        return {row["container"]: jsontext.decode(row["body"], type=list[str]) for row in rows}

    def save_dns(self, container: str, servers: list[str]) -> None:
        """Keep a container's resolvers."""
        with self._state.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO dns VALUES (?, ?)",
                (container, msgspec.json.encode(servers)),
            )

    def forget_container(self, container: str) -> None:
        """Drop all of a container."""
        with self._state.write() as db:
            db.execute("DELETE FROM endpoints WHERE container = ?", (container,))
            db.execute("DELETE FROM ports WHERE container = ?", (container,))
            db.execute("DELETE FROM dns WHERE container = ?", (container,))
