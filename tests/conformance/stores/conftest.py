"""Every store and decorator, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.s3 import S3Server, s3_server  # noqa: F401

from lazarette.backup.stores.cache import CachedStore
from lazarette.backup.stores.contract import BlobStore
from lazarette.backup.stores.faults import Fault, FaultKind, FaultStore
from lazarette.backup.stores.limit import LimitedStore
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.open import open_store
from lazarette.backup.stores.retry import RetryPolicy, RetryStore
from lazarette.storage.clock import SystemClock

WRAPPERS: dict[str, Callable[[BlobStore, Path], BlobStore]] = {
    "retry": lambda inner, _: RetryStore(inner, SystemClock()),
    "limit": lambda inner, _: LimitedStore(
        inner, SystemClock(), upload=lambda: 1 << 30, download=lambda: 1 << 30, parallel=3
    ),
    "cache": lambda inner, at: CachedStore(inner, str(at / "cache"), ["verify/"], 1 << 26),
    "faults": lambda inner, _: FaultStore(inner),
    "cached-flaky": lambda inner, at: CachedStore(
        RetryStore(FaultStore(inner, flaky()), SystemClock(), RetryPolicy(first_pause=0.0)),
        str(at / "cache"),
        ["none/"],
    ),
}
KINDS = ["local", *WRAPPERS, "s3"]


def flaky() -> list[Fault]:
    """Faults a retrying store must hide."""
    return [
        Fault(FaultKind.UNAVAILABLE, ("put", "get", "stat", "list", "delete"), skip=1, times=2),
        # not at replace: what a later one hides cannot be counted exactly (S4)
        Fault(FaultKind.LOST_REPLY, ("put", "delete"), skip=2, times=2),
        Fault(FaultKind.SLOW_DOWN, ("put", "get"), skip=5, times=2),
    ]


@pytest.fixture(scope="module")
def s3_bucket_of_module(s3_server: S3Server) -> Iterator[str]:  # noqa: F811
    name = s3_server.make_bucket()
    yield name
    s3_server.remove_bucket(name)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    kind: str = request.param
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        bucket: str = request.getfixturevalue("s3_bucket_of_module")
        opened: BlobStore = open_store(server.url(bucket, "some/prefix"), server.credentials)
    else:
        folder = tmp_path / "store"
        folder.mkdir()
        opened = LocalStore(str(folder))
        if kind in WRAPPERS:
            opened = WRAPPERS[kind](opened, tmp_path)
    yield opened
    opened.close()
