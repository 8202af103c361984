"""The engine against dockerd: run, exec, ps, parallel starts, resident memory.

    .venv/bin/python benchmarks/engine.py [--rounds 15] [--peer HOST --peer-pid PID]
        [--dockerd PATH] [--only run,exec,ps,parallel,memory] [--json FILE]

Both daemons get the same image and are asked the same things by the real docker command
line, in turns within a round, so that a slow minute of the machine hits both.  ``--peer``
is the address of a running dockerd of any version (``--peer-pid`` its process, for the
memory rows), ``--dockerd`` a program or unpacked packages to start one of, as in
``benchmarks/build.py``.  Containers are on the default bridge.

Rows, medians: ``run`` is ``docker run --rm busybox true``; ``exec`` is ``docker exec`` of
``true``; ``ps`` is ``docker ps -a`` with 500 containers; ``parallel`` is 50 containers
started at once through the API.  Memory is resident: of the daemon (dockerd's with its
containerd) idle and, per running container, what the daemon grew by and its monitor.

Targets: run, exec at most 0.6 of dockerd's time, ps 1.0, parallel 0.7; idle under 120 MiB,
under 4 MiB a running container.  Needs root.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.build import docker, dockerd
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive

TARGETS = {"run": 0.6, "exec": 0.6, "ps": 1.0, "parallel": 0.7}
IDLE_MIB, CONTAINER_MIB = 120.0, 4.0
MANY, AT_ONCE = 500, 50
MIB = 1 << 20


@dataclass
class Side:
    """One daemon: its address, its process, where its clients keep their settings."""

    name: str
    host: str
    pid: int
    config: Path

    def docker(self, *arguments: str) -> None:
        docker(self.host, self.config, *arguments)

    def request(self, method: str, path: str, body: object = None) -> object:
        """One call of the API, without the command line."""
        connection = http.client.HTTPConnection("d")
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.connect(self.host.removeprefix("unix://"))
        connection.request(
            method,
            f"/v1.41{path}",
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status >= 400:
            raise SystemExit(f"{self.name}: {method} {path}: {text.decode()}")
        return json.loads(text) if text.strip() else None

    def create(self, *command: str) -> str:
        made = self.request("POST", "/containers/create", {"Image": "busybox", "Cmd": command})
        assert isinstance(made, dict)
        return str(made["Id"])

    def remove_all(self) -> None:
        found = self.request("GET", "/containers/json?all=1")
        assert isinstance(found, list)
        with ThreadPoolExecutor(4) as hands:
            paths = [f"/containers/{one['Id']}?force=1" for one in found]
            list(hands.map(lambda path: self.request("DELETE", path), paths))


def timed(work: Callable[[], object]) -> float:
    """Seconds of it."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    sides: Sequence[Side], rounds: int, work: Callable[[Side], object]
) -> dict[str, list[float]]:
    """Seconds of each side, in turns; a first round is thrown away."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            seconds = timed(lambda side=side: work(side))  # type: ignore[misc]
            if number:
                times[side.name].append(seconds)
    return times


def bench_run(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    return alternate(sides, rounds, lambda side: side.docker("run", "--rm", "busybox", "true"))


def bench_exec(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    for side in sides:
        side.docker("run", "-d", "--name", "bench", "busybox", "sleep", "3600")
    times = alternate(sides, rounds, lambda side: side.docker("exec", "bench", "true"))
    for side in sides:
        side.remove_all()
    return times


def bench_ps(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    for side in sides:
        for _ in range(MANY):
            side.create("sleep", "1")
    times = alternate(sides, rounds, lambda side: side.docker("ps", "-a"))
    for side in sides:
        side.remove_all()
    return times


def bench_parallel(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 else sides[::-1]:
            made = [side.create("sleep", "3600") for _ in range(AT_ONCE)]

            def start_all(side: Side = side, made: list[str] = made) -> None:
                with ThreadPoolExecutor(AT_ONCE) as hands:
                    paths = [f"/containers/{one}/start" for one in made]
                    list(hands.map(lambda path: side.request("POST", path), paths))

            times[side.name].append(timed(start_all))
            side.remove_all()
    return times


def resident(pid: int) -> int:
    """Bytes resident of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def named(program: str, under: Callable[[str], bool]) -> list[int]:
    """Processes of a program whose command line fits."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                comm = (folder / "comm").read_text().strip()
            except OSError:
                continue
            if comm == program and under(command):
                found.append(int(folder.name))
    return found


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(one) for one in text.split()]


def daemon_bytes(side: Side) -> int:
    """The daemon; dockerd with its containerd, but without its containers' proxies."""
    if side.name == "lazarette":
        return resident(side.pid)
    below = [
        pid for pid in children(side.pid) if "containerd" in Path(f"/proc/{pid}/comm").read_text()
    ]
    return resident(side.pid) + sum(map(resident, below))


