"""Containers whose users are others on the host (``lazd --userns-remap``)."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import Postgres
from tests.support.remapped import COUNT, Ranges, claimed, remapping
from tests.support.waiting import until

from .conftest import Host

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("remapped-users")]
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
"""The right to open raw sockets, as ``setcap cap_net_raw+ep`` writes it."""


@pytest.fixture(scope="module")
def ranges() -> Iterator[Ranges]:
    with claimed() as made:
        yield made


def ended(one: Daemon) -> None:
    """End a daemon: no mount of it is left."""
    one.end()
    mounted = Path("/proc/self/mountinfo").read_text()
    assert [line for line in mounted.splitlines() if f" {one.root}/" in line] == []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, ranges: Ranges) -> Iterator[Daemon]:
    one = remapping(tmp_path_factory.mktemp("remapped") / "r", ranges)
    one.start()
    one.docker("load", "-q", "-i", str(busybox_archive()))
    yield one
    ended(one)


@pytest.fixture
def one(tmp_path: Path, ranges: Ranges) -> Iterator[Daemon]:
    """A daemon of the test's own."""
    made = remapping(tmp_path / "r", ranges)
    made.start()
    made.docker("load", "-q", "-i", str(busybox_archive()))
    yield made
    ended(made)


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def volume_folder(daemon: Daemon, name: str) -> Path:
    shown = daemon.docker("volume", "inspect", "-f", "{{.Mountpoint}}", name)
    return Path(shown.stdout.decode().strip())


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar}


