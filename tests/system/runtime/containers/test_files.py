"""Volumes, binds, copy-up and ``docker cp``: cases A20, A21 and A23."""

from __future__ import annotations

import io
import json
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Daemon

from lazarette.storage import mounts

from .conftest import Host

ODD = """FROM busybox
RUN mkdir /data && cd /data && echo content > file && ln -s nowhere dangling && \\
    echo x > one && ln one two && echo s > set && chmod 4755 set && mkfifo pipe && \\
    chown -R 1000:1000 /data && chmod 4755 set && chmod 0770 /data && ln -s /tmp /dir1
"""


@pytest.fixture(scope="module")
def odd(engine: Daemon) -> str:
    """The image of cases A20 and A21."""
    name = f"odd{secrets.token_hex(4)}"
    engine.docker("build", "-q", "-t", name, "-", stdin=ODD.encode(), env={"DOCKER_BUILDKIT": "0"})
    return name


@pytest.fixture
def volume(host: Host) -> Iterator[str]:
    name = f"v{secrets.token_hex(5)}"
    yield name
    for one in host.made:
        host.daemon.docker("rm", "-f", one, check=False)
    host.daemon.docker("volume", "rm", "-f", name)


LOOK = (
    "cd /data && stat -c '%n %a %u:%g %F' . * && stat -c %h one two && cat file && "
    "readlink dangling"
)


def test_copy_up(host: Host, odd: str, volume: str) -> None:
    """Case A20."""
    expected = host.out("run", "--rm", odd, "sh", "-c", LOOK)
    assert "770 1000:1000 directory" in expected
    assert "set 4755" in expected
    assert "pipe 644 1000:1000 fifo" in expected
    first = host.out("run", "--rm", "-v", f"{volume}:/data", odd, "sh", "-c", LOOK)
    assert first == expected
    elsewhere = host.out("run", "--rm", "-v", f"{volume}:/data", "busybox", "sh", "-c", LOOK)
    assert elsewhere == expected


def test_no_copy_up(host: Host, odd: str, volume: str, tmp_path: Path) -> None:
    """Case A20: nocopy, volume-nocopy and binds stay empty."""
    assert host.out("run", "--rm", "-v", f"{volume}:/data:nocopy", odd, "ls", "/data") == ""
    mount = f"type=volume,src={volume},dst=/data,volume-nocopy"
    assert host.out("run", "--rm", "--mount", mount, odd, "ls", "/data") == ""
    assert host.out("run", "--rm", "-v", f"{tmp_path}:/data", odd, "ls", "/data") == ""
    assert os.listdir(tmp_path) == []


def test_racing_first_uses_see_all(host: Host, odd: str, volume: str) -> None:
    """Case A20: two containers racing on the first use."""
    import concurrent.futures

    def use(_number: int) -> str:
        return host.out("run", "--rm", "-v", f"{volume}:/data", odd, "sh", "-c", "ls /data")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = set(pool.map(use, range(4)))
    assert seen == {"dangling\nfile\none\npipe\nset\ntwo\n"}


@pytest.mark.parametrize("running", [False, True])
def test_copy_through_a_linked_parent(host: Host, odd: str, tmp_path: Path, running: bool) -> None:
    """Case A21: the parent is a symbolic link, the root read-only, the target a volume."""
    (tmp_path / "f").write_text("copied")
    name = host.name()
    host.out("create", "--name", name, "--read-only", "-v", "/dir1/dir2", odd, "sleep", "100")
    if running:
        host.out("start", name)
    host.out("cp", str(tmp_path / "f"), f"{name}:/dir1/dir2")
    assert host.out("cp", f"{name}:/dir1/dir2/f", "-") != ""
    refused = host.daemon.docker("cp", str(tmp_path / "f"), f"{name}:/etc", check=False)
    assert b"marked read-only" in refused.stderr


@pytest.mark.parametrize("running", [False, True])
def test_copy_to_a_read_only_volume(host: Host, volume: str, tmp_path: Path, running: bool) -> None:
    """Case A21: refused, and nothing is written below the mount point."""
    (tmp_path / "f").write_text("copied")
    name = host.name()
    host.out("create", "--name", name, "-v", f"{volume}:/ro:ro", "busybox", "sleep", "100")
    if running:
        host.out("start", name)
    refused = host.daemon.docker("cp", str(tmp_path / "f"), f"{name}:/ro/", check=False)
    assert b"marked read-only" in refused.stderr
    assert host.out("run", "--rm", "-v", f"{volume}:/v", "busybox", "ls", "/v") == ""
    host.out("rm", "-f", name)


def test_recursive_read_only(host: Host, tmp_path: Path) -> None:
    """Case A23."""
    import subprocess

    sub = tmp_path / "sub"
    sub.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", sub], check=True)
    try:
        plain = host.daemon.docker(
            "run", "--rm", "-v", f"{tmp_path}:/h:ro", "busybox", "touch", "/h/sub/x", check=False
        )
        assert b"Read-only file system" in plain.stderr
        mount = f"type=bind,src={tmp_path},dst=/h,readonly"
        host.out(
            "run", "--rm", "--mount", f"{mount},bind-recursive=writable",
            "busybox", "touch", "/h/sub/y",
        )  # fmt: skip
        assert (sub / "y").exists()
        forced = host.daemon.docker(
            "run", "--rm", "--mount", f"{mount},bind-recursive=readonly,bind-propagation=rprivate",
            "busybox", "touch", "/h/sub/z", check=False,
        )  # fmt: skip
        assert b"Read-only file system" in forced.stderr
    finally:
        subprocess.run(["umount", sub], check=True)


