"""What networks, servers and clocks do to an S3 store, each ending well or in one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
from tests.support.proxy import FaultProxy, Rule
from tests.support.s3 import S3Server, s3_bucket, s3_server  # noqa: F401

from lazarette.backup.stores._s3dialect import Integrity
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobNotFound,
    BlobStore,
    DamagedBlob,
    StoreUnavailable,
    TagMismatch,
    WrongStore,
)
from lazarette.backup.stores.limit import LimitedStore
from lazarette.backup.stores.open import create_place, open_store, parse_url
from lazarette.backup.stores.retry import RetryPolicy, RetryStore
from lazarette.backup.stores.s3 import S3Store
from lazarette.backup.stores.s3place import Credentials, S3Place
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import Forbidden, LazaretteError, NoSpace, Unauthenticated

QUICK = RetryPolicy(attempts=5, first_pause=0.01, longest_pause=0.05, deadline=20)
MANY = 1_000_000


class Setup:
    """A store behind a proxy, and the same bucket without it."""

    def __init__(self, server: S3Server, bucket: str, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.bare = S3Store(
            S3Place(bucket, "p/", proxy.endpoint), server.credentials, read_timeout=1.5
        )
        self.failures: list[Exception] = []
        self.store = RetryStore(self.bare, SystemClock(), QUICK, on_retry=self.failures.append)
        self.behind: BlobStore = open_store(server.url(bucket, "p"), server.credentials)

    def close(self) -> None:
        self.store.close()
        self.behind.close()


@pytest.fixture
def setup(s3_server: S3Server, s3_bucket: str) -> Iterator[Setup]:  # noqa: F811
    with FaultProxy(s3_server.endpoint) as proxy:
        made = Setup(s3_server, s3_bucket, proxy)
        yield made
        made.close()


@pytest.mark.parametrize(
    "rule",
    [
        Rule("reply", b"PUT ", status=503, code="SlowDown", times=2),
        Rule("reply", b"PUT ", status=429, code="TooManyRequests", retry_after=0),
        Rule("reply", b"PUT ", status=500, code="InternalError"),
        Rule("reply", b"PUT ", status=409, code="OperationAborted"),
        Rule("reset_request", b"PUT ", after=100_000),
        Rule("reset_request", b"PUT ", after=0),
        Rule("lost_reply", b"PUT "),
        Rule("hang", b"PUT ", seconds=3),
    ],
    ids=lambda rule: f"{rule.kind}-{rule.status}-{rule.after}",
)
def test_uploads_survive(setup: Setup, rule: Rule) -> None:
    setup.proxy.plan(replace(rule))
    data = os.urandom(1_000_000)
    setup.store.put("x", data)
    assert setup.behind.get("x") == data
    assert [info.name for info in setup.behind.list()] == ["x"]
    assert all(isinstance(failure, StoreUnavailable) for failure in setup.failures)
    assert len(setup.failures) == rule.times


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("reply", b"GET ", status=503, code="SlowDown", times=2),
        Rule("reset_response", b"GET ", after=50_000),
        Rule("reset_response", b"GET ", after=0),
        Rule("truncate", b"GET ", after=70_000),
        Rule("hang", b"GET ", seconds=3),
    ],
    ids=lambda rule: f"{rule.kind}-{rule.after}",
)
def test_downloads_survive(setup: Setup, rule: Rule, ranged: bool) -> None:
    data = os.urandom(200_000)
    setup.behind.put("x", data)
    setup.proxy.plan(replace(rule))
    if ranged:
        assert setup.store.get("x", 1000, 150_000) == data[1000:151_000]
    else:
        assert setup.store.get("x") == data
    assert len(setup.failures) == rule.times


def test_a_flipped_bit_is_read_again(setup: Setup) -> None:
    data = os.urandom(200_000)
    setup.behind.put("x", data)
    setup.proxy.plan(Rule("flip", b"GET ", after=1000))
    assert setup.store.get("x") == data
    setup.proxy.plan(Rule("flip", b"GET ", after=1000, times=2))
    with pytest.raises(DamagedBlob):
        setup.store.get("x")


def test_lists_survive(setup: Setup) -> None:
    names = [f"{number:03}" for number in range(20)]
    for name in names:
        setup.behind.put(name, b"x")
    setup.proxy.plan(Rule("reset_response", b"list-type=2", after=10))
    setup.proxy.plan(Rule("reply", b"list-type=2"))
    assert [info.name for info in setup.store.list()] == names


def test_create_whose_answer_is_lost_has_won(setup: Setup) -> None:
    setup.proxy.plan(Rule("lost_reply", b"PUT "))
    tag = setup.store.put("x", b"mine", if_absent=True)
    assert setup.behind.stat("x").tag == tag
    with pytest.raises(AlreadyThere):
        setup.store.put("x", b"mine", if_absent=True)


def test_create_lost_while_the_store_is_away_has_won(setup: Setup) -> None:
    """The read-back fails as well; the repetition finds the object and knows its bytes."""
    setup.proxy.plan(Rule("lost_reply", b"PUT "))
    setup.proxy.plan(Rule("reply", b"HEAD ", status=500, code="InternalError"))
    tag = setup.store.put("x", b"mine", if_absent=True)
    assert setup.behind.stat("x").tag == tag


def test_replace_whose_answer_is_lost_has_won(setup: Setup) -> None:
    old = setup.behind.put("x", b"old")
    setup.proxy.plan(Rule("lost_reply", b"PUT "))
    new = setup.store.replace("x", b"new", old)
    assert setup.behind.get("x") == b"new"
    assert setup.behind.stat("x").tag == new
    with pytest.raises(TagMismatch):
        setup.store.replace("x", b"newer", old)


def test_a_create_that_lost_stays_lost(setup: Setup) -> None:
    """Another's object appears while our first request is refused."""
    setup.proxy.plan(Rule("reply", b"PUT "))
    setup.behind.put("x", b"theirs")
    with pytest.raises(AlreadyThere):
        setup.store.put("x", b"mine", if_absent=True)
    assert setup.behind.get("x") == b"theirs"