def packed(name: str, uid: int, gid: int) -> bytes:
    """A tar of one program with a capability."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.uid, info.gid, info.size, info.mode = uid, gid, 1, 0o755
        text = CAPABILITY.decode("latin-1")
        info.pax_headers = {"SCHILY.xattr.security.capability": text}
        tar.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()


def test_root_is_not_the_hosts(host: Host, ranges: Ranges) -> None:
    assert "name=userns" in host.out("info", "-f", "{{.SecurityOptions}}")
    name = host.start("busybox", "sleep", "600")
    process = Path(f"/proc/{host.state(name)['Pid']}")
    assert (process / "uid_map").read_text().split() == ["0", str(ranges.uid), str(COUNT)]
    assert (process / "gid_map").read_text().split() == ["0", str(ranges.gid), str(COUNT)]
    assert owner(process) == (ranges.uid, ranges.gid)
    assert host.inspect(name)["HostConfig"]["UsernsMode"] == ""
    shown = host.daemon.root / "exec" / "roots"
    assert shown.stat().st_mode & 0o777 == 0o710
    assert owner(shown) == (0, ranges.gid)


def test_owners_in_binds_are_the_hosts_and_in_volumes_the_containers(
    host: Host, ranges: Ranges, tmp_path: Path
) -> None:
    bound = tmp_path / "bound"
    bound.mkdir()
    bound.chmod(0o777)
    (bound / "given").touch()
    volume = host.name()
    script = (
        "touch /b/mine /v/mine /t/mine && touch /v/other && chown 5:6 /v/other &&"
        " stat -c '%n %u:%g' /b/given /b/mine /v/mine /v/other /t/mine"
    )
    mounts = ("-v", f"{bound}:/b", "-v", f"{volume}:/v", "--tmpfs", "/t")
    said = host.out("run", "--rm", *mounts, "busybox", "sh", "-c", script)
    assert said.splitlines() == [
        "/b/given 65534:65534",
        "/b/mine 0:0",
        "/v/mine 0:0",
        "/v/other 5:6",
        "/t/mine 0:0",
    ]
    assert owner(bound / "mine") == (ranges.uid, ranges.gid)
    folder = volume_folder(host.daemon, volume)
    assert owner(folder / "mine") == (0, 0)
    assert owner(folder / "other") == (5, 6)
    said = host.out("run", "--rm", "--userns=host", *mounts[2:4], "busybox", "ls", "-ln", "/v")
    assert re.findall(r"1 (\d+) +(\d+)", said) == [("0", "0"), ("5", "6")]
    subpath = f"type=volume,source={volume},target=/s,volume-subpath=mine"
    said = host.out("run", "--rm", "--mount", subpath, "busybox", "stat", "-c", "%u", "/s")
    assert said == "0\n"
    host.daemon.docker("volume", "rm", volume)


@pytest.mark.parametrize("driver", ["overlay", "btrfs", "fuse", "tmpfs"])
def test_volumes_of_every_driver(host: Host, driver: str) -> None:
    volume = host.name()
    host.daemon.docker("volume", "create", "-d", driver, volume)
    mount = ("-v", f"{volume}:/v")
    holder = host.start("--userns=host", *mount, "busybox", "sleep", "600")
    script = "touch /v/mine /v/other; chown 5:6 /v/other; ln -s mine /v/link; mkdir /v/d"
    host.daemon.docker("run", "--rm", *mount, "busybox", "sh", "-c", script)
    look = ("stat", "-c", "%u:%g", "/v", "/v/mine", "/v/other", "/v/link", "/v/d")
    expected = ["0:0", "0:0", "5:6", "0:0", "0:0"]
    assert host.out("exec", holder, *look).split() == expected
    assert host.out("run", "--rm", *mount, "busybox", *look).split() == expected
    host.daemon.docker("rm", "-f", holder)
    host.daemon.docker("volume", "rm", volume)


def test_a_volume_that_is_a_folder_of_the_host(host: Host, tmp_path: Path, ranges: Ranges) -> None:
    volume = host.name()
    tmp_path.chmod(0o777)
    options = ("-o", "type=none", "-o", "o=bind", "-o", f"device={tmp_path}")
    host.daemon.docker("volume", "create", *options, volume)
    host.daemon.docker("run", "--rm", "-v", f"{volume}:/v", "busybox", "touch", "/v/mine")
    assert owner(tmp_path / "mine") == (ranges.uid, ranges.gid)
    host.daemon.docker("volume", "rm", volume)


def test_read_only_mounts_and_images(host: Host, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    mounts = ("-v", f"{tmp_path}:/b:ro", "-v", f"{host.name()}:/v:ro")
    image = ("--mount", "type=image,source=busybox,target=/i")
    script = "touch /b/x; touch /v/x; touch /i/x; touch /x; stat -c %u:%g /i/bin"
    done = host.daemon.docker(
        "run", "--rm", "--read-only", *mounts, *image, "busybox", "sh", "-c", script
    )
    assert done.stderr.count(b"Read-only file system") == 4
    assert done.stdout == b"0:0\n"


def test_copy_up_keeps_the_images_owners(host: Host) -> None:
    file = (
        "FROM busybox\nRUN mkdir /data && echo x > /data/f && chown -R 1000:1001 /data &&"
        " chmod 0750 /data\n"
    )
    host.daemon.docker(
        "build", "-q", "-t", "owned", "-", stdin=file.encode(), env={"DOCKER_BUILDKIT": "0"}
    )
    volume = host.name()
    look = ("busybox", "stat", "-c", "%a %u:%g", "/data", "/data/f")
    said = host.out("run", "--rm", "-v", f"{volume}:/data", "owned", *look[1:])
    assert said.splitlines() == ["750 1000:1001", "644 1000:1001"]
    assert owner(volume_folder(host.daemon, volume) / "f") == (1000, 1001)
    host.daemon.docker("volume", "rm", volume)


STEPS = """# syntax=docker/dockerfile:1
FROM busybox AS first
RUN echo x > /made && chown 5:6 /made && mkdir /tree && touch /tree/f && chown -R 7:8 /tree
FROM busybox
RUN cat /proc/self/uid_map > /map && stat -c %u:%g /etc/hosts / >> /map
RUN --mount=type=bind,target=/c --mount=type=bind,from=first,target=/f \\
    stat -c %u:%g /c/given /f/made /f/tree/f > /bound && cp -a /f/tree /copied
