from __future__ import annotations

from zoneinfo import ZoneInfo

import pytest

from lazarette.backup.policy.durations import format_duration, parse_duration, parse_size
from lazarette.backup.policy.model import (
    ConsistencyRule,
    HoldMode,
    Hook,
    Origin,
    Policy,
    Volume,
    WrongPolicy,
    applying,
    parse_file,
    parse_labels,
    parse_words,
)
from lazarette.backup.policy.schedule import parse_schedule
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

FILE = """
[defaults]
zone = "Europe/Berlin"
repository = "s3://backups/all"

[policy.shop]
project = "shop"
schedule = "every 15m"
keep = "hourly=24,daily=7"
copies = ["/mnt/usb/shop"]
consistency = "postgres"
before = ["host: logger 'backup begins'", "web: /bin/flush --all"]
windows = ["mon-fri 22:00-06:00"]
upload = "2M@08:00-18:00; 20M"
jitter = "1m"
rpo = "1h"
drill = "@weekly"
drill_command = "psql -c 'select 1'"
notify = ["json://host/secret"]

[policy.gold]
labels = ["tier=gold", "owner"]
schedule = "30 2 * * *"
mode = "stop"
"""


def test_a_file() -> None:
    shop, gold = parse_file(FILE, "/etc/lazarette/policies.toml")
    assert shop.schedule == parse_schedule("every 15m")
    assert shop.zone == ZoneInfo("Europe/Berlin")
    assert (shop.repository, shop.copies) == ("s3://backups/all", ("/mnt/usb/shop",))
    assert shop.consistency.before == (
        Hook(("logger", "backup begins")),
        Hook(("/bin/flush", "--all"), "web"),
    )
    assert shop.rpo_ns == 3600 * NANOSECONDS
    assert shop.drill is not None
    assert shop.drill.command == ("psql", "-c", "select 1")
    assert "secret" not in repr(shop)
    assert gold.consistency.mode is HoldMode.STOP
    assert gold.rpo_ns == 2 * 24 * 3600 * NANOSECONDS
    assert (gold.origin, gold.source) == (Origin.FILE, "/etc/lazarette/policies.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[policy.x", "cannot be read"),
        ("[polisy.x]", "polisy"),
        ('[policy.x]\nvolumes=["a"]', "schedule"),
        ('[policy.x]\nvolumes=["a"]\nschedule="@daily"\nkeeep="x"', "keeep"),
        ('[policy.x]\nvolumes=["a"]\nschedule="@dayly"', "policy x: not a schedule"),
        ('[policy.x]\nschedule="@daily"', "protects nothing"),
        ('[policy.x]\nvolumes=["a"]\nschedule="@daily"\nmode="freeze"', "mode"),
        ('[policy.x]\nvolumes=["a"]\nschedule="@daily"\nbefore=["flush"]', "not a hook"),
        ('[policy.x]\nvolumes=["a"]\nschedule="every 1m"\njitter="2m"', "jitter"),
        (
            '[policy.x]\nvolumes=["a"]\nschedule="0 12 * * *"\nwindows=["22:00-06:00"]',
            "never due within",
        ),
        ('[policy.x]\nvolumes=["a"]\nschedule="@daily"\nzone="Mars"', "time zone"),
        ('[policy.x]\nvolumes=["a"]\nschedule="@daily"\nkeep="floor=0"', "remove every"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(WrongPolicy) as wrong:
        parse_file(text, "policies.toml")
    assert said in wrong.value.message


def test_labels() -> None:
    labels = {
        "lazarette.backup": "every 15m",
        "lazarette.keep": "hourly=24,daily=7,weekly=4,monthly=12",
        "lazarette.repo": "s3://b/p",
        "lazarette.copies": "/mnt/a; /mnt/b",
        "lazarette.consistency": "postgres",
        "lazarette.drill.command": "true",
        "lazarette.something-else": "of another part",
        "other": "x",
    }
    policy = parse_labels("db", labels, Origin.VOLUME_LABELS, "volume db")
    assert policy is not None
    assert str(policy.keep) == "hourly=24,daily=7,weekly=4,monthly=12,floor=3"
    assert policy.copies == ("/mnt/a", "/mnt/b")
    assert policy.targets.mean(Volume("db"))
    assert not policy.targets.mean(Volume("db2"))
    assert parse_labels("db", {}, Origin.VOLUME_LABELS, "") is None
    assert parse_labels("db", {"lazarette.backup": "off"}, Origin.VOLUME_LABELS, "") is None


def word(name: str, origin: Origin = Origin.SET, **words: object) -> Policy:
    return parse_words(name, {"schedule": "@daily", **words}, origin)


def test_which_policy_counts() -> None:
    file = word("file", Origin.FILE, volumes=["*"])
    ours = word("set", project="shop")
    gold = word("gold", Origin.FILE, labels=["tier=gold", "owner"])
    both = [file, ours]

    def name(volume: Volume, policies: list[Policy] = both) -> str:
        found = applying(policies, volume)
        return f"{found.name} {found.origin.name}" if found else "nothing"

    compose = {"com.docker.compose.project": "shop"}
    by_label = {"lazarette.backup": "every 10s"}
    assert name(Volume("a")) == "file FILE"
    assert name(Volume("a", compose)) == "set SET"
    assert name(Volume("a", {**compose, **by_label})) == "a VOLUME_LABELS"
    assert name(Volume("a", compose, [{}, by_label])) == "a CONTAINER_LABELS"
    assert name(Volume("a", {"lazarette.backup": "off"}, [by_label])) == "nothing"
    assert name(Volume("a"), [ours]) == "nothing"
    assert name(Volume("a", {"tier": "gold", "owner": "x"}), [gold]) == "gold FILE"
    assert name(Volume("a", {"tier": "gold"}), [gold]) == "nothing"


def test_short_words_for_consistency() -> None:
    assert word("a", volumes=["a"]).consistency == ConsistencyRule()
    assert word("a", volumes=["a"], consistency="stop").consistency.mode is HoldMode.STOP
    assert word("a", volumes=["a"], consistency="application").consistency.profile == "auto"


def test_durations_and_sizes() -> None:
    assert parse_duration("1h30m") == 5400 * NANOSECONDS
    assert format_duration(parse_duration("8d2h")) == "8d2h"
    assert parse_size("10M") == 10 << 20
    assert parse_size("500k") == 500 << 10
    assert parse_size("3 GiB".replace(" ", "")) == 3 << 30
    for wrong in ("", "5", "0s", "1x", "-1s", "999999y"):
        with pytest.raises(InvalidArgument):
            parse_duration(wrong)
    for wrong in ("", "0", "x", "-1K"):
        with pytest.raises(InvalidArgument):
            parse_size(wrong)
