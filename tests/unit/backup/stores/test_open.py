from __future__ import annotations

from pathlib import Path

import pytest

from lazarette.backup.stores.contract import WrongStore
from lazarette.backup.stores.open import (
    create_place,
    credentials_from,
    of_now,
    open_store,
    parse_url,
)
from lazarette.backup.stores.s3place import Credentials, S3Place
from lazarette.storage.clock import NANOSECONDS, FakeClock
from lazarette.storage.errors import InvalidArgument


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("/mnt/x/../repo", "/mnt/repo"),
        ("file:///mnt/a%20b", "/mnt/a b"),
        ("s3://b", S3Place("b", virtual=True)),
        ("s3://b/p/q/", S3Place("b", "p/q/", virtual=True)),
        (
            "s3://b/p?endpoint=http://127.0.0.1:8333/&region=eu-1",
            S3Place("b", "p/", "http://127.0.0.1:8333", "eu-1"),
        ),
        ("s3://b?endpoint=https://h&style=virtual", S3Place("b", "", "https://h", virtual=True)),
        (
            "s3://b/p?endpoint=https://h&as-of=2026-01-31T12:00:00.5Z",
            S3Place("b", "p/", "https://h", as_of_ns=1769860800500000000),
        ),
    ],
)
def test_urls(url: str, place: str | S3Place) -> None:
    assert parse_url(url) == place
    if isinstance(place, S3Place):
        assert parse_url(place.url) == place


def test_the_key_of_a_store_is_that_of_its_past() -> None:
    assert of_now("s3://b/p?as-of=2026-01-31T12:00:00Z") == "s3://b/p"
    assert of_now("s3://b?endpoint=h&as-of=x&region=y") == "s3://b?endpoint=h&region=y"
    assert of_now("/mnt/a") == "/mnt/a"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x/y",
        "s3://",
        "s3:///p",
        "s3://key:secret@b/p",
        "s3://b?endpoint=ftp://h",
        "s3://b?endpoint=http://a:b@h",
        "s3://b?secret=x",
        "s3://b?style=odd",
        "s3://b?as-of=yesterday",
        "s3://b?as-of=2026-01-31T12:00:00",
        "s3://b/a/../c",
        "file://host/x",
        "file:relative",
        "relative",
        "./relative",
        "../relative",
        "~/relative",
        "http:/relative",
        "/mnt/\0",
        "file:///mnt/%00",
        "s3:bucket",
    ],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        parse_url(url)
    assert "secret@" not in wrong.value.message


@pytest.mark.parametrize("url", ["", "relative", "./relative", "a/b", "file:relative"])
def test_nothing_is_made_in_the_working_directory(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (create_place, open_store):
        with pytest.raises(InvalidArgument):
            use(url)
    assert list(tmp_path.iterdir()) == []


def test_folders(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/a/b"
    with pytest.raises(WrongStore):
        open_store(url)
    for _ in range(2):
        made = create_place(url)
        assert made.url == url
        made.close()
    open_store(url).close()


def test_credentials() -> None:
    assert credentials_from({}) is None
    assert credentials_from({"AWS_ACCESS_KEY_ID": "a"}) is None
    found = credentials_from(
        {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_SESSION_TOKEN": "t"}
    )
    assert found == Credentials("a", "hidden", "t")
    assert "hidden" not in repr(found)


def test_rates(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(str(tmp_path), clock=clock, upload=lambda: 1000)
    store.put("x", bytes(5000))
    assert clock.monotonic_ns() >= 4 * NANOSECONDS
    store.close()
