"""The docker command line from another host: TCP with mutual TLS, and ssh."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.daemon import LAZ, LAZD, Daemon
from tests.support.images import busybox_archive

TEXT = b"line\n" * 20_000


@dataclass(frozen=True)
class Remote:
    """A daemon that listens on TCP too, and the authority its clients need."""

    daemon: Daemon
    port: int
    authority: Authority
    folder: Path

    def docker(
        self, host: str, *arguments: str, stdin: bytes = b"", path: str = os.environ["PATH"]
    ) -> subprocess.CompletedProcess[bytes]:
        """The docker command line at another address."""
        own = {"DOCKER_CONFIG": str(self.folder / "config"), "PATH": path}
        return subprocess.run(
            ["docker", "-H", host, *arguments],
            env={**os.environ, **own},
            input=stdin,
            capture_output=True,
            check=False,
            timeout=120,
        )

    def tls(
        self, *arguments: str, name: str = "client", stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """The same over TLS, with a certificate of that name."""
        files = (self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return self.docker(
            f"tcp://127.0.0.1:{self.port}",
            "--tlsverify",
            f"--tlscacert={self.authority.certificate}",
            f"--tlscert={files[0]}",
            f"--tlskey={files[1]}",
            *arguments,
            stdin=stdin,
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    authority = Authority(folder)
    certificate, key = authority.issue("server")
    authority.issue("client")
    port = free_port()
    tls = ["--tlscacert", str(authority.certificate), "--tlscert", str(certificate)]
    daemon = Daemon(
        folder / "d", arguments=["-H", f"tcp://127.0.0.1:{port}", *tls, "--tlskey", str(key)]
    )
    daemon.start()
    try:
        daemon.docker("load", "-q", "-i", str(busybox_archive()))
        yield Remote(daemon, port, authority, folder)
    finally:
        daemon.end()


def test_tls_with_a_certificate(remote: Remote) -> None:
    done = remote.tls("run", "--rm", "-i", "busybox", "cat", stdin=TEXT)
    assert (done.stdout, done.stderr, done.returncode) == (TEXT, b"", 0)
    done = remote.tls("run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 3)


def test_laz_over_tls_gets_all_output(remote: Remote) -> None:
    """Also after the end of its input, and what comes together with the answer's head."""
    pems = remote.folder / "pems"
    pems.mkdir()
    for name, file in (("cert", "client.crt"), ("key", "client.key")):
        (pems / f"{name}.pem").write_bytes((remote.folder / file).read_bytes())
    (pems / "ca.pem").write_bytes(remote.authority.certificate.read_bytes())
    own = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(pems)}

    def laz(*arguments: str) -> bytes:
        command = [str(LAZ), "-H", f"tcp://127.0.0.1:{remote.port}", *arguments]
        env = {**os.environ, **own}
        done = subprocess.run(command, env=env, input=TEXT, capture_output=True, timeout=120)
        assert (done.stderr, done.returncode) == (b"", 0)
        return done.stdout

    laz("run", "-d", "--rm", "--init", "--name", "sleeper", "busybox", "sleep", "1000")
    assert laz("exec", "-i", "sleeper", "cat") == TEXT
    for _ in range(5):
        assert laz("exec", "sleeper", "echo", "quick") == b"quick\n"


def test_tls_without_a_certificate_of_the_authority(remote: Remote) -> None:
    other = remote.folder / "other"
    other.mkdir()
    for file in Authority(other, "somebody else").issue("stranger"):
        file.rename(remote.folder / file.name)
    done = remote.tls("version", name="stranger")
    assert done.returncode != 0
    context = ssl.create_default_context(cafile=str(remote.authority.certificate))
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", remote.port)) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n")
            if not wrapped.recv(1):
                raise ConnectionResetError


def test_plain_http_is_not_answered(remote: Remote) -> None:
    done = remote.docker(f"tcp://127.0.0.1:{remote.port}", "ps")
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-H", "tcp://0.0.0.0:0"], "beyond loopback only with TLS"),
        (["-H", "tcp://127.0.0.1:0", "--tlscert", "x"], "TLS needs --tlscacert"),
    ],
)
def test_no_plain_tcp_off_loopback(tmp_path: Path, options: list[str], words: str) -> None:
    roots = ["--data-root", str(tmp_path / "data"), "--exec-root", str(tmp_path / "exec")]
    name = f"lzr{os.getpid() % 10**8}"
    bridge = ["--bridge", name]
    done = subprocess.run(
        [str(LAZD), *roots, *bridge, *options], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert words in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not Path("/sys/class/net", name).exists(), "a daemon that never was left its bridge"


@pytest.mark.parametrize("far", ["laz", "docker"])
def test_ssh(remote: Remote, far: str) -> None:
    """``docker system dial-stdio`` on the other host, by laz or by docker itself.

    ssh is a program that runs the other host's command here: what it carries is the same.
    """
    programs = remote.folder / f"ssh-{far}"
    there = programs / "there"
    there.mkdir(parents=True)
    program = f"{LAZ}" if far == "laz" else _docker()
    (there / "docker").write_text(
        f'#!/bin/sh\nDOCKER_HOST={remote.daemon.host} exec {program} "$@"\n'
    )
    (programs / "ssh").write_text(
        f'#!/bin/sh\nwhile [ "$1" != docker ]; do shift; done\nPATH={there}:$PATH exec "$@"\n'
    )
    for file in (there / "docker", programs / "ssh"):
        file.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    host = "ssh://root@elsewhere"
    done = remote.docker(host, "run", "--rm", "-i", "busybox", "cat", stdin=TEXT, path=path)
    assert (done.stdout, done.stderr, done.returncode) == (TEXT, b"", 0)
    done = remote.docker(host, "run", "--rm", "busybox", "sh", "-c", "exit 3", path=path)
    assert done.returncode == 3


def _docker() -> str:
    found = subprocess.run(["which", "docker"], capture_output=True, text=True, check=True)
    return found.stdout.strip()
