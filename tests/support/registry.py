"""The CNCF distribution registry (Debian's ``docker-registry``) on loopback.

Plain, with htpasswd, with TLS by an authority made for the test, or as a token-less
mirror.  Each has a port and a folder of its own; :func:`registry` stops it.
"""

from __future__ import annotations

import datetime
import ipaddress
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
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

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
        authority, certificate, key = _certificates(root)
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


def _certificates(root: Path) -> tuple[Path, Path, Path]:
    """An authority and a server certificate for loopback: (authority, certificate, key)."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lazarette tests")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    authority = (
        builder(name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    certificate = (
        builder(server, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    paths = root / "ca.crt", root / "server.crt", root / "server.key"
    paths[0].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths
