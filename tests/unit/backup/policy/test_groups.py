from __future__ import annotations

from lazarette.backup.policy.groups import groups, together
from lazarette.backup.policy.model import Origin, Policy, Volume, applying, parse_words

PROJECT = {"com.docker.compose.project": "shop"}
BY_LABEL = {"lazarette.backup": "every 15m"}


def test_what_a_container_or_a_project_ties_is_one_group() -> None:
    volumes = [
        Volume("data", container_labels=[{}], containers=["db"]),
        Volume("wal", container_labels=[{}], containers=["db"]),
        Volume("cache", PROJECT),
        Volume("outside", container_labels=[PROJECT], containers=["web"]),
        Volume("alone"),
    ]
    assert groups(volumes) == [["alone"], ["cache", "outside"], ["data", "wal"]]
    bridge = Volume("shared", container_labels=[{}, PROJECT], containers=["db", "web"])
    assert groups([*volumes, bridge]) == [
        ["alone"],
        ["cache", "data", "outside", "shared", "wal"],
    ]
    assert groups([]) == []


def test_labels_that_say_the_same_in_a_group_are_one_policy() -> None:
    known = {
        "data": Volume("data", container_labels=[BY_LABEL], containers=["db"]),
        "wal": Volume("wal", container_labels=[BY_LABEL], containers=["db"]),
        "own": Volume("own", {"lazarette.backup": "every 1h"}, [BY_LABEL], ["db"]),
        "other": Volume("other", BY_LABEL),
    }
    found: dict[str, Policy] = {}
    for name, volume in known.items():
        policy = applying([], volume)
        assert policy is not None
        found[name] = policy
    assert found["data"].source == "container db"
    merged = together(found, known)
    assert {name: policy.name for name, policy in merged.items()} == {
        "data": "data+wal",
        "wal": "data+wal",
        "own": "own",
        "other": "other",
    }


def test_a_project_means_volumes_its_containers_use() -> None:
    policy = parse_words("shop", {"project": "shop", "schedule": "@daily"}, Origin.FILE)
    assert applying([policy], Volume("x", {}, [PROJECT], ["web"])) is policy
    assert applying([policy], Volume("x", PROJECT)) is policy
    assert applying([policy], Volume("x", {}, [{}], ["web"])) is None
    assert together({"x": policy}, {"x": Volume("x")}) == {"x": policy}