@pytest.mark.parametrize("running", [False, True])
def test_copies_both_ways(host: Host, tmp_path: Path, running: bool) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_bytes(os.urandom(100_000))
    (tree / "link").symlink_to("deep/file")
    name = host.name()
    host.out("create", "--name", name, "-v", "/vol", "busybox", "sleep", "100")
    if running:
        host.out("start", name)
    for place in ("/home", "/vol"):
        host.out("cp", str(tree), f"{name}:{place}")
        back = tmp_path / f"back{place.replace('/', '-')}"
        host.out("cp", f"{name}:{place}/tree", str(back))
        assert (back / "deep/file").read_bytes() == (tree / "deep/file").read_bytes()
        assert os.readlink(back / "link") == "deep/file"
    missing = host.daemon.docker("cp", f"{name}:/nope", str(tmp_path), check=False)
    assert b"Could not find the file /nope" in missing.stderr


def test_an_archive_does_not_escape(host: Host) -> None:
    name = host.start("busybox", "sleep", "100")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("../../../../tmp/escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    host.daemon.docker("cp", "-", f"{name}:/home", stdin=packed.getvalue(), check=False)
    assert not Path("/tmp/escaped").exists()


def test_export_and_diff(host: Host) -> None:
    name = host.start("busybox", "sh", "-c", "echo new > /etc/new; rm /etc/group; sleep 100")
    host.out("exec", name, "true")
    changes = host.out("diff", name).splitlines()
    assert changes == ["C /etc", "D /etc/group", "A /etc/new"]
    packed = io.BytesIO(host.daemon.docker("export", name).stdout)
    with tarfile.open(fileobj=packed) as tar:
        names = tar.getnames()
    assert "etc/new" in names
    assert "etc/group" not in names


def test_subpath_and_tmpfs(host: Host, volume: str) -> None:
    host.out(
        "run", "--rm", "-v", f"{volume}:/v", "busybox", "sh", "-c", "mkdir /v/a; echo 1 > /v/a/f"
    )
    mount = f"type=volume,src={volume},dst=/x,volume-subpath=a"
    assert host.out("run", "--rm", "--mount", mount, "busybox", "ls", "/x") == "f\n"
    told = host.out(
        "run", "--rm", "--mount", "type=tmpfs,dst=/t,tmpfs-size=1048576,tmpfs-mode=0700",
        "busybox", "sh", "-c", "stat -c %a /t; df -k /t | tail -1",
    )  # fmt: skip
    assert told.startswith("700\n")
    assert " 1024 " in told


def test_volumes_of_databases_have_the_driver_that_suits_them(host: Host, volume: str) -> None:
    """Made before their container, as compose does, or with it; others keep the default."""

    def driver(name: str) -> str:
        return host.out("volume", "inspect", "-f", "{{.Status.Driver}}", name).strip()

    told = dict(json.loads(host.out("info", "-f", "{{json .DriverStatus}}")))
    ordinary, database = (told[key].split(":")[0] for key in ("Volumes", "Volumes of databases"))
    assert ordinary != database
    host.out("volume", "create", volume)
    assert driver(volume) == ordinary
    host.out("run", "--rm", "-v", f"{volume}:/var/lib/mysql", "busybox", "true")
    assert driver(volume) == database
    other = host.name()
    host.out(
        "run", "--rm", "-v", f"{other}:/var/lib/mysql2", "busybox", "touch", "/var/lib/mysql2/f"
    )
    host.out("run", "--rm", "-v", f"{other}:/var/lib/mysql", "busybox", "test", "-f",
             "/var/lib/mysql/f")  # fmt: skip
    assert driver(other) == ordinary
    host.out("tag", "busybox", "example.org/team/postgres:16")
    name = host.start("-v", "/anywhere", "example.org/team/postgres:16", "sleep", "100")
    (mount,) = host.inspect(name)["Mounts"]
    assert (driver(mount["Name"]), mount["Driver"]) == (database, "local")
    host.out("rmi", "example.org/team/postgres:16", "-f")
    host.out("volume", "rm", other)


def test_bind_propagation_and_modes(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    name = host.start("-v", f"{tmp_path}/file:/f:ro", "-v", f"{tmp_path}/made:/m", "busybox",
                      "sleep", "100")  # fmt: skip
    assert (tmp_path / "made").is_dir()
    assert host.daemon.docker("exec", name, "sh", "-c", "echo y > /f", check=False).returncode
    mounts = {m["Destination"]: m for m in host.inspect(name)["Mounts"]}
    assert mounts["/f"]["RW"] is False
    assert mounts["/m"]["Propagation"] == "rprivate"
    assert stat.S_ISDIR((tmp_path / "made").stat().st_mode)


def test_what_is_mounted_in_a_leftover_bundle_stays(daemon: Daemon, tmp_path: Path) -> None:
    """The bundle of a container that is in no book goes, the volume shown in it does not."""
    bundle = daemon.root / "exec" / "containers" / secrets.token_hex(32)
    data = tmp_path / "data"
    data.mkdir()
    (data / "kept").touch()
    daemon.kill()
    (bundle / "mount-data").mkdir(parents=True)
    mounts.bind(data, bundle / "mount-data")
    daemon.start()
    assert not bundle.exists()
    assert (data / "kept").exists()