def monitors(side: Side) -> list[int]:
    if side.name == "lazarette":
        root = side.host.removeprefix("unix://").rpartition("/")[0]
        return named("conmon", lambda command: f"{root}/exec/" in command)
    socket_folder = side.host.removeprefix("unix://").rpartition("/")[0]
    return named("containerd-shim", lambda command: socket_folder in command)


def bench_memory(sides: Sequence[Side]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for side in sides:
        idle = daemon_bytes(side)
        for _ in range(AT_ONCE):
            side.request("POST", f"/containers/{side.create('sleep', '3600')}/start")
        time.sleep(2)
        busy, held = daemon_bytes(side), sum(map(resident, monitors(side)))
        rows[side.name] = {
            "idle": idle / MIB,
            "container": (busy - idle + held) / AT_ONCE / MIB,
        }
        side.remove_all()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print medians and ratios."""
    parser = argparse.ArgumentParser(description="The engine against dockerd.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer")
    parser.add_argument("--peer-pid", type=int, default=0)
    parser.add_argument("--dockerd", type=Path, default=shutil.which("dockerd"))
    parser.add_argument("--only", default="memory,run,exec,parallel,ps")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    root = Path(tempfile.mkdtemp(prefix="laz-engine-bench-"))
    results: dict[str, object] = {}
    try:
        with ExitStack() as until:
            config = root / "config"
            config.mkdir()
            ours = Daemon(root / "lazd")
            ours.start()
            until.callback(ours.end)
            assert ours.process is not None
            sides = [Side("lazarette", ours.host, ours.process.pid, config)]
            if given.peer:
                sides.append(Side("dockerd", given.peer, given.peer_pid, config))
            elif given.dockerd:
                (root / "dockerd").mkdir()
                host = until.enter_context(dockerd(given.dockerd, root / "dockerd"))
                pid = int((root / "dockerd/pid").read_text())
                sides.append(Side("dockerd", host, pid, config))
            for side in sides:
                side.docker("load", "-q", "-i", str(busybox_archive()))
            if "memory" in wanted:
                results["memory"] = bench_memory([side for side in sides if side.pid])
            for name, bench, rounds in (
                ("run", bench_run, given.rounds),
                ("exec", bench_exec, given.rounds),
                ("parallel", bench_parallel, max(2, given.rounds // 5)),
                ("ps", bench_ps, given.rounds),
            ):
                if name in wanted:
                    results[name] = bench(sides, rounds)
                    show(name, results[name])  # type: ignore[arg-type]
            if "memory" in wanted:
                show_memory(results["memory"])  # type: ignore[arg-type]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"load {os.getloadavg()[0]:.1f}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def show(name: str, times: dict[str, list[float]]) -> None:
    """One row."""
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    line = f"{name:9}" + "".join(f" {side} {1000 * one:7.1f} ms" for side, one in medians.items())
    if len(medians) == 2:
        ratio = medians["lazarette"] / medians["dockerd"]
        line += f"   ratio {ratio:.2f} (target at most {TARGETS[name]})"
    print(line, flush=True)


def show_memory(rows: dict[str, dict[str, float]]) -> None:
    """Mebibytes."""
    for side, row in rows.items():
        print(
            f"memory    {side} idle {row['idle']:.1f} MiB, a container {row['container']:.2f} MiB"
            + (f" (targets {IDLE_MIB}, {CONTAINER_MIB})" if side == "lazarette" else "")
        )


if __name__ == "__main__":
    main()
