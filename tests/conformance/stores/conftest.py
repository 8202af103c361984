"""Every store and decorator, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.s3 import S3Server, s3_server  # noqa: F401

from lazarette.backup.stores.contract import BlobStore
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.open import open_store
from lazarette.backup.stores.retry import RetryStore
from lazarette.storage.clock import SystemClock

KINDS = ["local", "retry-local", "s3"]


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
        opened = open_store(server.url(bucket, "some/prefix"), server.credentials)
    else:
        opened = LocalStore(str(tmp_path))
        if kind == "retry-local":
            opened = RetryStore(opened, SystemClock())
    yield opened
    opened.close()
