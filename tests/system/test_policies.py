"""Policies on a real daemon: they fire, keep what they say, and copy elsewhere."""

import json
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until


@pytest.fixture
def protected(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A daemon with a volume that is written, and two repositories."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz(
        "run",
        "-d",
        "--name",
        "writer",
        "-v",
        "v1:/data",
        "busybox",
        "sh",
        "-c",
        "while :; do date >> /data/log; sleep 0.2; done",
    )
    for name in ("default", "second"):
        daemon.laz(
            "repo",
            "init",
            "--name",
            name,
            "--kit-file",
            str(tmp_path / f"kit-{name}"),
            str(tmp_path / name),
        )
    return daemon


def points(daemon: Daemon, repository: str = "default") -> list[dict]:
    return cast(
        list[dict],
        json.loads(daemon.laz("backup", "ls", "--repo", repository, "--json", "v1").stdout),
    )


def test_policy_fires_keeps_and_copies_over_a_crash(protected: Daemon) -> None:
    daemon = protected
    daemon.laz(
        "policy",
        "set",
        "v1",
        "--every",
        "2s",
        "--keep",
        "last=2,floor=2",
        "--copy",
        "second",
        "--upload",
        "50m; 40m@00:00-12:00",
        "--read",
        "50m",
    )
    until(lambda: len(points(daemon, "second")) >= 3, "nothing is copied")
    until(lambda: len(points(daemon)) <= 3, "nothing is forgotten")
    shown = cast(list[dict], daemon.json("policy", "show", "v1"))[0]
    assert shown["schedule"] == "every 2s"
    assert shown["next_run"].endswith("UTC")

    daemon.kill()
    daemon.start()
    newest = points(daemon)[-1]["time_ns"]
    until(lambda: points(daemon)[-1]["time_ns"] > newest, "it is forgotten over a crash")
    daemon.laz("policy", "rm", "v1")
    state = cast(list[dict], daemon.json("status"))[0]
    assert state["last_outcome"] == "ok"


def test_label_protects_and_bad_words_are_refused(protected: Daemon) -> None:
    daemon = protected
    daemon.laz("volume", "create", "--label", "lazarette.backup=every 2s", "labelled")
    until(
        lambda: any(
            one["volume"] == "labelled" for one in cast(list[dict], daemon.json("policy", "show"))
        ),
        "the label is not seen",
    )
    found = cast(list[dict], daemon.json("policy", "show", "labelled"))[0]
    assert "label" in found["origin"]
    for words in (("--every", "nonsense"), ("--cron", "99 * * * *"), ()):
        refused = daemon.laz("policy", "set", "v1", *words, check=False)
        assert refused.returncode == 2, refused
        assert b"Traceback" not in refused.stderr
    unknown = daemon.laz("policy", "show", "v1", check=False)
    assert unknown.returncode not in (0, 1)


def history(daemon: Daemon, volume: str) -> list[dict]:
    return cast(list[dict], daemon.json("backup", "history", volume))


@pytest.mark.slow
def test_volumes_of_one_container_or_project_are_saved_at_one_instant(protected: Daemon) -> None:
    daemon = protected
    label = ("--label", "lazarette.backup=every 2s")
    two = ("-v", "first:/1", "-v", "second:/2")
    daemon.laz("run", "-d", "--name", "two", *label, *two, "busybox", "sleep", "1000")
    for name in ("p1", "p2"):
        daemon.laz("volume", "create", "--label", "com.docker.compose.project=shop", name)
    file = daemon.root / "policies.toml"
    config = daemon.root / "lazd.toml"
    config.write_text(f'policy_file = "{file}"\n')
    daemon.terminate()
    daemon.arguments = ("--config", str(config))
    daemon.start()
    file.write_text('[policy.shop]\nproject = "shop"\nschedule = "every 2s"\n')
    for pair, policy in ((("first", "second"), "first+second"), (("p1", "p2"), "shop")):
        until(
            lambda pair=pair: all(  # type: ignore[misc]
                any(run["outcome"] == "ok" for run in history(daemon, name)) for name in pair
            ),
            f"{pair} are not saved",
        )
        moments = []
        for name in pair:
            assert {run["policy"] for run in history(daemon, name)} == {policy}
            found = json.loads(daemon.laz("backup", "ls", "--json", name).stdout)
            moments.append({one["time_ns"] for one in found})
        assert moments[0] & moments[1], "no instant is common"
    shown = daemon.laz("policy", "show", "p1").stdout.decode()
    assert f"policy file: {file}" in shown
    assert "saved as: shop" in shown
    file.write_text("")
    until(lambda: daemon.laz("policy", "show", "p1", check=False).returncode != 0, "still followed")


def test_what_cannot_be_saved_is_shown_and_told(protected: Daemon) -> None:
    """A scheduled run that cannot even begin is a failed one, not one that never was."""
    daemon = protected
    daemon.laz("policy", "set", "v1", "--every", "2s", "--rpo", "1s", "--repo", "nowhere")
    until(lambda: history(daemon, "v1") != [], "nothing is written down")
    assert history(daemon, "v1")[0]["outcome"] == "failed"
    assert "nowhere" in history(daemon, "v1")[0]["error"]

    def status() -> tuple[object, object, object]:
        [state] = cast(list[dict], daemon.json("status"))
        return state["state"], state["level"], state["overdue"]

    until(lambda: status() == ("failed", "bad", True), "it is not overdue after its target")
    shown = daemon.laz("status")
    assert b"overdue" in shown.stdout
    assert b"nowhere" in shown.stderr