RUN --mount=type=bind,target=/c,rw --mount=type=bind,from=first,source=/tree,target=/t,rw \\
    touch /c/x /t/x && stat -c %u:%g /c/x /t/x /t/f > /written
RUN --mount=type=cache,target=/k touch /k/x && chown 9:9 /k/x
RUN --mount=type=cache,target=/k stat -c %u:%g /k /k/x > /cached
RUN --mount=type=secret,id=word,uid=3 --mount=type=tmpfs,target=/m \\
    touch /m/x && stat -c %u:%g /run/secrets/word /m/x > /secret && cat /run/secrets/word >> /secret
RUN --network=none ip link set lo down 2>/dev/null; adduser -D -u 1234 someone 2>/dev/null; true
USER 1234
RUN id -u > /tmp/user
COPY --chown=11:12 given /given
"""


def test_the_steps_of_a_build(host: Host, ranges: Ranges, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(STEPS)
    (tmp_path / "given").touch()
    (tmp_path / "word").write_text("hidden")
    secret = f"id=word,src={tmp_path / 'word'}"
    host.daemon.laz("build", "-t", "steps", "--secret", secret, str(tmp_path))
    look = (
        "cat /map /bound /written /cached /secret /tmp/user; echo; stat -c %u:%g /copied/f /given"
    )
    for users in ((), ("--userns=host",)):
        said = host.out("run", "--rm", *users, "steps", "sh", "-c", look).split()
        assert said[:5] == ["0", str(ranges.uid), str(COUNT), "0:0", "0:0"]
        assert said[5:] == [
            *("0:0", "5:6", "7:8"),
            *("0:0", "0:0", "7:8"),
            *("0:0", "9:9"),
            *("3:0", "0:0", "hidden1234"),
            *("7:8", "11:12"),
        ]


def test_a_step_with_the_hosts_network_is_refused(host: Host) -> None:
    file = b"FROM busybox\nRUN true\n"
    environment = {"DOCKER_BUILDKIT": "0"}
    options = ("build", "--network=host", "--no-cache", "-")
    done = host.daemon.docker(*options, stdin=file, env=environment, check=False)
    assert b"RUN cannot use the network host when user namespaces are enabled" in done.stderr


def test_the_files_of_a_container_are_roots(host: Host) -> None:
    """What the daemon makes belongs to the container's root, and works."""
    script = (
        "echo 1.2.3.4 elsewhere >> /etc/hosts && grep -c elsewhere /etc/hosts &&"
        " stat -c %u:%g /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm /dev/pts /work &&"
        " touch /dev/shm/x && cat /proc/sys/net/ipv4/ping_group_range && id -u > /dev/stdout &&"
        " ip link set lo down && pwd"
    )
    options = ("--sysctl", "net.ipv4.ping_group_range=0 1000", "--cap-add", "NET_ADMIN")
    said = host.out("run", "--rm", "--init", "-w", "/work", *options, "busybox", "sh", "-c", script)
    assert said.splitlines() == ["1", *["0:0"] * 6, "0\t1000", "0", "/work"]


def test_a_published_port_and_a_name(host: Host) -> None:
    name = host.start("-p", "127.0.0.1::80", "busybox", "httpd", "-f", "-h", "/etc")
    port = host.out("port", name, "80").strip()
    done = host.daemon.docker("exec", name, "ping", "-c", "1", "-w", "5", "127.0.0.1")
    assert b"1 packets received" in done.stdout
    with urllib.request.urlopen(f"http://{port}/hostname", timeout=10) as answer:
        assert answer.read() == host.inspect(name)["Config"]["Hostname"].encode() + b"\n"


