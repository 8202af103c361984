"""What containers use: samples for ``stats``, processes for ``top``.

Keys and units are those of the Engine API, which are those of the kernel's files:
nanoseconds of processor time, bytes of memory, bytes and operations of block devices
(control groups v1 and v2, ``Documentation/admin-guide/cgroup-v*``), bytes and packets of
interfaces (``/proc/PID/net/dev``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lazarette.runtime.containers.cgroups import Group, Hierarchies, Layout
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import TopFailed
from lazarette.storage import process
from lazarette.storage.clock import Clock, rfc3339
from lazarette.storage.errors import LazaretteError

_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
Json = dict[str, object]


class Sampler:
    """Takes samples of containers.

    Args:
        hierarchies: the host's control groups.
        clock: stamps samples.
    """

    def __init__(self, hierarchies: Hierarchies, clock: Clock) -> None:
        self._v2 = hierarchies.layout is Layout.V2
        self._clock = clock

    def sample(self, container: Container, group: Group, before: Json | None) -> Json:
        """One record of the ``stats`` stream.

        Args:
            container: which.
            group: its control group.
            before: the record before, for ``precpu_stats``; None for the first.
        """
        running = container.state.running
        made: Json = {
            "name": f"/{container.name}",
            "id": container.id,
            "read": rfc3339(self._clock.now_ns() if running else 0),
            "preread": rfc3339(0) if before is None else before["read"],
            "pids_stats": {},
            "blkio_stats": _empty_blkio(),
            "num_procs": 0,
            "storage_stats": {},
            "cpu_stats": _empty_cpu() if before is None or not running else before["cpu_stats"],
            "precpu_stats": _empty_cpu() if before is None else before["cpu_stats"],
            "memory_stats": {},
        }
        if not running:
            return made
        made["cpu_stats"] = self._cpu(group)
        made["memory_stats"] = self._memory(group)
        made["pids_stats"] = _without_zero(
            {
                "current": group.number("pids", "pids.current") or len(group.pids()),
                "limit": group.number("pids", "pids.max"),
            }
        )
        made["blkio_stats"] = self._blkio(group)
        networks = interfaces(container.state.pid)
        if networks:
            made["networks"] = networks
        return made

    def _cpu(self, group: Group) -> Json:
        if self._v2:
            table = group.table("", "cpu.stat")
            usage: Json = {
                "total_usage": table.get("usage_usec", 0) * 1000,
                "usage_in_kernelmode": table.get("system_usec", 0) * 1000,
                "usage_in_usermode": table.get("user_usec", 0) * 1000,
            }
            throttled = {
                "periods": table.get("nr_periods", 0),
                "throttled_periods": table.get("nr_throttled", 0),
                "throttled_time": table.get("throttled_usec", 0) * 1000,
            }
        else:
            ticks = group.table("cpuacct", "cpuacct.stat")
            per_cpu = group.read("cpuacct", "cpuacct.usage_percpu").split()
            table = group.table("cpu", "cpu.stat")
            usage = {
                "total_usage": group.number("cpuacct", "cpuacct.usage"),
                "percpu_usage": [int(word) for word in per_cpu],
                "usage_in_kernelmode": ticks.get("system", 0) * _TICK,
                "usage_in_usermode": ticks.get("user", 0) * _TICK,
            }
            throttled = {
                "periods": table.get("nr_periods", 0),
                "throttled_periods": table.get("nr_throttled", 0),
                "throttled_time": table.get("throttled_time", 0),
            }
        return {
            "cpu_usage": usage,
            "system_cpu_usage": system_usage(),
            "online_cpus": len(os.sched_getaffinity(0)),
            "throttling_data": throttled,
        }

    def _memory(self, group: Group) -> Json:
        table = group.table("memory", "memory.stat")
        if self._v2:
            usage, limit = group.number("", "memory.current"), group.number("", "memory.max")
            made: Json = {"usage": usage, "stats": table}
        else:
            usage = group.number("memory", "memory.usage_in_bytes")
            limit = group.number("memory", "memory.limit_in_bytes")
            made = {
                "usage": usage,
                "max_usage": group.number("memory", "memory.max_usage_in_bytes"),
                "stats": table,
                "failcnt": group.number("memory", "memory.failcnt"),
            }
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        made["limit"] = min(limit, total) if limit else total
        return made

    def _blkio(self, group: Group) -> Json:
        if self._v2:
            return _io_v2(group.read("", "io.stat"))
        made = _empty_blkio()
        for key, file in (
            ("io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive"),
            ("io_serviced_recursive", "blkio.throttle.io_serviced_recursive"),
        ):
            text = group.read("blkio", file) or group.read("blkio", file.removesuffix("_recursive"))
            made[key] = _io_v1(text)
        return made


def _io_v1(text: str) -> list[Json] | None:
    made: list[Json] = []
    for line in text.splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[2].isdecimal():
            major, _, minor = parts[0].partition(":")
            made.append(
                {
                    "major": int(major),
                    "minor": int(minor),
                    "op": parts[1].lower(),
                    "value": int(parts[2]),
                }
            )
    return made or None


def _io_v2(text: str) -> Json:
    made = _empty_blkio()
    size: list[Json] = []
    for line in text.splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for op, key in (("read", "rbytes"), ("write", "wbytes")):
            size.append(
                {
                    "major": int(major),
                    "minor": int(minor),
                    "op": op,
                    "value": int(values.get(key, 0)),
                }
            )
    made["io_service_bytes_recursive"] = size or None
    return made


def _empty_blkio() -> Json:
    return {
        "io_service_bytes_recursive": None,
        "io_serviced_recursive": None,
        "io_queue_recursive": None,
        "io_service_time_recursive": None,
        "io_wait_time_recursive": None,
        "io_merged_recursive": None,
        "io_time_recursive": None,
        "sectors_recursive": None,
    }


def _empty_cpu() -> Json:
    return {
        "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }


def _without_zero(values: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if value}


def system_usage() -> int:
    """Processor time of the whole host since boot, nanoseconds (``/proc/stat``)."""
    with open("/proc/stat", encoding="ascii") as file:
        words = file.readline().split()[1:9]
    return sum(int(word) for word in words) * _TICK


def interfaces(pid: int) -> dict[str, Json]:
    """Counters of the interfaces a process sees, without loopback."""
    made: dict[str, Json] = {}
    try:
        with open(f"/proc/{pid}/net/dev", encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()[2:]
    except OSError:
        return made
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if name.strip() == "lo" or len(words) < 12:
            continue
        made[name.strip()] = {
            "rx_bytes": int(words[0]),
            "rx_packets": int(words[1]),
            "rx_errors": int(words[2]),
            "rx_dropped": int(words[3]),
            "tx_bytes": int(words[8]),
            "tx_packets": int(words[9]),
            "tx_errors": int(words[10]),
            "tx_dropped": int(words[11]),
        }
    return made


def top(group: Group, arguments: str) -> Json:
    """Processes of a container as the host's ``ps`` lists them.

    Raises:
        TopFailed: ``ps`` refuses the arguments, or does not show process ids.
    """
    pids = set(group.pids())
    words = arguments.split() or ["-ef"]
    try:
        done = process.run(["ps", *words], check=False)
    except LazaretteError as missing:
        raise TopFailed(f"Error running ps: {missing.message}") from missing
    if done.code != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise TopFailed(f"Error running ps: {said or f'exit code {done.code}'}")
    lines = done.stdout.decode(errors="replace").splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise TopFailed("Couldn't find PID field in ps output")
    column = titles.index("PID")
    rows = []
    for line in lines[1:]:
        fields = line.split(None, len(titles) - 1)
        if len(fields) > column and fields[column].isdecimal() and int(fields[column]) in pids:
            rows.append(fields)
    return {"Titles": titles, "Processes": rows}
