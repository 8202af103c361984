"""Builds of a 20-step Dockerfile against dockerd's classic builder, cold and warm.

    .venv/bin/python benchmarks/build.py [--rounds 5] [--dockerd PATH] [--json FILE]

Both daemons get the same base image and the same context through ``POST /build``; the
docker command line, which costs both alike, is left out.  They take turns within a
round, so that a slow minute of the machine hits both.  Cold is with ``nocache``; warm is
the unchanged build again.  ``--dockerd`` is dockerd itself or a folder with
``usr/sbin/dockerd`` and ``usr/bin/containerd``, e.g. of unpacked Debian packages; without
it only ours is measured.  dockerd runs in a network namespace of its own, its bridge
beside nobody's.

Targets: cold at most 1.0 of dockerd's time, warm at most 0.5.  Needs root.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.builds import context_tar
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive

DOCKERFILE = """FROM busybox
LABEL unique={unique}
ENV a=1 b=2
WORKDIR /app
COPY package /app/
RUN mkdir -p /app/x && echo hi > /app/x/y
ENV c=3
RUN echo user >> /app/x/y
COPY src /app/src
RUN find /app > /list
ARG z=1
RUN echo $z > /z
RUN dd if=/dev/zero of=/blob bs=1k count=512 2>/dev/null
LABEL k=v
COPY package /b
RUN cat /b >> /list
EXPOSE 80
USER nobody
RUN id
CMD ["x"]
"""


def make_context() -> bytes:
    """A small application: 200 files of 2 kB."""
    files = {f"src/f{number}": f"{number} " * 500 for number in range(200)}
    dockerfile = DOCKERFILE.format(unique=uuid.uuid4().hex)
    return context_tar({"Dockerfile": dockerfile, "package": "{}" * 500, **files})


def docker(host: str, config: Path, *arguments: str) -> None:
    """The docker command line."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(config)}
    done = subprocess.run(
        ["docker", "-H", host, *arguments], env=environment, check=False, capture_output=True
    )
    if done.returncode != 0:
        raise SystemExit(f"docker {' '.join(arguments)} failed: {done.stderr.decode()}")


@contextmanager
def dockerd(program: Path, root: Path) -> Iterator[str]:
    """A dockerd of its own; its address."""
    binary, path = program, os.environ["PATH"]
    if program.is_dir():
        binary = program / "usr/sbin/dockerd"
        path = f"{program}/usr/bin:{program}/usr/sbin:{path}"
    libraries = f"{program}/usr/lib/x86_64-linux-gnu" if program.is_dir() else ""
    address = root / "docker.sock"
    with open(root / "dockerd.log", "wb") as log:
        process = subprocess.Popen(
            [
                "unshare", "--net", "--mount", str(binary), "--data-root", str(root / "data"),
                "--exec-root", str(root / "exec"), "--pidfile", str(root / "pid"),
                "-H", f"unix://{address}", "--iptables=false", "--ip6tables=false",
                "--ip-masq=false", "--storage-driver", "overlay2",
            ],
            env={**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries},
            stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((root / "dockerd.log").read_text()[-3000:])
            time.sleep(0.1)
        yield f"unix://{address}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _answers(address: Path) -> bool:
    command = ["curl", "-sf", "--max-time", "2", "--unix-socket", str(address), "http://d/_ping"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def timed(host: str, tar: bytes, query: str = "") -> float:
    """Seconds of one build through the API: from the request to the end of the stream."""
    connection = http.client.HTTPConnection("d")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(host.removeprefix("unix://"))
    start = time.perf_counter()
    connection.request(
        "POST", f"/v1.41/build?t=bench&rm=1{query}", tar, {"Content-Type": "application/x-tar"}
    )
    answer = connection.getresponse().read()
    seconds = time.perf_counter() - start
    connection.close()
    if b"Successfully built" not in answer:
        raise SystemExit(answer.decode())
    return seconds


def measure(hosts: dict[str, str], rounds: int, root: Path) -> dict[str, dict[str, list[float]]]:
    """Cold and warm seconds of each daemon, one after the other within a round."""
    times: dict[str, dict[str, list[float]]] = {n: {"cold": [], "warm": []} for n in hosts}
    config = root / "config"
    config.mkdir()
    tar = make_context()
    for host in hosts.values():
        docker(host, config, "load", "-i", str(busybox_archive()))
        timed(host, tar)
    for number in range(rounds):
        order = list(hosts) if number % 2 else list(hosts)[::-1]
        for name in order:
            times[name]["cold"].append(timed(hosts[name], tar, "&nocache=1"))
        for name in order:
            times[name]["warm"].append(timed(hosts[name], tar))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print medians and ratios."""
    parser = argparse.ArgumentParser(description="Builds against dockerd's classic builder.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dockerd", type=Path, default=shutil.which("dockerd"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="laz-builds-bench-"))
    try:
        with ExitStack() as until:
            ours = Daemon(root / "lazd")
            ours.start()
            until.callback(ours.end)
            hosts = {"lazarette": ours.host}
            if given.dockerd:
                (root / "dockerd").mkdir()
                hosts["dockerd"] = until.enter_context(dockerd(given.dockerd, root / "dockerd"))
            times = measure(hosts, given.rounds, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    medians = {n: {k: statistics.median(v) for k, v in by.items()} for n, by in times.items()}
    for name, by in medians.items():
        print(f"{name:10} cold {by['cold']:.2f} s   warm {by['warm']:.2f} s")
    if "dockerd" in medians:
        for kind, target in (("cold", 1.0), ("warm", 0.5)):
            ratio = medians["lazarette"][kind] / medians["dockerd"][kind]
            print(f"{kind}: {ratio:.2f} of dockerd (target at most {target})")
    if given.json:
        given.json.write_text(json.dumps({"seconds": times, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
