"""The real docker command line against a real daemon and a real registry."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive, busybox_rootfs, tar_of
from tests.support.registry import PASSWORD, USER, Registry, registry

from lazarette.runtime.images.model import host

pytestmark = pytest.mark.xdist_group("images-docker-cli")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    one = Daemon(tmp_path_factory.mktemp("lazd"))
    one.start()
    try:
        yield one
    finally:
        one.end()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry"), login=True) as running:
        yield running


@pytest.fixture
def docker(daemon: Daemon) -> Iterator[Docker]:
    """A daemon with nothing but busybox in it."""
    cli = Docker(daemon)
    cli("load", "-i", str(busybox_archive()))
    try:
        yield cli
    finally:
        for container in cli("ps", "-aq").split():
            cli("rm", "-f", container)
        for image in dict.fromkeys(cli("images", "-aq", "--no-trunc").split()):
            daemon.docker("rmi", "-f", image, check=False)


class Docker:
    """``docker …``: what it prints, or how it fails."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def __call__(self, *arguments: str, stdin: bytes = b"") -> str:
        return self.daemon.docker(*arguments, stdin=stdin).stdout.decode()

    def fails(self, *arguments: str, stdin: bytes = b"") -> str:
        done = self.daemon.docker(*arguments, stdin=stdin, check=False)
        assert done.returncode == 1, done
        return done.stderr.decode()

    def inspect(self, ref: str) -> dict[str, object]:
        (found,) = json.loads(self("image", "inspect", ref))
        assert isinstance(found, dict)
        return found


