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
