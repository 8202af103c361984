"""The CNCF distribution registry (Debian's ``docker-registry``) on loopback.

Plain, with htpasswd, with TLS by an authority made for the test, or as a token-less
mirror.  Each has a port and a folder of its own; :func:`registry` stops it.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.certificates import Authority

PROGRAM = "docker-registry"
USER = "keeper"
PASSWORD = "quarantine"
# bcrypt of PASSWORD, cost 5: htpasswd -nbB
_HTPASSWD = f"{USER}:$2y$05$GA3asw.AsCPAEFCV.u6B5.0Ew6c/24jGmPEpQgGQJzEWEjkNpdX6.\n"


@dataclass(frozen=True)
class Registry:
    """A running registry.

    Attributes:
        host: ``127.0.0.1:PORT``, as in image names.
        url: with its scheme.
        authority: certificate of its authority; None without TLS.
        root: its folder; ``data`` has what was pushed.
    """

    host: str
    url: str
    authority: Path | None
    root: Path


@contextmanager
def registry(root: Path, *, login: bool = False, tls: bool = False) -> Iterator[Registry]:
    """Run a registry in a folder."""
    root.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    http: dict[str, object] = {"addr": f"127.0.0.1:{port}", "secret": "for tests"}
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": True}, "level": "error"},
        "storage": {
            "filesystem": {"rootdirectory": str(root / "data")},
            "delete": {"enabled": True},
        },
        "http": http,
    }
    authority = None
    if tls:
        issuer = Authority(root)
        authority, (certificate, key) = issuer.certificate, issuer.issue("server")
        http["tls"] = {"certificate": str(certificate), "key": str(key)}
    if login:
        (root / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(root / "htpasswd")}}
    (root / "config.yml").write_text(json.dumps(config))
    host = f"127.0.0.1:{port}"
    running = Registry(host, f"{'https' if tls else 'http'}://{host}", authority, root)
    with (root / "log").open("wb") as log:
        try:
            process = subprocess.Popen(
                [PROGRAM, "serve", str(root / "config.yml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
            )
        except FileNotFoundError:
            pytest.skip("docker-registry is not installed: scripts/setup installs it")
        try:
            _await(running, process)
            yield running
        finally:
            process.terminate()
            process.wait(10)


def _await(running: Registry, process: subprocess.Popen[bytes]) -> None:
    context = ssl._create_unverified_context() if running.authority else None
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(f"{running.url}/v2/", timeout=2).close()
            return
        except urllib.error.HTTPError as answered:
            answered.close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("registry did not start: " + (running.root / "log").read_text()[-2000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
