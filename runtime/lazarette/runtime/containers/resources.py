"""Limits of a container as the OCI specification writes them, cut to what this host can.

Returns warnings rather than failing where the Engine warns: a limit whose kernel file is
not there is left out, because the runtime would refuse the whole container for it.
"""

from __future__ import annotations

import os
import resource
import stat
from dataclasses import dataclass, field
from pathlib import Path

from lazarette.runtime import cdi
from lazarette.runtime.containers.cgroups import Hierarchies, Layout
from lazarette.runtime.containers.errors import DriverMissing
from lazarette.runtime.containers.model import Device, HostConfig, Ulimit, UpdateRequest
from lazarette.storage.errors import InvalidArgument, NotFound

MINIMUM_MEMORY = 6 << 20
DEFAULT_CPU_PERIOD = 100_000
_RLIMITS = {
    name.removeprefix("RLIMIT_").lower(): name
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
} | {"locks": "RLIMIT_LOCKS"}


@dataclass
class Limits:
    """The ``linux.resources`` object and what could not be done."""

    resources: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check(host: HostConfig) -> None:
    """Refuse limits that cannot be, with the Engine's words.

    Raises:
        InvalidArgument: see the message.
    """
    if 0 < host.memory < MINIMUM_MEMORY:
        raise InvalidArgument("Minimum memory limit allowed is 6MB")
    if host.memory < 0:
        raise InvalidArgument("Invalid value: memory limit can't be negative")
    if host.memory_swap > 0 and host.memory == 0:
        raise InvalidArgument("You should always set the Memory limit when using Memoryswap limit")
    if 0 < host.memory_swap < host.memory:
        raise InvalidArgument(
            "Minimum memoryswap limit should be larger than memory limit, see usage"
        )
    if host.memory_reservation and 0 < host.memory < host.memory_reservation:
        raise InvalidArgument("Minimum memory limit can not be less than memory reservation limit")
    if host.memory_swappiness is not None and not -1 <= host.memory_swappiness <= 100:
        raise InvalidArgument(
            f"Invalid value: {host.memory_swappiness}, valid memory swappiness range is 0-100"
        )
    if host.nano_cpus:
        cpus = os.cpu_count() or 1
        if host.cpu_period or host.cpu_quota:
            raise InvalidArgument(
                "Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set"
            )
        if not 0 <= host.nano_cpus <= cpus * 1_000_000_000:
            raise InvalidArgument(
                f"Range of CPUs is from 0.01 to {cpus}.00, as there are only {cpus} CPUs available"
            )
    if host.cpu_period and not 1000 <= host.cpu_period <= 1_000_000:
        raise InvalidArgument(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"
        )
    if 0 < host.cpu_quota < 1000:
        raise InvalidArgument("CPU cfs quota can not be less than 1ms (i.e. 1000)")
    if host.blkio_weight and not 10 <= host.blkio_weight <= 1000:
        raise InvalidArgument("Range of blkio weight is from 10 to 1000")
    for ulimit in host.ulimits or []:
        if ulimit.name.lower() not in _RLIMITS:
            raise InvalidArgument(f"invalid ulimit type: {ulimit.name}")
        if ulimit.hard != -1 and (ulimit.soft > ulimit.hard or ulimit.soft == -1):
            raise InvalidArgument(
                f"ulimit soft limit must be less than or equal to hard limit: "
                f"{ulimit.soft} > {ulimit.hard}"
            )


def limits(host: HostConfig, hierarchies: Hierarchies) -> Limits:
    """The limits of a container, without its device rules."""
    made = Limits()
    _memory(host, hierarchies, made)
    _cpu(host, hierarchies, made)
    if host.pids_limit and host.pids_limit > 0:
        if hierarchies.has("pids"):
            made.resources["pids"] = {"limit": host.pids_limit}
        else:
            made.warnings.append("Your kernel does not support PIDs limit; limit discarded.")
    _block_io(host, hierarchies, made)
    return made


def _memory(host: HostConfig, hierarchies: Hierarchies, made: Limits) -> None:
    memory: dict[str, object] = {}
    if host.memory:
        memory["limit"] = host.memory
        swap = host.memory_swap or host.memory * 2
        if _has_swap(hierarchies):
            memory["swap"] = swap
        elif host.memory_swap > 0:
            made.warnings.append(
                "Your kernel does not support swap limit capabilities or the cgroup is not "
                "mounted. Memory limited without swap."
            )
    if host.memory_reservation:
        memory["reservation"] = host.memory_reservation
    if hierarchies.layout is not Layout.V2:
        if host.memory_swappiness not in (None, -1):
            memory["swappiness"] = host.memory_swappiness
        if host.oom_kill_disable:
            memory["disableOOMKiller"] = True
    elif host.oom_kill_disable:
        made.warnings.append(
            "Your kernel does not support OomKillDisable. OomKillDisable discarded."
        )
    if memory and not hierarchies.has("memory"):
        made.warnings.append("Your kernel does not support memory limit capabilities.")
    elif memory:
        made.resources["memory"] = memory


