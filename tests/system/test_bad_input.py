"""Bad input: one clear line, an exit code of its own, nothing half-made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import LAZ, LAZD, Daemon, running
from tests.support.images import busybox_archive
from tests.support.s3 import S3Server

from lazarette.backup.repository.keys import WrongKey
from lazarette.backup.repository.kit import WrongRecoveryKit
from lazarette.backup.stores.contract import WrongStore
from lazarette.runtime.daemon import AlreadyRunning
from lazarette.storage.errors import (
    MissingFeature,
    NameTaken,
    NoSpace,
    NotRoot,
    Unauthenticated,
    Unavailable,
)


def fails(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """It ended with that code and one line (and a hint) that holds the words."""
    told = done.stderr.decode()
    assert done.returncode == code, told
    lines = told.strip().splitlines()
    assert "Traceback" not in told
    assert len([line for line in lines if not line.startswith("hint:")]) == 1, told
    for word in words:
        assert word in told


def laz(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(LAZ), *arguments], capture_output=True, check=False, env={**os.environ, **(env or {})}
    )


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("bad-input") / "d") as one:
        one.laz("load", "-q", "-i", str(busybox_archive()))
        yield one


@pytest.fixture
def shared(lasting: Daemon) -> Iterator[Daemon]:
    """A daemon with an image and nothing else, which the next test finds the same."""
    yield lasting
    for container in cast(list[dict[str, str]], lasting.json("ps", "-a")):
        lasting.laz("rm", "-f", container["Id"])


def test_no_daemon(tmp_path: Path) -> None:
    fails(laz("-H", f"unix://{tmp_path}/none.sock", "ps"), Unavailable.exit_code, "daemon")


def test_second_daemon_on_the_same_root(shared: Daemon) -> None:
    done = subprocess.run(
        [
            str(LAZD),
            "--data-root",
            str(shared.root / "data"),
            "--exec-root",
            str(shared.root / "other"),
            "-H",
            f"unix://{shared.root}/other.sock",
        ],
        capture_output=True,
        check=False,
    )
    assert done.returncode == AlreadyRunning.exit_code
    assert b"another daemon" in done.stderr
    assert b"Traceback" not in done.stderr


def test_unknown_things(shared: Daemon) -> None:
    for arguments, words in (
        (("volume", "rm", "nothing"), "no such volume"),
        (("volume", "snapshot", "nothing"), "no such volume"),
        (("backup", "run", "nothing"), "no repository"),
        (("inspect", "nothing"), "no such object"),
        (("stop", "nothing"), "No such container"),
        (("rmi", "nothing"), "No such image"),
        (("volume", "create", "-d", "nosuch", "v1"), "nosuch"),
        (("volume", "create", "-o", "colour=red", "v1"), "colour"),
        (("volume", "create", "../escape"), "includes invalid characters"),
    ):
        done = shared.laz(*arguments, check=False)
        assert done.returncode not in (0, 1), (arguments, done.stderr)
        assert words in done.stderr.decode(), (arguments, done.stderr)
        assert b"Traceback" not in done.stderr
    assert shared.json("volume", "ls") == []


def test_image_missing_leaves_nothing(shared: Daemon) -> None:
    done = shared.laz(
        "run", "--name", "cc", "-v", "fresh:/data", "127.0.0.1:1/none:latest", "true", check=False
    )
    assert done.returncode not in (0, 1)
    assert b"Traceback" not in done.stderr
    assert shared.json("ps", "-a") == []
    assert shared.json("volume", "ls") == []


def test_name_clash(shared: Daemon) -> None:
    shared.laz("run", "-d", "--name", "cc", "busybox", "sleep", "100")
    done = shared.laz("run", "-d", "--name", "cc", "busybox", "sleep", "100", check=False)
    fails(done, NameTaken.exit_code, 'name "/cc" is already in use')
    assert len(shared.json("ps", "-a")) == 1  # type: ignore[arg-type]


def test_port_taken_leaves_nothing(shared: Daemon) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = shared.laz(
            "run",
            "-d",
            "--name",
            "cc",
            "-p",
            f"127.0.0.1:{port}:80",
            "busybox",
            "sleep",
            "100",
            check=False,
        )
        assert done.returncode not in (0, 1)
        assert b"Traceback" not in done.stderr
        assert str(port).encode() in done.stderr
    shared.laz("start", "cc")


@pytest.mark.parametrize("daemonless", [True, False])
def test_repository_faults(
    daemon: Daemon, s3_server: S3Server, s3_bucket: str, tmp_path: Path, daemonless: bool
) -> None:
    base = ["-H", daemon.host]
    flag = ["--no-daemon"] if daemonless else []
    env = {**s3_server.environment, "LAZ_KEYS": str(tmp_path / "keys")}
    wrong = {**env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    url = s3_server.url(s3_bucket, "r")
    fails(laz(*base, "repo", "init", *flag, url, env=wrong), Unauthenticated.exit_code)
    made = laz(*base, "repo", "init", *flag, "--kit-file", str(tmp_path / "kit"), url, env=env)
    assert made.returncode == 0, made.stderr
    fails(laz(*base, "repo", "init", *flag, "--name", "again", url, env=env), 13, "already")
    missing = s3_server.url("no-such-bucket-here", "r")
    for command in (["backup", "ls", "--repo"], ["recover"]):
        done = laz(*base, *command, missing, "--kit", str(tmp_path / "kit"), env=env)
        fails(done, WrongStore.exit_code)


def test_wrong_kit(daemon: Daemon, s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    env = {**s3_server.environment, "LAZ_KEYS": str(tmp_path / "keys")}
    urls = [s3_server.url(s3_bucket, name) for name in ("a", "b")]
    kits = [tmp_path / "kit-a", tmp_path / "kit-b"]
    for url, kit in zip(urls, kits, strict=True):
        made = laz("repo", "init", "--no-daemon", "--kit-file", str(kit), url, env=env)
        assert made.returncode == 0, made.stderr
    other = laz("-H", daemon.host, "recover", urls[0], "--kit", str(kits[1]), env=env)
    fails(other, WrongKey.exit_code)
    text = kits[0].read_text()
    line = next(one for one in text.splitlines() if one.startswith("key 1"))
    swapped = line[:12] + ("0" if line[12] != "0" else "1") + line[13:]
    kits[0].write_text(text.replace(line, swapped))
    mistyped = laz("-H", daemon.host, "recover", urls[0], "--kit", str(kits[0]), env=env)
    fails(mistyped, WrongRecoveryKit.exit_code, "key 1")
    assert daemon.json("repo", "ls") == []


def test_usage_errors_are_two() -> None:
    for arguments in (("nosuch",), ("run",), ("volume", "create", "--nosuch")):
        assert laz(*arguments).returncode == 2


def test_not_root(tmp_path: Path) -> None:
    program = (
        "import os, sys, lazarette.runtime.daemon as daemon; os.setresuid(65534, 65534, 65534);"
        " sys.argv = ['lazd', *sys.argv[1:]]; daemon.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--data-root", str(tmp_path / "data")],
        capture_output=True,
        check=False,
    )
    assert done.returncode == NotRoot.exit_code, done.stderr
    assert done.stderr.startswith(b"lazd: lazd needs root")
    assert not (tmp_path / "data").exists()


def test_missing_kernel_feature(shared: Daemon) -> None:
    if Path("/sys/module/ipvlan").exists():
        pytest.skip("this kernel has ipvlan")
    shared.laz("network", "create", "-d", "ipvlan", "-o", "parent=lo", "net1")
    done = shared.laz(
        "run", "-d", "--name", "cc", "--network", "net1", "busybox", "true", check=False
    )
    fails(done, MissingFeature.exit_code, "ipvlan")
    shared.laz("rm", "cc")
    shared.laz("network", "rm", "net1")


def test_full_repository_disk(tmp_path: Path) -> None:
    """A backup that meets a full disk says so; what is there stays whole, the next one fits."""
    small = tmp_path / "small"
    small.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(24 << 20))
    env = {"LAZ_KEYS": str(tmp_path / "keys")}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], check=True)
    try:
        url = str(small / "repo")
        assert (
            laz(
                "repo", "init", "--no-daemon", "--kit-file", str(tmp_path / "kit"), url, env=env
            ).returncode
            == 0
        )
        fails(laz("backup", "path", str(source), "--repo", url, env=env), NoSpace.exit_code)
        assert laz("repo", "check", url, env=env).returncode == 0
        assert laz("backup", "ls", "--repo", url, "--json", env=env).stdout.strip() == b"[]"
        (source / "data").write_bytes(b"little")
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        assert laz("backup", "path", str(source), "--repo", url, env=env).returncode == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)
