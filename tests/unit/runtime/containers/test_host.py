"""Reading the host: control groups, capabilities, processes, users, instants."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazarette.runtime.containers import capabilities, cgroups, pidfd, seccomp
from lazarette.runtime.containers.cgroups import Layout
from lazarette.runtime.containers.health import probe_command
from lazarette.runtime.containers.inspect import duration_text
from lazarette.runtime.containers.model import Healthcheck
from lazarette.runtime.containers.monitor import start_failure
from lazarette.runtime.containers.names import check_name, make_name
from lazarette.runtime.containers.rootfs import make_folders, open_in_root, resolve_user
from lazarette.runtime.containers.times import parse_instant
from lazarette.storage.errors import InvalidArgument

V1 = "30 29 0:26 / /sys/fs/cgroup/{0} rw - cgroup cgroup rw,{0}\n"
V2 = "31 29 0:27 / /sys/fs/cgroup{0} rw - cgroup2 cgroup2 rw\n"


def test_layouts() -> None:
    assert cgroups.detect(V1.format("memory")).layout is Layout.V1
    assert cgroups.detect(V1.format("memory") + V2.format("/unified")).layout is Layout.HYBRID
    pure = cgroups.detect(V2.format(""))
    assert pure.layout is Layout.V2
    assert pure.roots == {"": Path("/sys/fs/cgroup")}


def test_capabilities_are_cut_to_what_we_have() -> None:
    bounding = frozenset({"CHOWN", "NET_ADMIN", "SYS_ADMIN"})
    choose = capabilities.choose
    assert choose([], [], False, bounding) == ["CAP_CHOWN"]
    assert choose(["net_admin"], [], False, bounding) == ["CAP_CHOWN", "CAP_NET_ADMIN"]
    assert choose(["CAP_NET_ADMIN"], ["ALL"], False, bounding) == ["CAP_NET_ADMIN"]
    assert choose(["ALL"], ["SYS_ADMIN"], False, bounding) == ["CAP_CHOWN", "CAP_NET_ADMIN"]
    assert len(choose([], [], True, bounding)) == 3
    with pytest.raises(InvalidArgument):
        choose(["NET_BOGUS"], [], False, bounding)


def test_the_filter_opens_with_capabilities() -> None:
    def allowed(caps: list[str]) -> set[str]:
        made = seccomp.default_filter(caps)
        rules = made["syscalls"]
        assert isinstance(rules, list)
        return {n for r in rules if r["action"] == "SCMP_ACT_ALLOW" for n in r["names"]}

    assert "mount" not in allowed([])
    assert {"mount", "setns"} <= allowed(["CAP_SYS_ADMIN"])
    assert {"read", "openat2", "clone"} <= allowed([])


def test_a_profile_of_the_user() -> None:
    text = (
        '{"defaultAction":"SCMP_ACT_ALLOW","syscalls":['
        '{"names":["chmod"],"action":"SCMP_ACT_ERRNO"},'
        '{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}}]}'
    )
    rules = seccomp.from_profile(text, [])["syscalls"]
    assert rules == [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]
    with pytest.raises(InvalidArgument):
        seccomp.from_profile("no json", [])


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("sigkill", 9), ("2", 2), ("RTMIN+1", 35), ("SIGRTMAX-1", 63), ("NOPE", 0)],
)
def test_signals(text: str, number: int) -> None:
    assert pidfd.parse_signal(text) == number


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        started = pidfd.start_time(child.pid)
        assert pidfd.is_alive(child.pid, started)
        assert not pidfd.is_alive(child.pid, started + 1)
        assert not pidfd.send(child.pid, started + 1, signal.SIGKILL)
        assert pidfd.send(child.pid, started, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert not pidfd.is_alive(child.pid, started)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/sh\nweb:x:33:34::/srv:/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nwww:x:34:\ndocker:x:99:web\n")
    (tmp_path / "out").symlink_to("/etc")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_users(root: int) -> None:
    web = resolve_user(root, "web")
    assert (web.uid, web.gid, web.groups, web.home) == (33, 34, (99,), "/srv")
    other = resolve_user(root, "1000:docker", ("www",))
    assert (other.uid, other.gid, other.groups, other.home) == (1000, 99, (34,), "/")
    assert resolve_user(root, "").uid == 0
    for wrong in ("ghost", "0:ghosts", "4294967296"):
        with pytest.raises(InvalidArgument):
            resolve_user(root, wrong)


def test_links_lead_nowhere_outside(root: int) -> None:
    fd = open_in_root(root, "/out/passwd", os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        assert b"web" in file.read()
    os.close(make_folders(root, "/out/new/deep"))
    os.close(open_in_root(root, "/etc/new/deep", os.O_PATH))


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("", 0),
        ("1700000000", 1_700_000_000_000_000_000),
        ("1700000000.000000005", 1_700_000_000_000_000_005),
        ("10m", 3_000_000_000_000),
        ("1970-01-01T00:00:01Z", 1_000_000_000),
        ("1970-01-01T01:00:01.5+01:00", 1_500_000_000),
    ],
)
def test_instants(text: str, ns: int) -> None:
    assert parse_instant(text, 3_600_000_000_000) == ns


def test_no_instant() -> None:
    with pytest.raises(InvalidArgument):
        parse_instant("yesterday", 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (3599, "59 minutes"),
        (3600, "About an hour"),
        (86_400, "24 hours"),
        (86_400 * 2, "2 days"),
        (86_400 * 20, "2 weeks"),
        (86_400 * 70, "2 months"),
        (86_400 * 800, "2 years"),
    ],
)
def test_durations(seconds: int, text: str) -> None:
    assert duration_text(seconds * 1_000_000_000) == text


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("executable file `nosuch` not found in $PATH: No such file or directory", 127),
        ("exec: /nosuch: no such file or directory", 127),
        ("open executable: Permission denied", 126),
        ("open executable: Operation not permitted", 126),
        ("something else", 128),
    ],
)
def test_failures_to_start(message: str, code: int) -> None:
    failed = start_failure(message, "crun")
    assert failed.code == code
    assert "OCI runtime create failed" in failed.message


def test_names() -> None:
    assert check_name("/web_1") == "web_1"
    for wrong in ("a", "-a", "a b", "ü1", ""):
        with pytest.raises(InvalidArgument):
            check_name(wrong)
    assert "_" in make_name(())


def test_probe_commands() -> None:
    assert probe_command(Healthcheck(test=["CMD", "a", "b"]), None) == ["a", "b"]
    shell = probe_command(Healthcheck(test=["CMD-SHELL", "a && b"]), None)
    assert shell == ["/bin/sh", "-c", "a && b"]
    assert probe_command(Healthcheck(test=["NONE"]), None) is None
    assert probe_command(Healthcheck(), None) is None