def test_exec_attach_and_health(host: Host) -> None:
    health = ("--health-cmd", "test $(id -u) = 0 && touch /healthy", "--health-interval", "200ms")
    name = host.start("-t", *health, "busybox", "sh", "-c", "tty; sleep 600")
    assert "/dev/pts/0" in host.out("logs", name)
    until(lambda: host.state(name)["Health"]["Status"] == "healthy", "it is not healthy")
    assert host.out("exec", name, "stat", "-c", "%u:%g", "/healthy") == "0:0\n"
    assert host.out("exec", name, "sh", "-c", "id -u > /dev/stdout") == "0\n"
    said = host.out("exec", "-u", "7:8", name, "sh", "-c", "id -u; id -g > /dev/stdout")
    assert said == "7\n8\n"
    said = host.out("exec", "-i", name, "sh", "-c", "cat /dev/stdin", stdin=b"through")
    assert said == "through"
    detached = ("exec", "-d", name, "sh", "-c", "echo x > /dev/stdout && touch /detached")
    host.daemon.docker(*detached)
    until(
        lambda: (
            host.daemon.docker("exec", name, "test", "-e", "/detached", check=False).returncode == 0
        )
    )
    said = host.out("run", "--rm", "-i", "busybox", "cat", stdin=b"attached")
    assert said == "attached"


@pytest.mark.parametrize("running", [True, False])
def test_files_in_and_out(host: Host, running: bool) -> None:
    """Whether it runs or not: a tar has the owners of the container, both ways."""
    name = host.start("-v", f"{host.name()}:/v", "busybox", "sleep", "600")
    host.daemon.docker("exec", name, "mkdir", "-p", "/d")
    host.daemon.docker("exec", name, "chown", "3:4", "/d")
    if not running:
        host.daemon.docker("stop", "-t", "0", name)
    for folder in ("/d", "/v"):
        host.daemon.docker("cp", "-", f"{name}:{folder}", stdin=packed("tool", 7, 8))
    host.daemon.docker("cp", str(Path(__file__)), f"{name}:/d/own")
    found = members(host.daemon.docker("cp", f"{name}:/d", "-").stdout)
    found |= members(host.daemon.docker("cp", f"{name}:/v", "-").stdout)
    assert (found["d"].uid, found["d"].gid) == (3, 4)
    assert (found["d/own"].uid, found["d/own"].gid) == (0, 0)
    for tool in (found["d/tool"], found["v/tool"]):
        assert (tool.uid, tool.gid) == (7, 8)
        xattr = tool.pax_headers["SCHILY.xattr.security.capability"]
        assert xattr.encode("utf-8", "surrogateescape") == CAPABILITY
    exported = members(host.daemon.docker("export", name).stdout)
    assert (exported["d/tool"].uid, exported["d/tool"].gid) == (7, 8)
    assert "C /d" not in host.out("diff", name).splitlines()
    assert "A /d/tool" in host.out("diff", name).splitlines()
    if not running:
        host.daemon.docker("start", name)
    said = host.out("exec", name, "stat", "-c", "%u:%g", "/d", "/d/tool", "/d/own", "/v/tool")
    assert said.split() == ["3:4", "7:8", "0:0", "7:8"]


def test_a_commit_has_the_owners_of_the_container(host: Host) -> None:
    name = host.start("busybox", "sh", "-c", "touch /f /g; chown 5:6 /g; rm /bin/vi; sleep 600")
    until(lambda: "A /g" in host.out("diff", name).splitlines())
    host.daemon.docker("commit", name, "committed")
    look = ("stat", "-c", "%u:%g", "/f", "/g")
    assert host.out("run", "--rm", "committed", *look).split() == ["0:0", "5:6"]
    assert host.out("run", "--rm", "--userns=host", "committed", *look).split() == ["0:0", "5:6"]


def test_the_hosts_users(host: Host) -> None:
    said = host.out("run", "--rm", "--userns=host", "busybox", "cat", "/proc/self/uid_map")
    assert said.split() == ["0", "0", "4294967295"]
    said = host.daemon.laz("run", "--rm", "--userns=host", "--privileged", "busybox", "id", "-u")
    assert said.stdout == b"0\n"
    allowed = ("--privileged", "--network=host", "--pid=host")
    said = host.out("run", "--rm", "--userns=host", *allowed, "busybox", "id", "-u")
    assert said == "0\n"