def test_load_tag_list_and_remove(docker: Docker) -> None:
    assert docker("load", "-i", str(busybox_archive())) == "Loaded image: busybox:latest\n"
    docker("tag", "busybox", "me/box:1")
    lines = docker("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines()
    assert sorted(line.split()[0] for line in lines) == ["busybox:latest", "me/box:1"]
    assert docker("rmi", "me/box:1") == "Untagged: me/box:1\n"
    gone = docker("rmi", "busybox").splitlines()
    assert gone[0] == "Untagged: busybox:latest"
    assert [line.split(":")[0] for line in gone[1:]] == ["Deleted", "Deleted"]
    assert docker.fails("rmi", "busybox") == (
        "Error response from daemon: No such image: busybox:latest\n"
    )


def test_conflicts(docker: Docker) -> None:
    docker("run", "-d", "--name", "runs", "busybox", "sleep", "600")
    said = docker.fails("rmi", "busybox")
    assert re.search(
        r'conflict: unable to remove repository reference "busybox" \(must force\) - '
        r"container [0-9a-f]{12} is using its referenced image [0-9a-f]{12}",
        said,
    )
    image = str(docker.inspect("busybox")["Id"])
    assert "(cannot be forced) - image is being used by running container" in docker.fails(
        "rmi", "-f", image
    )
    docker("kill", "runs")
    assert "(must be forced) - image is being used by stopped container" in docker.fails(
        "rmi", image
    )
    assert "Untagged: busybox:latest" in docker("rmi", "-f", image)


def test_history_and_inspect(docker: Docker) -> None:
    (line,) = docker("history", "--no-trunc", "--format", "{{json .}}", "busybox").splitlines()
    assert json.loads(line)["CreatedBy"] == "ADD rootfs.tar /"
    found = docker.inspect("busybox")
    assert (found["RepoTags"], found["RepoDigests"]) == (["busybox:latest"], [])
    assert docker.fails("image", "inspect", "absent").endswith("No such image: absent:latest\n")


def test_save_to_a_file_and_load_it_again(docker: Docker, tmp_path: Path) -> None:
    docker("tag", "busybox", "me/box:1")
    image = docker.inspect("busybox")["Id"]
    docker("save", "-o", str(tmp_path / "both.tar"), "busybox", "me/box:1")
    docker("rmi", "busybox", "me/box:1")
    assert docker("load", stdin=(tmp_path / "both.tar").read_bytes()).splitlines() == [
        "Loaded image: busybox:latest",
        "Loaded image: me/box:1",
    ]
    assert docker.inspect("me/box:1")["Id"] == image
    said = docker.fails("save", "absent", "-o", str(tmp_path / "none.tar"))
    assert "No such image: absent:latest" in said


def test_loading_what_is_no_image(docker: Docker) -> None:
    assert "neither manifest.json nor index.json" in docker.fails(
        "load", stdin=busybox_rootfs().read_bytes()
    )


def test_import_a_root_filesystem(docker: Docker) -> None:
    said = docker(
        "import", "-c", 'CMD ["cat", "/etc/group"]', "-m", "from a test", str(busybox_rootfs()),
        "mine:1",
    )  # fmt: skip
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", said)
    assert docker("history", "--format", "{{.Comment}}", "mine:1") == "from a test\n"
    assert docker("run", "--rm", "mine:1").startswith("root:x:0:")


def test_commit(docker: Docker) -> None:
    docker("run", "--name", "worked", "busybox", "sh", "-c", "echo hi > /new; rm /bin/ls")
    image = docker("commit", "-a", "me", "-m", "work", "-c", "ENV A=b", "worked", "mine:2").strip()
    assert docker("run", "--rm", "mine:2", "sh", "-c", "cat /new; echo $A") == "hi\nb\n"
    found = docker.inspect("mine:2")
    assert (found["Id"], found["Author"], found["Comment"]) == (image, "me", "work")
    assert found["Parent"] == docker.inspect("busybox")["Id"]
    assert "image has dependent child images" in docker.fails(
        "rmi", "-f", str(docker.inspect("busybox")["Id"])
    )
    docker("rm", "worked")
    docker("rmi", "mine:2")


def test_prune(docker: Docker) -> None:
    docker("import", str(busybox_rootfs()), "first:1")
    loose = docker.inspect("first:1")["Id"]
    docker("import", "-m", "again", str(busybox_rootfs()), "first:1")
    said = docker("image", "prune", "-f")
    assert f"deleted: {loose}" in said
    assert docker("images", "-q", "--filter", "dangling=true") == ""


def test_login_push_pull_and_logout(docker: Docker, locked: Registry) -> None:
    name = f"{locked.host}/me/box:1"
    docker("tag", "busybox", name)
    assert "no basic auth credentials" in docker.fails("push", name)
    assert "unauthorized" in docker.fails(
        "login", "-u", USER, "--password-stdin", locked.host, stdin=b"wrong"
    )
    said = docker("login", "-u", USER, "--password-stdin", locked.host, stdin=PASSWORD.encode())
    assert "Login Succeeded" in said
    pushed = docker("push", name)
    assert f"The push refers to repository [{locked.host}/me/box]" in pushed
    match = re.search(r"1: digest: (sha256:[0-9a-f]{64}) size: \d+", pushed)
    assert match is not None
    docker("rmi", name, "busybox")
    pulled = docker("pull", name)
    assert pulled.splitlines()[0] == "1: Pulling from me/box"
    assert pulled.splitlines()[-3:] == [
        f"Digest: {match[1]}",
        f"Status: Downloaded newer image for {name}",
        name,
    ]
    assert f"Status: Image is up to date for {name}" in docker("pull", name)
    assert docker("pull", "-q", f"{locked.host}/me/box@{match[1]}").strip().endswith(match[1])
    assert docker("run", "--rm", "--pull", "always", "-q", name, "echo", "ran") == "ran\n"
    assert "manifest unknown" in docker.fails("pull", f"{locked.host}/me/box:absent")
    assert "Removing login credentials" in docker("logout", locked.host)
    assert "no basic auth credentials" in docker.fails("pull", name)


def test_manifests_are_told(docker: Docker, locked: Registry) -> None:
    """The tree of images, and the very manifest that an image was pulled by."""
    name = f"{locked.host}/told/box:1"
    docker("login", "-u", USER, "--password-stdin", locked.host, stdin=PASSWORD.encode())
    docker("tag", "busybox", name)
    pushed = docker("push", name)
    docker("rmi", name, "busybox")
    docker("pull", "-q", name)
    docker("logout", locked.host)
    described = docker.inspect(name)["Descriptor"]
    assert isinstance(described, dict)
    assert f"digest: {described['digest']} size: {described['size']}" in pushed
    docker("create", "--name", "told", name)
    lines = docker("images", "--tree").splitlines()
    assert any(name in line for line in lines)
    assert any(f"linux/{host().architecture}" in line for line in lines)
    asked = ["curl", "-s", "--unix-socket", str(docker.daemon.socket)]
    told = subprocess.run(
        [*asked, "http://d/v1.50/images/json?manifests=1"], capture_output=True, check=True
    )
    (one,) = json.loads(told.stdout)[0]["Manifests"]
    assert one["ID"] == described["digest"]
    assert one["ImageData"]["Containers"] == docker("ps", "-aq", "--no-trunc").split()


def test_run_pulls_what_is_missing(docker: Docker, locked: Registry) -> None:
    docker("login", "-u", USER, "--password-stdin", locked.host, stdin=PASSWORD.encode())
    name = f"{locked.host}/run/box:1"
    docker("tag", "busybox", name)
    docker("push", "-q", name)
    docker("rmi", name)
    done = docker.daemon.docker("run", "--rm", name, "echo", "ran")
    assert done.stdout == b"ran\n"
    assert f"Unable to find image '{name}' locally".encode() in done.stderr
    assert (
        "manifest unknown"
        in docker.daemon.docker("run", f"{locked.host}/run/box:absent", check=False).stderr.decode()
    )
    docker("logout", locked.host)


def test_events_of_an_images_life(docker: Docker) -> None:
    begin = docker("info", "--format", "{{.SystemTime}}").strip()
    docker("tag", "busybox", "me/told:1")
    docker("rmi", "me/told:1")
    end = docker("info", "--format", "{{.SystemTime}}").strip()
    told = docker("events", "--since", begin, "--until", end, "--filter", "type=image",
                  "--format", "{{.Action}} {{.Actor.Attributes.name}}")  # fmt: skip
    assert told.splitlines() == ["tag me/told:1", "untag me/told:1"]


def test_a_saved_image_is_read_by_tar(docker: Docker) -> None:
    packed = docker.daemon.docker("save", "busybox").stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = tar.getnames()
    assert {"manifest.json", "index.json", "oci-layout"} <= set(names)
    subprocess.run(["tar", "-t"], input=packed, capture_output=True, check=True)


def test_devices_and_setuid_programs_of_an_image_reach_nobody(docker: Docker) -> None:
    memory, program = tarfile.TarInfo("memory"), tarfile.TarInfo("bin/root")
    memory.type, memory.devmajor, memory.devminor, memory.mode = tarfile.CHRTYPE, 1, 1, 0o666
    program.mode = 0o4755
    layer = tar_of([memory, (program, b"#!/bin/sh\n")])
    with tarfile.open(busybox_rootfs()) as base:
        end = base.getmembers()[-1]
        kept = busybox_rootfs().read_bytes()[: end.offset_data + end.size]
    kept += bytes(-len(kept) % tarfile.BLOCKSIZE)
    docker("import", "-", "devices:1", stdin=kept + layer)
    done = docker.daemon.docker("run", "--rm", "devices:1", "head", "-c1", "/memory", check=False)
    assert done.returncode == 1 and b"Operation not permitted" in done.stderr
    data = docker.daemon.root / "data"
    (found,) = data.glob("layers/**/bin/root")
    assert found.stat().st_mode & 0o4001 == 0o4001
    assert data.stat().st_mode & 0o077 == 0, "other users of the host could run it as root"


def test_laz_keeps_logins_where_docker_does(docker: Docker, locked: Registry) -> None:
    name = f"{locked.host}/laz/box:1"
    docker("tag", "busybox", name)
    env = {"DOCKER_CONFIG": str(docker.daemon.root / "docker-config")}
    laz = docker.daemon.laz
    refused = laz(
        "login", "-u", USER, "--password-stdin", locked.host, stdin=b"wrong", env=env, check=False
    )
    assert refused.returncode == 10 and b"unauthorized" in refused.stderr
    laz("login", "-u", USER, "--password-stdin", locked.host, stdin=PASSWORD.encode(), env=env)
    laz("push", name, env=env)
    docker("rmi", name)
    docker("pull", "-q", name)
    assert b"Removing login credentials" in laz("logout", locked.host, env=env).stdout
    assert laz("pull", name, env=env, check=False).returncode != 0