@pytest.mark.parametrize("code", ["NotImplemented", "SignatureDoesNotMatch", "InvalidArgument"])
def test_servers_that_refuse_checksum_headers(setup: Setup, code: str) -> None:
    status = 501 if code == "NotImplemented" else 403
    refused = setup.proxy.plan(
        Rule("reply", b"x-amz-checksum-", status=status, code=code, times=MANY)
    )
    data = os.urandom(100_000)
    tag = setup.store.put("x", data)
    assert setup.bare.integrity is Integrity.MD5
    setup.store.put("y", data, if_absent=True)
    setup.store.replace("x", data + b"!", tag)
    assert setup.behind.get("x") == data + b"!"
    assert refused.fired == 1


def test_servers_that_want_signed_payloads(setup: Setup) -> None:
    setup.proxy.plan(Rule("reply", b"UNSIGNED-PAYLOAD", status=400, code="InvalidRequest", times=2))
    setup.store.put("x", b"data")
    assert setup.bare.integrity is Integrity.SIGNED
    assert setup.behind.get("x") == b"data"


def test_servers_without_conditional_writes(setup: Setup) -> None:
    setup.proxy.plan(Rule("reply", b"f-none-match", status=501, code="NotImplemented", times=MANY))
    careful = S3Store(setup.bare.place, setup.bare._credentials, conditional=False)
    careful.put("x", b"1", if_absent=True)
    with pytest.raises(AlreadyThere):
        careful.put("x", b"2", if_absent=True)
    tag = careful.stat("x").tag
    careful.replace("x", b"3", tag)
    with pytest.raises(TagMismatch):
        careful.replace("x", b"4", tag)
    careful.close()


def test_two_requests_at_a_time(s3_server: S3Server, s3_bucket: str) -> None:  # noqa: F811
    """R2's kind: more than two uploads at once are told to slow down (A18)."""
    with FaultProxy(s3_server.endpoint, max_parallel=2) as proxy:
        bare = S3Store(S3Place(s3_bucket, "", proxy.endpoint), s3_server.credentials)
        limited = LimitedStore(bare, SystemClock(), parallel=16)
        store = RetryStore(limited, SystemClock(), msgspec.structs.replace(QUICK, attempts=20))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda number: store.put(f"{number}", os.urandom(50_000)), range(60)))
        assert len(list(store.list())) == 60
        assert limited.parallel < 8
        assert not any("uploads" in request for request in proxy.requests)
        store.close()


@pytest.mark.parametrize(
    ("status", "code", "due"),
    [
        (507, "InsufficientStorage", NoSpace),
        (403, "QuotaExceeded", NoSpace),
        (403, "AccessDenied", Forbidden),
        (403, "RequestTimeTooSkewed", Unauthenticated),
        (400, "ExpiredToken", Unauthenticated),
        (404, "NoSuchBucket", WrongStore),
    ],
)
def test_what_another_try_cannot_help(
    setup: Setup, status: int, code: str, due: type[LazaretteError]
) -> None:
    rule = setup.proxy.plan(Rule("reply", b"PUT ", status=status, code=code, times=MANY))
    with pytest.raises(due) as failed:
        setup.store.put("x", b"data")
    assert rule.fired == 1
    assert failed.value.hint
    assert "\n" not in failed.value.message


def test_a_store_that_stays_away(setup: Setup) -> None:
    rule = setup.proxy.plan(Rule("reply", b"PUT ", times=MANY))
    with pytest.raises(StoreUnavailable):
        setup.store.put("x", b"data")
    assert rule.fired == QUICK.attempts


def test_nobody_listens() -> None:
    store = S3Store(S3Place("b", "", "http://127.0.0.1:9"), Credentials("a", "b"))
    with pytest.raises(StoreUnavailable) as failed:
        store.get("x")
    assert failed.value.exit_code == 30
    store.close()


def test_wrong_bucket_and_credentials(s3_server: S3Server) -> None:  # noqa: F811
    missing = open_store(s3_server.url("no-such-bucket"), s3_server.credentials)
    for action in (
        lambda: missing.put("x", b""),
        lambda: missing.get("x"),
        lambda: missing.stat("x"),
        lambda: list(missing.list()),
    ):
        with pytest.raises(WrongStore):
            action()
    missing.close()
    for wrong in (Credentials("testaccess", "x" * 20), Credentials("nobody", "x" * 20)):
        store = open_store(s3_server.url("no-such-bucket"), wrong)
        for action in (lambda s=store: s.put("x", b""), lambda s=store: list(s.list())):
            with pytest.raises((Unauthenticated, Forbidden)):
                action()
        store.close()


def test_places_are_made_once(s3_server: S3Server) -> None:  # noqa: F811
    url = s3_server.url("laz-made-by-test", "deep/prefix")
    for _ in range(2):
        store = create_place(url, s3_server.credentials)
        store.put("x", b"1")
        assert store.url == url
        with pytest.raises(BlobNotFound):
            store.get("y")
        store.close()
    s3_server.remove_bucket("laz-made-by-test")
    place = parse_url(url)
    assert isinstance(place, S3Place)
    assert place.prefix == "deep/prefix/"