REFUSED = {
    "--privileged": "privileged mode is incompatible with user namespaces.  You must run the "
    "container in the host namespace when running privileged mode",
    "--network=host": "cannot share the host's network namespace when user namespaces are enabled",
    "--pid=host": "cannot share the host PID namespace when user namespaces are enabled",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_only_the_hosts_users_may(host: Host, option: str) -> None:
    done = host.daemon.docker("run", "--rm", option, "busybox", "true", check=False)
    assert done.returncode == 125
    assert REFUSED[option] in done.stderr.decode()


def test_shared_namespaces(host: Host) -> None:
    """They go with the user namespace that owns them."""
    first = host.start("--ipc", "shareable", "busybox", "sleep", "600")
    join = ("--network", f"container:{first}", "--ipc", f"container:{first}")
    script = (
        "touch /dev/shm/x && stat -c %u /dev/shm/x && ip link set lo down && ip -o link | wc -l"
    )
    joined = ("--pid", f"container:{first}", "--cap-add", "NET_ADMIN")
    said = host.out("run", "--rm", *join, *joined, "busybox", "sh", "-c", script)
    assert said.split() == ["0", "2"]
    said = host.out("run", "--rm", "--pid", f"container:{first}", "busybox", "ip", "-o", "link")
    assert "eth0" in said
    other = host.start("--userns=host", "busybox", "sleep", "600")
    strange = ("run", "--rm", "--network", f"container:{other}", "busybox", "true")
    done = host.daemon.docker(*strange, check=False)
    assert f"cannot join the namespaces of {other}: other users" in done.stderr.decode()


@pytest.mark.parametrize("remapped_again", [True, False])
def test_a_killed_daemon_leaves_them_running(
    one: Daemon, ranges: Ranges, remapped_again: bool
) -> None:
    """The next daemon knows whose they are, with its own setting changed too."""
    mounts = ("-v", "vol:/v", "--mount", "type=image,source=busybox,target=/i")
    one.docker(
        "run",
        "-d",
        "--stop-timeout",
        "0",
        "--name",
        "long",
        *mounts,
        "busybox",
        "sh",
        "-c",
        "touch /f; sleep 600",
    )
    one.kill()
    if not remapped_again:
        one.arguments = ()
    one.start()
    assert (
        one.docker("exec", "long", "stat", "-c", "%u", "/f", "/v", "/i").stdout.split()
        == [b"0"] * 3
    )
    one.docker("cp", "-", "long:/v", stdin=packed("tool", 7, 8))
    found = members(one.docker("cp", "long:/v", "-").stdout)
    assert (found["v/tool"].uid, found["v/tool"].gid) == (7, 8)
    assert members(one.docker("export", "long").stdout)["f"].uid == 0
    one.docker("restart", "-t", "0", "long")
    assert one.docker("exec", "long", "stat", "-c", "%u", "/f", "/v/tool").stdout.split() == [
        b"0",
        b"7",
    ]
    pid = json.loads(one.docker("inspect", "long").stdout)[0]["State"]["Pid"]
    first = Path(f"/proc/{pid}/uid_map").read_text().split()[1]
    assert first == (str(ranges.uid) if remapped_again else "0")


def test_a_database_comes_back_with_and_without_remapping(one: Daemon, tmp_path: Path) -> None:
    """Its volume has the database's own ids on disk and in the repository."""
    url, kit = str(tmp_path / "repo"), tmp_path / "kit"
    database = Postgres.run(one, initdb="--no-sync")
    database.sql("CREATE TABLE kept (id bigint PRIMARY KEY)")
    database.sql("INSERT INTO kept SELECT generate_series(1, 1000)")
    assert owner(volume_folder(one, "pgdata") / "PG_VERSION")[0] < 1000
    one.laz("repo", "init", "--kit-file", str(kit), url)
    run = cast(list[dict], one.json("backup", "run", "pgdata"))[0]
    assert run["outcome"] == "ok"
    one.docker("rm", "-f", "db")
    one.docker("volume", "rm", "pgdata")

    plain = Daemon(tmp_path / "plain")
    plain.start()
    try:
        recovered(plain, url, kit, database.port).check()
    finally:
        plain.end()
    again = recovered(one, url, kit, database.port)
    until(lambda: '"whole"' in one.laz("volume", "fill", "--json").stdout.decode(), "it fills")
    again.sql("INSERT INTO kept VALUES (1001)")
    again.check()
    assert cast(list[dict], one.json("backup", "run", "pgdata"))[0]["outcome"] == "ok"


def recovered(daemon: Daemon, url: str, kit: Path, port: int) -> Postgres:
    """The database out of the repository: it has its rows, and its files their owner."""
    report = cast(dict, daemon.json("recover", url, "--kit", str(kit)))
    assert report["outcome"] == "ok", report
    database = Postgres(daemon, "pgdata", "db", port)
    database.wait()
    assert database.sql("SELECT count(*) FROM kept") == "1000"
    file = "/var/lib/postgresql/data/PG_VERSION"
    assert daemon.laz("exec", "db", "stat", "-c", "%U:%G", file).stdout == b"postgres:postgres\n"
    return database


def test_a_driver_that_cannot_map_says_what_to_do(tmp_path: Path, ranges: Ranges) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'layer_driver = "fuse"\nuserns_remap = "{ranges.user}"\n')
    made = remapping(tmp_path / "r", ranges)
    made.arguments = ("--config", str(config))
    made.start()
    try:
        made.docker("load", "-q", "-i", str(busybox_archive()))
        done = made.docker("run", "--rm", "busybox", "true", check=False)
        assert done.returncode == 125
        assert b"the layer driver fuse cannot map owners" in done.stderr
        made.docker("run", "--rm", "--userns=host", "busybox", "true")
    finally:
        ended(made)


@pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed")
def test_runc_too(tmp_path: Path, ranges: Ranges) -> None:
    config = tmp_path / "config.toml"
    config.write_text('runtime = "runc"\n')
    made = remapping(tmp_path / "r", ranges)
    made.arguments = (*made.arguments, "--config", str(config))
    made.start()
    try:
        made.docker("load", "-q", "-i", str(busybox_archive()))
        script = "touch /tmp/f && stat -c %u:%g /tmp/f > /dev/stdout; sleep 600"
        for name, user in (("by-root", "0:0"), ("by-user", "7:8")):
            made.docker("run", "-d", "--name", name, "-u", user, "busybox", "sh", "-c", script)
            until(lambda: made.docker("logs", name).stdout, "it says nothing")  # noqa: B023
            assert made.docker("logs", name).stdout.decode() == f"{user}\n"
            said = made.docker("exec", name, "sh", "-c", "id -u > /dev/stdout").stdout
            assert said.decode() == f"{user[0]}\n"
        done = made.docker("run", "--rm", "-u", "70000", "busybox", "true", check=False)
        assert b"user 70000 or group 0 is outside of the mapped ids" in done.stderr
    finally:
        ended(made)


def test_a_daemon_that_cannot_remap_does_not_start(tmp_path: Path, ranges: Ranges) -> None:
    kept_out = remapping(tmp_path / "r", ranges)
    (tmp_path / "r").chmod(0o700)
    with pytest.raises(AssertionError, match=f"keeps the remapped user {ranges.uid} out"):
        kept_out.start()
    nobody = Daemon(tmp_path / "n", arguments=("--userns-remap", "nobody-of-that-name"))
    with pytest.raises(AssertionError, match="there is no user nobody-of-that-name"):
        nobody.start()
