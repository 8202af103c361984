"""Which drivers exist, what this host lets them do, and which one is the default and why.

A driver is tried, not guessed at: the kernel is asked to do what the driver needs in a
folder of its own.  The order of preference comes from measurements
(``docs/decisions/0101-default-drivers.md``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lazarette.storage import beneath, btrfs, extents, loop
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, LazaretteError
from lazarette.storage.layers.btrfs import BtrfsLayerDriver
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.layers.copy import CopyLayerDriver
from lazarette.storage.layers.fuse import FuseLayerDriver
from lazarette.storage.layers.overlay import OverlayLayerDriver, stack
from lazarette.storage.volumes.bind import BindVolumeDriver
from lazarette.storage.volumes.btrfs import BtrfsVolumeDriver
from lazarette.storage.volumes.contract import VolumeDriver
from lazarette.storage.volumes.fuse import FuseVolumeDriver
from lazarette.storage.volumes.overlay import OverlayVolumeDriver
from lazarette.storage.volumes.tmpfs import TmpfsVolumeDriver

AUTOMATIC = "auto"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one driver on this host.

    Attributes:
        name: the driver's name.
        usable: it can be used here.
        reason: why, or why not; one line.
    """

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The default driver of a family.

    Attributes:
        name: the driver.
        reason: why this one, as ``info`` shows it.
        findings: of every driver, in the order of preference.
    """

    name: str
    reason: str
    findings: tuple[Finding, ...]


def _choose(family: str, wanted: str, findings: tuple[Finding, ...]) -> Choice:
    """The wanted driver, or the first usable one.

    Raises:
        InvalidArgument: the wanted one does not exist or does not work here.
    """
    names = ", ".join(found.name for found in findings)
    if wanted == AUTOMATIC:
        chosen = next(found for found in findings if found.usable)
        missing = [f"no {f.name}: {f.reason}" for f in findings[: findings.index(chosen)]]
        return Choice(chosen.name, "; ".join([chosen.reason, *missing]), findings)
    for found in findings:
        if found.name == wanted:
            if not found.usable:
                raise InvalidArgument(
                    f"the {family} driver {wanted} does not work on this host: {found.reason}",
                    hint="choose another one, or auto",
                )
            return Choice(wanted, f"configured; {found.reason}", findings)
    raise InvalidArgument(f"there is no {family} driver {wanted}", hint=f"valid: auto, {names}")


# ---- probes


def _native_btrfs(root: Path) -> bool:
    with beneath.opened(root) as folder:
        return btrfs.is_btrfs(folder)


def _probe_overlay(root: Path) -> Finding:
    trial = root / f"probe-{secrets.token_hex(4)}"
    folders = [trial / name for name in ("lower", "upper", "work", "merged")]
    for folder in folders:
        folder.mkdir(parents=True)
    lower, upper, work, merged = folders
    try:
        stack([lower], upper, work, merged)
        (merged / "written").touch()
    except (LazaretteError, OSError) as refused:
        return Finding("overlay", False, str(refused))
    finally:
        beneath.remove_path(trial)
    return Finding("overlay", True, "the kernel stacks layers here")


def _probe_fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as refused:
        return Finding("fuse", False, f"/dev/fuse: {refused.strerror}")
    return Finding("fuse", True, "a server process stacks layers")


def _probe_pool(name: str, program: str, kernel: str) -> Finding:
    """Whether a pool file of some format can be made."""
    if shutil.which(program) is None:
        return Finding(name, False, f"{program} is not installed")
    with open("/proc/filesystems", encoding="ascii") as table:
        known = {line.split()[-1] for line in table}
    if kernel not in known and not os.path.isdir(f"/sys/fs/{kernel}"):
        return Finding(name, False, f"the kernel has no {kernel}")
    if not loop.available():
        return Finding(name, False, "the kernel has no loop devices")
    return Finding(name, True, f"a {kernel} pool file")


def probe_layers(root: Path) -> tuple[Finding, ...]:
    """What this host lets each layer driver do, best first.

    Args:
        root: an existing folder where layers would be kept.
    """
    native = _native_btrfs(root)
    subvolumes = (
        Finding("btrfs", True, "the folder is on btrfs: a layer is a snapshot")
        if native
        else Finding("btrfs", False, "the folder is not on btrfs, and overlay needs no pool")
    )
    copies = Finding("copy", True, "layers are copied whole: slow, but it works anywhere")
    return _probe_overlay(root), subvolumes, _probe_fuse(), copies


def probe_volumes(root: Path) -> tuple[Finding, ...]:
    """What this host lets each volume driver do, best first.

    Args:
        root: an existing folder where volumes would be kept.
    """
    native = _native_btrfs(root)
    if native:
        subvolumes = Finding("btrfs", True, "the folder is on btrfs: atomic snapshots")
    else:
        subvolumes = _probe_pool("btrfs", "mkfs.btrfs", "btrfs")
    if extents.reflinks_work(root):
        reflinks = Finding("overlay", True, "the folder is on a disk with reflinks")
    else:
        reflinks = _probe_pool("overlay", "mkfs.xfs", "xfs")
    server = _probe_fuse()
    if server.usable and not reflinks.usable:
        server = Finding("fuse", False, f"needs reflinks: {reflinks.reason}")
    elif server.usable:
        server = Finding("fuse", True, f"a server process over {reflinks.reason}")
    return (
        subvolumes,
        reflinks,
        server,
        Finding("bind", True, "plain folders: snapshots are copies"),
        Finding("tmpfs", True, "in memory"),
    )


def _best_for_databases(root: Path, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The same findings in the order for few files that are written all the time.

    On a disk that is btrfs anyway reflinks are no quicker than its snapshots, which hold nobody.
    """
    if _native_btrfs(root):
        return findings
    return tuple(sorted(findings, key=lambda found: found.name != "overlay"))


