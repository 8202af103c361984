"""An attacker with our key deletes and overwrites everything; the repository comes back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from botocore.exceptions import ClientError
from tests.support.s3 import S3Server, s3_bucket, s3_server  # noqa: F401

from lazarette.backup.stores.contract import BlobNotFound, ReadOnlyStore, ShortBlob
from lazarette.backup.stores.s3 import S3Store
from lazarette.backup.stores.s3lock import LockedS3Store, has_object_lock
from lazarette.backup.stores.s3place import S3Place
from lazarette.storage.clock import NANOSECONDS


@pytest.fixture
def locked(s3_server: S3Server) -> Iterator[LockedS3Store]:  # noqa: F811
    place = S3Place(f"laz-{secrets.token_hex(6)}", "repo/", s3_server.endpoint)
    store = LockedS3Store(place, s3_server.credentials)
    store.create_locked_bucket(1)
    yield store
    with closing(s3_server.client()) as client:
        for page in client.get_paginator("list_object_versions").paginate(Bucket=place.bucket):
            for entry in page.get("Versions", []) + page.get("DeleteMarkers", []):
                client.delete_object(
                    Bucket=place.bucket,
                    Key=entry["Key"],
                    VersionId=entry["VersionId"],
                    BypassGovernanceRetention=True,
                )
        client.delete_bucket(Bucket=place.bucket)
    store.close()


def test_what_was_deleted_and_overwritten_comes_back(
    s3_server: S3Server,  # noqa: F811
    locked: LockedS3Store,
) -> None:
    assert has_object_lock(locked)
    assert locked.capabilities.versions
    locked.put("gone", b"deleted before")
    locked.put("packs/a", b"precious")
    time.sleep(1.1)
    locked.delete("gone")
    locked.put("packs/b", b"also")
    before = locked.stat("packs/b").modified_ns
    time.sleep(2.1)
    # the attack
    locked.delete("packs/a")
    locked.put("packs/b", b"encrypted by somebody")
    locked.put("ransom.txt", b"pay")
    with closing(s3_server.client()) as client:
        found = client.list_object_versions(Bucket=locked.place.bucket, Prefix="repo/packs/a")
        [version] = [each["VersionId"] for each in found["Versions"]]
        with pytest.raises(ClientError):
            client.delete_object(Bucket=locked.place.bucket, Key="repo/packs/a", VersionId=version)
    with pytest.raises(BlobNotFound):
        locked.get("packs/a")
    # the past
    past = locked.as_of(before + NANOSECONDS)
    assert [info.name for info in past.list()] == ["packs/a", "packs/b"]
    assert past.get("packs/a") == b"precious"
    assert past.get("packs/b", 1, 2) == b"ls"
    assert past.get("packs/b", 4) == b""
    assert past.stat("packs/b").size == 4
    with pytest.raises(ShortBlob):
        past.get("packs/b", 2, 5)
    with pytest.raises(BlobNotFound):
        past.get("ransom.txt")
    for change in (
        lambda: past.put("x", b""),
        lambda: past.replace("x", b"", ""),
        lambda: past.delete("x"),
    ):
        with pytest.raises(ReadOnlyStore):
            change()


def test_locks_are_only_extended(locked: LockedS3Store) -> None:
    locked.put("packs/a", b"x")
    now = locked.stat("packs/a").modified_ns
    day = 86_400 * NANOSECONDS
    assert abs(locked.locked_until("packs/a") - now - day) < 60 * NANOSECONDS
    locked.lock("packs/a", now + 5 * day)
    until = locked.locked_until("packs/a")
    assert abs(until - now - 5 * day) <= NANOSECONDS
    locked.lock("packs/a", now + day)
    assert locked.locked_until("packs/a") == until
    with pytest.raises(BlobNotFound):
        locked.lock("none", now)


def test_other_buckets_have_no_lock(s3_server: S3Server, s3_bucket: str) -> None:  # noqa: F811
    store = S3Store(S3Place(s3_bucket, "", s3_server.endpoint), s3_server.credentials)
    assert not has_object_lock(store)
    store.close()
