"""Where a daemon keeps things and listens; several may run side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_DATA_ROOT = Path("/var/lib/lazarette")
DEFAULT_EXEC_ROOT = Path("/run/lazarette")
DEFAULT_POLICY_FILE = Path("/etc/lazarette/policies.toml")
DEFAULT_HOST = "unix:///run/lazarette/lazarette.sock"


@dataclass(frozen=True)
class Config:
    """Settings of one daemon.

    Attributes:
        data_root: what survives a reboot: state database, images, volumes.
        exec_root: what does not: sockets, pid files, network namespaces, FIFOs.
        hosts: addresses to listen on, ``unix://PATH`` or ``tcp://HOST:PORT``.
        volume_driver: default for new volumes, databases' too; empty means chosen for this host.
        layer_driver: driver of image layers; empty means chosen for this host.
        runtime: ``crun`` or ``runc``; empty means probed.
        userns_remap: whose subordinate ids the users of containers are, see
            :mod:`lazarette.runtime.remap`; empty means that they are the host's.
        bridge: name of the default bridge.
        insecure_registries: registries reached without TLS or without checking it.
        registry_mirrors: base URLs asked before the hub.
        etcd: URLs of the etcd that hosts of overlay networks share; none: no overlays.
        advertise_address: address those hosts reach this one at.
        labels: of the engine, shown in ``info``.
        parallel_backups: policies that run at once; the others wait for their turn.
        safety_days: how long snapshots stay that were taken before a volume was changed.
        store_patience: seconds a read of an instant volume waits for a store that does not
            answer, before it fails with EIO.
        policy_file: policies in TOML, read again when it changes; need not exist.
    """

    data_root: Path = DEFAULT_DATA_ROOT
    exec_root: Path = DEFAULT_EXEC_ROOT
    hosts: tuple[str, ...] = (DEFAULT_HOST,)
    volume_driver: str = ""
    layer_driver: str = ""
    runtime: str = ""
    userns_remap: str = ""
    bridge: str = "laz0"
    insecure_registries: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    registry_mirrors: tuple[str, ...] = ()
    etcd: tuple[str, ...] = ()
    advertise_address: str = ""
    labels: tuple[str, ...] = field(default=())
    policy_file: Path = DEFAULT_POLICY_FILE
    parallel_backups: int = 2
    safety_days: int = 7
    store_patience: int = 120

    @property
    def state_file(self) -> Path:
        """The daemon's database."""
        return self.data_root / "state.db"
