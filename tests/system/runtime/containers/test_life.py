"""Containers from create to rm through the real docker command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tests.support.waiting import until

from .conftest import Host


def test_output_and_exit_code(host: Host) -> None:
    done = host.daemon.docker(
        "run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3", check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 3)


def test_stdin_until_its_end(host: Host) -> None:
    text = b"line\n" * 50_000
    done = host.daemon.docker("run", "--rm", "-i", "busybox", "cat", stdin=text)
    assert done.stdout == text


@pytest.mark.parametrize(
    ("command", "code"), [("nosuch", 127), ("/no/such", 127), ("/etc", 126), ("/etc/passwd", 126)]
)
def test_programs_that_cannot_be_started(host: Host, command: str, code: int) -> None:
    name = host.name()
    done = host.daemon.docker("run", "--name", name, "busybox", command, check=False)
    assert done.returncode == code
    assert host.state(name)["ExitCode"] == code
    assert host.state(name)["Status"] == "created"


@pytest.mark.parametrize("detached", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("program", ["docker", "laz"])
@pytest.mark.parametrize("what", ["command", "port"])
def test_failed_starts_with_rm_say_why(host: Host, program: str, what: str, detached: bool) -> None:
    """The removal is over when the error comes, and does not hide it."""
    run = host.daemon.docker if program == "docker" else host.daemon.laz
    name = host.name()
    options = ["-p", "192.0.2.1:99:99"] if what == "port" else []
    command = "true" if what == "port" else "nosuch"
    if detached:
        options.append("-d")
    done = run("run", "--rm", "--name", name, *options, "busybox", command, check=False)
    told = "cannot bind 192.0.2.1:99" if what == "port" else "executable file not found"
    assert told in done.stderr.decode()
    if program == "docker":
        assert done.returncode == (125 if what == "port" else 127)
    assert name not in host.out("ps", "-a", "--format", "{{.Names}}")


def test_names_are_taken_once(host: Host) -> None:
    name = host.start("busybox", "sleep", "100")
    done = host.daemon.docker("create", "--name", name, "busybox", check=False)
    assert done.returncode == 1 or done.returncode == 125
    assert f'The container name "/{name}" is already in use'.encode() in done.stderr


def test_pause_freezes(host: Host) -> None:
    name = host.start("busybox", "sh", "-c", "while :; do echo x; sleep 0.02; done")
    host.out("pause", name)
    assert host.state(name)["Paused"]
    before = host.out("logs", name)
    time.sleep(0.3)
    assert host.out("logs", name) == before
    done = host.daemon.docker("exec", name, "true", check=False)
    assert b"is paused" in done.stderr
    host.out("unpause", name)
    until(lambda: host.out("logs", name) != before)


def test_stop_asks_then_kills(host: Host) -> None:
    script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    polite = host.start("busybox", "sh", "-c", script)
    until(lambda: "ready" in host.out("logs", polite))  # before, the kernel keeps TERM from it
    host.out("stop", "-t", "20", polite)
    assert host.state(polite)["ExitCode"] == 5
    stubborn = host.start("busybox", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")
    host.out("stop", "-t", "1", stubborn)
    assert host.state(stubborn)["ExitCode"] == 137


def test_stop_timeout_and_signal_of_the_container(host: Host) -> None:
    """Case A33, with its times divided by ten."""
    script = "trap 'sleep 2; exit 0' INT; echo ready; while :; do sleep 0.05; done"
    name = host.start("--stop-timeout", "30", "--stop-signal", "INT", "busybox", "sh", "-c", script)
    until(lambda: "ready" in host.out("logs", name))
    host.out("restart", name)
    assert host.state(name)["Running"]
    until(lambda: host.out("logs", name).count("ready") == 2)
    host.out("stop", name)
    assert host.state(name)["ExitCode"] == 0
    host.out("start", name)
    until(lambda: host.out("logs", name).count("ready") == 3)
    host.out("stop", "-t", "1", name)
    assert host.state(name)["ExitCode"] == 137


def test_restart_policy_counts_and_gives_up(host: Host) -> None:
    name = host.start("--restart", "on-failure:2", "busybox", "sh", "-c", "exit 4")
    until(lambda: host.state(name)["Status"] == "exited")
    assert host.inspect(name)["RestartCount"] == 2
    assert host.state(name)["ExitCode"] == 4


def test_stop_by_hand_ends_a_restart_policy(host: Host) -> None:
    name = host.start("--restart", "always", "busybox", "sleep", "100")
    first = host.state(name)["Pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: host.state(name)["Pid"] not in (0, first))
    host.out("stop", "-t", "0", name)
    time.sleep(0.5)
    assert host.state(name)["Status"] == "exited"


def test_removal_of_a_running_container_needs_force(host: Host) -> None:
    name = host.start("busybox", "sleep", "100")
    done = host.daemon.docker("rm", name, check=False)
    assert b"stop the container before removing" in done.stderr
    host.out("rm", "-f", name)
    assert host.daemon.docker("inspect", name, check=False).returncode == 1


def test_anonymous_volumes_go_named_ones_stay(host: Host) -> None:
    name = host.start("-v", "/anon", "-v", f"keep{os.getpid()}:/named", "busybox", "true")
    volumes = {m["Destination"]: m["Name"] for m in host.inspect(name)["Mounts"]}
    host.out("wait", name)
    host.out("rm", "-v", name)
    left = host.out("volume", "ls", "-q").split()
    assert volumes["/anon"] not in left
    assert volumes["/named"] in left
    host.out("volume", "rm", volumes["/named"])


def test_exec(host: Host) -> None:
    name = host.start("-e", "A=1", "busybox", "sleep", "100")
    script = "echo $A $B; pwd; exit 6"
    done = host.daemon.docker(
        "exec", "-e", "B=2", "-w", "/tmp", name, "sh", "-c", script, check=False
    )
    assert (done.stdout, done.returncode) == (b"1 2\n/tmp\n", 6)
    echoed = host.daemon.docker("exec", "-i", name, "cat", stdin=b"to cat")
    assert echoed.stdout == b"to cat"
    missing = host.daemon.docker("exec", name, "nosuch", check=False)
    assert missing.returncode in (126, 127)
    host.out("exec", "-d", name, "touch", "/tmp/detached")
    until(lambda: "detached" in host.out("exec", name, "ls", "/tmp"))


def test_limits_reach_the_kernel(host: Host) -> None:
    name = host.start(
        "--memory", "32m", "--pids-limit", "50", "--cpus", "0.5", "--ulimit", "nofile=200:300",
        "--shm-size", "1m", "busybox", "sleep", "100",
    )  # fmt: skip
    limits = host.out("exec", name, "sh", "-c", "ulimit -n; ulimit -Hn; df -k /dev/shm")
    assert limits.split()[:2] == ["200", "300"]
    assert " 1024 " in limits
    groups = dict(
        line.split(":", 2)[1:]
        for line in Path(f"/proc/{host.state(name)['Pid']}/cgroup").read_text().splitlines()
    )
    pids = Path(f"/sys/fs/cgroup/pids{groups.get('pids', '')}/pids.max")
    if not pids.exists():
        pids = Path(f"/sys/fs/cgroup{groups.get('', '')}/pids.max")
    assert pids.read_text().strip() == "50"
    host.out("update", "--pids-limit", "60", name)
    assert pids.read_text().strip() == "60"


def test_out_of_memory_is_told(host: Host) -> None:
    name = host.start("--memory", "16m", "busybox", "sh", "-c", "x=a; while :; do x=$x$x; done")
    host.out("wait", name)
    assert host.state(name)["OOMKilled"]
    assert host.state(name)["ExitCode"] == 137


def test_security_defaults(host: Host) -> None:
    name = host.start("busybox", "sleep", "100")
    status = host.out("exec", name, "cat", "/proc/self/status")
    assert "Seccomp:\t2" in status
    assert host.daemon.docker(
        "exec", name, "mount", "-t", "tmpfs", "x", "/tmp", check=False
    ).returncode
    assert host.daemon.docker("exec", name, "sh", "-c", "echo 1 > /proc/sys/kernel/core_uses_pid",
                              check=False).returncode  # fmt: skip
    plain = host.start("--read-only", "--tmpfs", "/run", "busybox", "sleep", "100")
    assert host.daemon.docker("exec", plain, "touch", "/x", check=False).returncode
    host.out("exec", plain, "touch", "/run/x")


def test_privileged_works_without_every_capability(host: Host) -> None:
    done = host.out("run", "--rm", "--privileged", "busybox", "sh", "-c",
                    "mount -t tmpfs x /tmp && ls /dev/loop-control")  # fmt: skip
    assert "/dev/loop-control" in done


def test_namespaces_are_shared_when_asked(host: Host) -> None:
    first = host.start("--hostname", "one", "--ipc", "shareable", "busybox", "sleep", "100")
    second = host.out(
        "run", "--rm", "--network", f"container:{first}", "--pid", f"container:{first}",
        "--ipc", f"container:{first}", "busybox", "ps",
    )  # fmt: skip
    assert "sleep 100" in second
    assert host.out("run", "--rm", "--uts", "host", "busybox", "hostname").strip() == (
        os.uname().nodename
    )


def test_init_reaps(host: Host) -> None:
    name = host.start("--init", "busybox", "sleep", "100")
    assert "docker-init" in host.out("exec", name, "cat", "/proc/1/cmdline")


def test_filters_of_ps(host: Host) -> None:
    name = host.start("--label", f"who={os.getpid()}", "busybox", "sleep", "100")
    other = host.start("--label", f"who={os.getpid()}", "busybox", "false")
    host.out("wait", other)

    def listed(*filters: str) -> list[str]:
        flags = [flag for one in filters for flag in ("--filter", one)]
        return host.out("ps", "--format", "{{.Names}}", *flags).split()

    label = f"label=who={os.getpid()}"
    assert listed(label) == [name]
    assert listed(label, "status=exited") == [other]
    assert listed(label, "exited=1") == [other]
    assert listed(f"name=^/{name}$") == [name]
    assert set(listed(label, "status=exited", "status=running")) == {name, other}
    assert host.daemon.docker("ps", "--filter", "bogus=1", check=False).returncode


def test_events_in_order(host: Host) -> None:
    begin = time.time()
    name = host.name()
    host.out("run", "--rm", "--name", name, "busybox", "true")
    told = host.out(
        "events", "--since", f"{begin:.6f}", "--until", f"{time.time() + 1:.6f}",
        "--filter", f"container={name}", "--format", "{{.Action}}",
    )  # fmt: skip
    actions = told.split()
    assert actions == ["create", "attach", "start", "die", "destroy"]
