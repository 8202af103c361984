"""Control groups of containers on v1, hybrid and v2 hosts: find, freeze, read, kill, remove.

A container's group has one path, ``/lazarette/<instance>/<id>`` unless it names a parent,
the same in every v1 hierarchy or in the one v2 tree.  The OCI runtime makes the group;
everything afterwards is done here with plain files, which costs microseconds where a
run of the runtime costs milliseconds.
"""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lazarette.runtime.containers.errors import HostFault
from lazarette.storage.clock import Clock

ROOT = Path("/sys/fs/cgroup")


class Layout(Enum):
    """How the host mounts its control groups."""

    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


@dataclass(frozen=True)
class Hierarchies:
    """The mounted hierarchies of this host.

    Attributes:
        layout: see :class:`Layout`.
        roots: v1 controller name → mount point; ``""`` is the v2 tree on a pure v2 host.
        unified: mount point of a cgroup2 tree beside v1 ones, on a hybrid host.
        unified_controllers: controllers that cgroup2 tree holds.
    """

    layout: Layout
    roots: dict[str, Path] = field(default_factory=dict)
    unified: Path | None = None
    unified_controllers: tuple[str, ...] = ()

    def has(self, controller: str) -> bool:
        """Whether limits of that controller can be set."""
        if self.layout is Layout.V2:
            return controller in self.unified_controllers
        return controller in self.roots


def detect(mountinfo: str | None = None) -> Hierarchies:
    """Read the hierarchies from ``/proc/self/mountinfo`` (or from the text given)."""
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    roots: dict[str, Path] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point, kind = Path(left.split()[4]), right.split()[0]
        if kind == "cgroup2":
            unified = unified or point
        elif kind == "cgroup":
            for option in right.split()[2].split(","):
                if option not in ("rw", "ro", "xattr", "noprefix", "clone_children"):
                    roots.setdefault(option.removeprefix("name="), point)
    controllers: tuple[str, ...] = ()
    if unified is not None:
        try:
            controllers = tuple((unified / "cgroup.controllers").read_text().split())
        except OSError:
            controllers = ()
    if not roots and unified is not None:
        return Hierarchies(Layout.V2, {"": unified}, None, controllers)
    layout = Layout.V1 if unified is None else Layout.HYBRID
    return Hierarchies(layout, roots, unified, controllers)