def _has_swap(hierarchies: Hierarchies) -> bool:
    if hierarchies.layout is Layout.V2:
        return Path("/proc/swaps").exists()
    root = hierarchies.roots.get("memory")
    return root is not None and (root / "memory.memsw.limit_in_bytes").exists()


def _cpu(host: HostConfig, hierarchies: Hierarchies, made: Limits) -> None:
    cpu: dict[str, object] = {}
    if host.cpu_shares:
        cpu["shares"] = max(2, host.cpu_shares)
    if host.nano_cpus:
        cpu["period"] = DEFAULT_CPU_PERIOD
        cpu["quota"] = host.nano_cpus * DEFAULT_CPU_PERIOD // 1_000_000_000
    if host.cpu_period:
        cpu["period"] = host.cpu_period
    if host.cpu_quota:
        cpu["quota"] = host.cpu_quota
    root = hierarchies.roots.get("cpu")
    scheduled = hierarchies.layout is Layout.V2 or (
        root is not None and (root / "cpu.cfs_quota_us").exists()
    )
    if ("quota" in cpu or "period" in cpu) and not scheduled:
        cpu.pop("quota", None)
        cpu.pop("period", None)
        made.warnings.append("Your kernel does not support CPU CFS scheduler. Limit discarded.")
    if host.cpuset_cpus:
        cpu["cpus"] = host.cpuset_cpus
    if host.cpuset_mems:
        cpu["mems"] = host.cpuset_mems
    if cpu:
        made.resources["cpu"] = cpu


def _block_io(host: HostConfig, hierarchies: Hierarchies, made: Limits) -> None:
    block: dict[str, object] = {}
    if host.blkio_weight:
        if _has_weight(hierarchies):
            block["weight"] = host.blkio_weight
        else:
            made.warnings.append("Your kernel does not support Block I/O weight. Weight discarded.")
    if host.blkio_weight_device and _has_weight(hierarchies):
        block["weightDevice"] = [
            {**_numbers(device.path), "weight": device.weight}
            for device in host.blkio_weight_device
        ]
    for name, devices in (
        ("throttleReadBpsDevice", host.blkio_device_read_bps),
        ("throttleWriteBpsDevice", host.blkio_device_write_bps),
        ("throttleReadIOPSDevice", host.blkio_device_read_i_ops),
        ("throttleWriteIOPSDevice", host.blkio_device_write_i_ops),
    ):
        if devices:
            block[name] = [{**_numbers(d.path), "rate": d.rate} for d in devices]
    if block:
        made.resources["blockIO"] = block


def _has_weight(hierarchies: Hierarchies) -> bool:
    if hierarchies.layout is Layout.V2:
        return hierarchies.has("io")
    root = hierarchies.roots.get("blkio")
    names = ("blkio.weight", "blkio.bfq.weight")
    return root is not None and any((root / name).exists() for name in names)


def _numbers(path: str) -> dict[str, int]:
    try:
        device = os.stat(path).st_rdev
    except OSError as bad:
        raise InvalidArgument(f"stat {path}: {bad.strerror}") from bad
    return {"major": os.major(device), "minor": os.minor(device)}


def rlimits(ulimits: list[Ulimit], may_raise: bool) -> list[dict[str, object]]:
    """``process.rlimits``; without CAP_SYS_RESOURCE cut to our own hard limits."""
    made: list[dict[str, object]] = []
    for ulimit in ulimits:
        name = _RLIMITS[ulimit.name.lower()]
        soft = _unlimited(ulimit.soft)
        hard = _unlimited(ulimit.hard)
        number = getattr(resource, name, None)
        if not may_raise and number is not None:
            _, own = resource.getrlimit(number)
            ceiling = _unlimited(own)
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        made.append({"type": name, "soft": soft, "hard": hard})
    return made


def _unlimited(value: int) -> int:
    return (1 << 64) - 1 if value < 0 else value


