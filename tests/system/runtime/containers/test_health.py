"""Health checks: states, events, and probes that never end (case A34)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.support.waiting import until

from .conftest import Host

PROBES = int(os.environ.get("LAZ_HEALTH_PROBES", "6"))


def health(host: Host, name: str) -> str:
    return str(host.state(name)["Health"]["Status"])


def test_from_starting_to_healthy_to_unhealthy(host: Host) -> None:
    begin = time.time()
    name = host.start(
        "--health-cmd", "test -e /ok && echo fine", "--health-interval", "200ms",
        "--health-retries", "2", "busybox", "sh", "-c", "sleep 0.5; touch /ok; sleep 1000",
    )  # fmt: skip
    until(lambda: health(host, name) == "healthy")
    assert "(healthy)" in host.out("ps", "--filter", f"name={name}", "--format", "{{.Status}}")
    assert host.state(name)["Health"]["Log"][-1]["Output"] == "fine\n"
    assert host.state(name)["Health"]["FailingStreak"] == 0
    host.out("exec", name, "rm", "/ok")
    until(lambda: health(host, name) == "unhealthy")
    assert len(host.state(name)["Health"]["Log"]) <= 5
    assert (
        host.out("ps", "-q", "--no-trunc", "--filter", "health=unhealthy").strip()
        == (host.inspect(name)["Id"])
    )
    told = host.out(
        "events", "--since", f"{begin:.6f}", "--until", f"{time.time():.6f}",
        "--filter", f"container={name}", "--filter", "event=health_status",
        "--format", "{{.Action}}",
    )  # fmt: skip
    changes = [line for line in told.splitlines() if line != "health_status: unhealthy"]
    assert changes == ["health_status: healthy"]


def test_failures_while_it_starts_do_not_count(host: Host) -> None:
    name = host.start(
        "--health-cmd", "false", "--health-interval", "100ms", "--health-retries", "1",
        "--health-start-period", "1000s", "--health-start-interval", "100ms",
        "busybox", "sleep", "1000",
    )  # fmt: skip
    until(lambda: len(host.state(name)["Health"]["Log"]) >= 3)
    assert host.state(name)["Health"]["FailingStreak"] == 0
    assert health(host, name) == "starting"


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.timeout(max(300, 5 * PROBES))
def test_probes_that_never_end_leave_nothing(host: Host, init: bool) -> None:
    """Case A34, with the number of probes cut; LAZ_HEALTH_PROBES=200 runs it whole."""
    flags = ["--init"] if init else []
    name = host.start(
        *flags, "--health-cmd", "sleep 100 & sleep 100 & wait; sleep 100",
        "--health-interval", "50ms", "--health-timeout", "300ms", "--health-retries", "1",
        "busybox", "sleep", "1000",
    )  # fmt: skip
    seen: set[str] = set()

    def probed() -> bool:
        seen.update(probe["Start"] for probe in host.state(name)["Health"]["Log"])
        return len(seen) >= PROBES

    until(probed, seconds=90 + 2 * PROBES)
    last = host.state(name)["Health"]["Log"][-1]
    assert last["ExitCode"] == -1
    assert "exceeded timeout (300ms)" in last["Output"] or "(0.3s)" in last["Output"]
    zombies: set[str] | None = None

    def none_stays() -> bool:
        # the probe being killed just now may be one for a moment, but never for two looks
        nonlocal zombies
        listing = host.out("exec", name, "sh", "-c", "cat /proc/[0-9]*/stat").splitlines()
        assert len(listing) <= 20
        dead = {line.split()[0] for line in listing if line.split()[2] == "Z"}
        zombies = dead if zombies is None else zombies & dead
        return not zombies

    until(none_stays)


def test_a_probe_ends_with_its_container(host: Host) -> None:
    name = host.start(
        "--health-cmd", "sleep 1234", "--health-interval", "50ms", "--health-timeout", "100s",
        "busybox", "sleep", "1000",
    )  # fmt: skip

    def sleeping() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if (
                line == b"sleep\x001234\x00"
                and host.inspect(name)["Id"] in (entry / "cgroup").read_text()
            ):
                found.append(entry.name)
        return found

    until(lambda: len(sleeping()) == 1)
    (pid,) = sleeping()
    host.out("stop", "-t", "0", name)
    until(lambda: not Path(f"/proc/{pid}").exists())