class Group:
    """One container's control group.

    Args:
        hierarchies: those of the host.
        path: the group's path below each mount point, absolute.
    """

    def __init__(self, hierarchies: Hierarchies, path: str) -> None:
        self._host = hierarchies
        self.path = path

    def folders(self) -> list[Path]:
        """Its existing folder in every hierarchy, without repetition."""
        points = list(dict.fromkeys(self._host.roots.values()))
        if self._host.unified is not None:
            points.append(self._host.unified)
        made = [point / self.path.lstrip("/") for point in points]
        return [folder for folder in made if folder.is_dir()]

    def folder(self, controller: str) -> Path:
        """Its folder where a controller's files are."""
        root = self._host.roots.get("" if self._host.layout is Layout.V2 else controller, ROOT)
        return root / self.path.lstrip("/")

    def read(self, controller: str, name: str) -> str:
        """A file's text, empty when it is not there."""
        try:
            return (self.folder(controller) / name).read_text()
        except OSError:
            return ""

    def number(self, controller: str, name: str) -> int:
        """A file that holds one number; 0 for ``max`` or when it is not there."""
        text = self.read(controller, name).strip()
        return int(text) if text.isdecimal() else 0

    def table(self, controller: str, name: str) -> dict[str, int]:
        """A file of ``key number`` lines."""
        found: dict[str, int] = {}
        for line in self.read(controller, name).splitlines():
            key, _, value = line.rpartition(" ")
            if value.strip().isdecimal():
                found[key] = int(value)
        return found

    def pids(self) -> list[int]:
        """Processes in the group and in groups below it."""
        name = "" if self._host.layout is Layout.V2 else "pids"
        top = self.folder(name)
        found: set[int] = set()
        for folder, _, _ in os.walk(top):
            try:
                with open(os.path.join(folder, "cgroup.procs"), encoding="ascii") as procs:
                    found.update(int(line) for line in procs if line.strip() != "0")
            except OSError:
                continue
        return sorted(found)

    def set_frozen(self, frozen: bool, clock: Clock, timeout: float = 2.0) -> None:
        """Freeze or thaw every process of the group and wait until it is so.

        Raises:
            HostFault: the kernel did not get there within ``timeout`` seconds; a group
                that would not freeze is thawed again.
        """
        if self._host.layout is Layout.V2:
            target, value, probe = "cgroup.freeze", "1" if frozen else "0", "cgroup.events"
            done = f"frozen {value}"
        else:
            target, value, probe = "freezer.state", "FROZEN" if frozen else "THAWED", ""
            probe, done = target, value
        folder = self.folder("freezer")
        deadline = clock.monotonic_ns() + int(timeout * 1e9)
        try:
            while True:
                (folder / target).write_text(value)
                if done in (folder / probe).read_text():
                    return
                if clock.monotonic_ns() > deadline:
                    break
                clock.sleep(0.001)
        except FileNotFoundError as gone:
            if not frozen:
                return
            raise HostFault(f"freeze {self.path}: the control group is gone") from gone
        except OSError as bad:
            raise HostFault(f"freeze {self.path}: {bad.strerror}") from bad
        if frozen:
            (folder / target).write_text("0" if self._host.layout is Layout.V2 else "THAWED")
        raise HostFault(f"freeze {self.path}: not {value.lower()} after {timeout:g} s")

    def is_frozen(self) -> bool:
        """Whether the group is frozen or on its way there."""
        if self._host.layout is Layout.V2:
            return "frozen 1" in self.read("freezer", "cgroup.events")
        return self.read("freezer", "freezer.state").strip() in ("FROZEN", "FREEZING")

    def kill(self, clock: Clock, timeout: float = 10.0) -> bool:
        """Kill every process and wait for the end of all.

        Returns:
            Whether none is left.
        """
        deadline = clock.monotonic_ns() + int(timeout * 1e9)
        pause = 0.0005
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if self.is_frozen():
                self.set_frozen(False, clock)
            if clock.monotonic_ns() > deadline:
                return False
            clock.sleep(pause)
            pause = min(pause * 2, 0.05)
        return True

    def remove(self, clock: Clock, timeout: float = 2.0) -> None:
        """Remove the empty group everywhere; groups below it too.

        Raises:
            HostFault: a process or the kernel keeps it busy.
        """
        deadline = clock.monotonic_ns() + int(timeout * 1e9)
        for top in self.folders():
            for folder, _, _ in os.walk(top, topdown=False):
                while True:
                    try:
                        os.rmdir(folder)
                        break
                    except FileNotFoundError:
                        break
                    except OSError as busy:
                        if busy.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                            raise HostFault(f"remove {folder}: {busy.strerror}") from busy
                        if clock.monotonic_ns() > deadline:
                            raise HostFault(f"remove {folder}: still busy") from busy
                        clock.sleep(0.002)


def prime_move(hierarchies: Hierarchies) -> None:
    """Make the kernel ready to move a process between groups; call it beside the work
    that leads to the move.

    The first move after a pause waits for a grace period of the kernel's RCU, some ten
    milliseconds, and those right after it do not: the lock that forks and moves share
    (``cgroup_threadgroup_rwsem``) stays in its writers' mode for as long again.  Moving
    this process into the group it is in takes that lock and changes nothing.
    """
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            root = hierarchies.roots.get(names.split(",")[0].removeprefix("name="))
            if root is not None:
                (root / path.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
                return


def groups_below(hierarchies: Hierarchies, parent: str) -> set[str]:
    """Names of the groups directly below a path, over all hierarchies."""
    found: set[str] = set()
    for folder in Group(hierarchies, parent).folders():
        found.update(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return found


def remove_empty(hierarchies: Hierarchies, path: str) -> None:
    """Remove a group and those above it as far as nothing is in them."""
    parts = path.strip("/").split("/")
    for depth in range(len(parts), 0, -1):
        for folder in Group(hierarchies, "/".join(parts[:depth])).folders():
            with suppress(OSError):  # somebody else's group is in it
                os.rmdir(folder)