@dataclass(frozen=True)
class HostDevice:
    """A device node to make in the container, and who may use it how."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    access: str

    def node(self) -> dict[str, object]:
        """The entry of ``linux.devices``."""
        return {
            "path": self.path,
            "type": self.kind,
            "major": self.major,
            "minor": self.minor,
            "fileMode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
        }

    def rule(self) -> dict[str, object]:
        """The entry of ``linux.resources.devices``."""
        return {
            "allow": True,
            "type": self.kind,
            "major": self.major,
            "minor": self.minor,
            "access": self.access,
        }


def find_devices(wanted: list[Device]) -> list[HostDevice]:
    """The nodes behind ``--device``; a folder stands for all nodes below it.

    Raises:
        InvalidArgument: the host path is no device.
    """
    found: list[HostDevice] = []
    for device in wanted:
        inside = device.path_in_container or device.path_on_host
        access = device.cgroup_permissions or "rwm"
        if not access or set(access) - set("rwm"):
            raise InvalidArgument(f"invalid device mode: {access}")
        if os.path.isdir(device.path_on_host):
            for folder, _, names in os.walk(device.path_on_host):
                for name in names:
                    path = os.path.join(folder, name)
                    below = os.path.relpath(path, device.path_on_host)
                    node = _host_device(path, os.path.join(inside, below), access)
                    if node:
                        found.append(node)
            continue
        single = _host_device(device.path_on_host, inside, access)
        if single is None:
            there = os.path.exists(device.path_on_host)
            raise InvalidArgument(
                f"error gathering device information while adding custom device "
                f'"{device.path_on_host}": '
                + ("not a device node" if there else "no such file or directory")
            )
        found.append(single)
    return found


def all_devices() -> list[HostDevice]:
    """Every device node of the host, for ``--privileged``."""
    skip = {"pts", "shm", "fd", "mqueue", ".lxc", "console"}
    found: list[HostDevice] = []
    for folder, folders, names in os.walk("/dev"):
        if folder == "/dev":
            folders[:] = [name for name in folders if name not in skip]
            names = [name for name in names if name not in skip]
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and (node := _host_device(path, path, "rwm")):
                found.append(node)
    return found


def requested_devices(requests: list[dict[str, object]]) -> cdi.Edits:
    """Devices that their vendors describe (``--device vendor.com/class=name``).

    Raises:
        DriverMissing: devices of a driver, as by ``--gpus``: this engine has none.
        InvalidArgument: no file describes a device.
    """
    found = cdi.Edits()
    for request in requests:
        if request.get("Driver") == "cdi":
            ids = request.get("DeviceIDs")
            names = [cdi.DeviceName.parse(str(one)) for one in ids] if isinstance(ids, list) else []
            try:
                found += cdi.find(names)
            except NotFound as missing:
                raise InvalidArgument(
                    "CDI device injection failed: unresolvable CDI devices "
                    + ", ".join(map(str, names)),
                    hint=missing.hint,
                ) from missing
            continue
        asked = request.get("Capabilities")
        groups = asked if isinstance(asked, list) else []
        shown = " ".join(f"[{' '.join(map(str, group))}]" for group in groups)
        raise DriverMissing(str(request.get("Driver") or ""), f"[{shown}]")
    return found


def _host_device(path: str, inside: str, access: str) -> HostDevice | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    if not (stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        return None
    return HostDevice(
        path=inside,
        kind="c" if stat.S_ISCHR(info.st_mode) else "b",
        major=os.major(info.st_rdev),
        minor=os.minor(info.st_rdev),
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        access=access,
    )


def device_rules(texts: list[str]) -> list[dict[str, object]]:
    """``--device-cgroup-rule`` texts such as ``c 1:3 rwm``.

    Raises:
        InvalidArgument: any other form.
    """
    rules: list[dict[str, object]] = []
    for text in texts:
        parts = text.split()
        numbers = parts[1].split(":") if len(parts) == 3 else []
        if (
            len(numbers) != 2
            or parts[0] not in ("a", "b", "c")
            or set(parts[2]) - set("rwm")
            or any(n != "*" and not n.isdecimal() for n in numbers)
        ):
            raise InvalidArgument(f"invalid device cgroup rule format: '{text}'")
        rule: dict[str, object] = {"allow": True, "type": parts[0], "access": parts[2]}
        for key, value in zip(("major", "minor"), numbers, strict=True):
            if value != "*":
                rule[key] = int(value)
        rules.append(rule)
    return rules


def apply_update(host: HostConfig, update: UpdateRequest) -> None:
    """Write the non-zero values of an update into the host part."""
    for name in (
        "cpu_shares", "memory", "nano_cpus", "blkio_weight", "cpu_period", "cpu_quota",
        "cpuset_cpus", "cpuset_mems", "memory_reservation", "memory_swap",
    ):  # fmt: skip
        value = getattr(update, name)
        if value:
            setattr(host, name, value)
    if update.pids_limit is not None:
        host.pids_limit = update.pids_limit