# ---- making


LAYERS: Mapping[str, Callable[[Path, Clock], LayerDriver]] = {
    "overlay": OverlayLayerDriver,
    "btrfs": BtrfsLayerDriver,
    "fuse": FuseLayerDriver,
    "copy": CopyLayerDriver,
}

VOLUMES: Mapping[str, Callable[[Path, Clock], VolumeDriver]] = {
    "btrfs": BtrfsVolumeDriver,
    "overlay": OverlayVolumeDriver,
    "fuse": FuseVolumeDriver,
    "bind": BindVolumeDriver,
    "tmpfs": TmpfsVolumeDriver,
}


def open_layers(root: Path, clock: Clock, wanted: str = AUTOMATIC) -> tuple[LayerDriver, Choice]:
    """The layer driver of this host.

    Args:
        root: folder below which each driver has its own.
        clock: for the driver.
        wanted: name of a driver, or ``auto``.

    Raises:
        InvalidArgument: the wanted driver does not exist or does not work here.
    """
    root.mkdir(parents=True, exist_ok=True)
    choice = _choose("layer", wanted, probe_layers(root))
    own = root / choice.name
    own.mkdir(exist_ok=True)
    return LAYERS[choice.name](own, clock), choice


class VolumeDrivers(Mapping[str, VolumeDriver]):
    """All volume drivers of a host by name; one is opened when it is first asked for.

    So a host that only ever uses one kind of volume has one pool file, not three.

    Args:
        root: folder below which each driver has its own.
        clock: for the drivers.
        wanted: name of the default driver, or ``auto``.

    Attributes:
        choice: the default driver.
        databases: the one for volumes of databases; the same when one is wanted by name.

    Raises:
        InvalidArgument: the wanted driver does not exist or does not work here.
    """

    def __init__(self, root: Path, clock: Clock, wanted: str = AUTOMATIC) -> None:
        root.mkdir(parents=True, exist_ok=True)
        findings = probe_volumes(root)
        self.choice = _choose("volume", wanted, findings)
        self.databases = _choose("volume", wanted, _best_for_databases(root, findings))
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._opened: dict[str, VolumeDriver] = {}

    def __getitem__(self, name: str) -> VolumeDriver:
        maker = VOLUMES[name]
        with self._lock:
            if name not in self._opened:
                self._opened[name] = maker(self._root / name, self._clock)
            return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VOLUMES)

    def __len__(self) -> int:
        return len(VOLUMES)

    def __contains__(self, name: object) -> bool:
        return name in VOLUMES

    def close(self) -> None:
        """Close the drivers that were opened, each whatever becomes of others; volumes stay."""
        with self._lock, ExitStack() as ending:
            for driver in self._opened.values():
                ending.callback(driver.close)
            self._opened.clear()
