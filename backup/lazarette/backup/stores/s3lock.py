"""Object lock and old versions of an S3 bucket: what ransomware with our key cannot undo.

A bucket made with object lock keeps every version of every object, and each new version is
locked for the bucket's default time.  Maintenance extends the locks of what is still needed;
deleting only hides.  After an attack, :meth:`LockedS3Store.as_of` shows the repository as it
was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from botocore.exceptions import ClientError

from lazarette.backup.stores._s3dialect import moment_ns, unquote
from lazarette.backup.stores._s3errors import Answer, translate
from lazarette.backup.stores.contract import (
    BlobInfo,
    BlobNotFound,
    Buffer,
    ReadOnlyStore,
    ShortBlob,
    StoreCapabilities,
    check_name,
    is_name,
)
from lazarette.backup.stores.s3 import (
    FAILURES,
    S3Store,
)
from lazarette.backup.stores.s3place import Credentials, S3Place
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import LazaretteError, Unsupported

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef

LockMode = Literal["GOVERNANCE", "COMPLIANCE"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LockedS3Store(S3Store):
    """A store in a bucket with object lock; :class:`LockingStore` and :class:`VersionedStore`.

    Args:
        place: where.
        credentials: the key.
        mode: ``COMPLIANCE`` locks nobody can lift, ``GOVERNANCE`` those a special right can.
        conditional: see :class:`S3Store`.
    """

    def __init__(
        self,
        place: S3Place,
        credentials: Credentials | None = None,
        *,
        mode: LockMode = "GOVERNANCE",
        conditional: bool = True,
    ) -> None:
        super().__init__(place, credentials, conditional=conditional)
        self._mode: LockMode = mode
        self._capabilities = StoreCapabilities(
            conditional, object_lock=True, versions=True, distant=True
        )

    def create_locked_bucket(self, days: int) -> None:
        """Make the bucket with object lock and a default lock of so many days.

        Raises:
            StoreRefused: the server has no object lock.
            Conflict: the bucket exists.
        """
        client, bucket = self.client(), self.place.bucket
        try:
            client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
            client.put_object_lock_configuration(
                Bucket=bucket,
                ObjectLockConfiguration={
                    "ObjectLockEnabled": "Enabled",
                    "Rule": {"DefaultRetention": {"Mode": self._mode, "Days": days}},
                },
            )
        except FAILURES as failed:
            raise translate(failed, "make", f"the bucket of {self.url}") from failed

    def lock(self, name: str, until_ns: int) -> None:
        """See :meth:`LockingStore.lock`."""
        check_name(name)
        if self.locked_until(name) >= until_ns:
            return
        until = _EPOCH + timedelta(seconds=-(-until_ns // NANOSECONDS))
        try:
            self.client().put_object_retention(
                Bucket=self.place.bucket,
                Key=self.key(name),
                Retention={"Mode": self._mode, "RetainUntilDate": until},
            )
        except FAILURES as failed:
            raise self._translated(failed, "lock", name) from failed

    def locked_until(self, name: str) -> int:
        """See :meth:`LockingStore.locked_until`."""
        check_name(name)
        try:
            found = self.client().head_object(Bucket=self.place.bucket, Key=self.key(name))
        except FAILURES as failed:
            raise self._translated(failed, "look up", name) from failed
        until = found.get("ObjectLockRetainUntilDate")
        return 0 if until is None else moment_ns(until)

    def as_of(self, time_ns: int) -> S3AsOf:
        """See :meth:`VersionedStore.as_of`."""
        return S3AsOf(self, time_ns)


def has_object_lock(store: S3Store) -> bool:
    """Whether the bucket was made with object lock."""
    try:
        found = store.client().get_object_lock_configuration(Bucket=store.place.bucket)
    except ClientError as failed:
        answer = Answer.of(failed)
        if answer.code == "ObjectLockConfigurationNotFoundError" or answer.status in (404, 501):
            return False
        raise translate(failed, "look at", f"the lock of {store.url}") from failed
    except FAILURES as failed:
        raise translate(failed, "look at", f"the lock of {store.url}") from failed
    return found["ObjectLockConfiguration"].get("ObjectLockEnabled") == "Enabled"


@dataclass(frozen=True, slots=True)
class _Version:
    """An object as it was: what a list shows of it, and the version to read."""

    info: BlobInfo
    version: str


class S3AsOf:
    """A bucket as it was at a moment, by the server's clock; for reading only.

    Args:
        store: of the bucket.
        time_ns: the moment.  Times of versions are whole seconds on most servers: of several
            versions of one second the last counts, and of a version and a deletion the version,
            for an object too many does no harm.
    """

    def __init__(self, store: S3Store, time_ns: int) -> None:
        self._store = store
        self._time_ns = time_ns
        self._keeps_versions = False

    @property
    def url(self) -> str:
        """See :attr:`BlobStore.url`."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """See :attr:`BlobStore.capabilities`."""
        return StoreCapabilities(conditional=False, versions=True, distant=True)

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """Refuse."""
        raise self._refusal(name)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """Refuse."""
        raise self._refusal(name)

    def delete(self, name: str) -> None:
        """Refuse."""
        raise self._refusal(name)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        found = self._find(check_name(name))
        end = found.info.size if length is None else offset + length
        if offset > found.info.size or end > found.info.size:
            raise ShortBlob(f"object {name} in {self.url} ends before byte {end}")
        if offset == end:
            return b""
        request: GetObjectRequestTypeDef = {
            "Bucket": self._store.place.bucket,
            "Key": self._store.key(name),
            "VersionId": found.version,
            "Range": f"bytes={offset}-{end - 1}",
        }
        try:
            with self._store.client().get_object(**request)["Body"] as body:
                return body.read()
        except FAILURES as failed:
            raise self._translated(failed, "read", name) from failed

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        return self._find(check_name(name)).info

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`."""
        for found in self._versions(prefix):
            yield found.info

    def close(self) -> None:
        """See :meth:`BlobStore.close`."""
        self._store.close()

    def _find(self, name: str) -> _Version:
        for found in self._versions(name):
            if found.info.name == name:
                return found
        raise BlobNotFound(f"no object {name} in {self.url} at that time")

    def _versions(self, prefix: str) -> Iterator[_Version]:
        """The newest version of each object not newer than the moment, unless deleted then."""
        newest: dict[str, _Version | None] = {}
        times: dict[str, int] = {}
        for name, time_ns, version in self._all(prefix):
            if time_ns <= self._time_ns and time_ns >= times.get(name, -1):
                # of one second the list shows the newest first
                if times.get(name) != time_ns:
                    newest[name] = version
                times[name] = time_ns
        for name in sorted(newest):
            found = newest[name]
            if found is not None:
                yield found

    def _all(self, prefix: str) -> Iterator[tuple[str, int, _Version | None]]:
        """Every version and (None) every deletion; newest first for each name."""
        self._refuse_without_versions()
        skip = len(self._store.place.prefix)
        pages = self._store.client().get_paginator("list_object_versions")
        try:
            for page in pages.paginate(
                Bucket=self._store.place.bucket, Prefix=self._store.place.prefix + prefix
            ):
                for entry in page.get("Versions", []):
                    name, time_ns = entry["Key"][skip:], moment_ns(entry["LastModified"])
                    if is_name(name):
                        info = BlobInfo(name, entry["Size"], unquote(entry["ETag"]), time_ns)
                        yield name, time_ns, _Version(info, entry["VersionId"])
                for marker in page.get("DeleteMarkers", []):
                    name = marker["Key"][skip:]
                    if is_name(name):
                        yield name, moment_ns(marker["LastModified"]), None
        except FAILURES as failed:
            raise self._translated(failed, "list", "versions") from failed

    def _refuse_without_versions(self) -> None:
        """Without them what is there now would pass for the past."""
        if self._keeps_versions:
            return
        try:
            found = self._store.client().get_bucket_versioning(Bucket=self._store.place.bucket)
        except FAILURES as failed:
            raise self._translated(failed, "look up", "versions") from failed
        if found.get("Status") is None:
            raise Unsupported(
                f"{self.url} keeps no versions: nothing is known of its past",
                hint="make the repository with laz repo init --lock-days, or switch versions on",
            )
        self._keeps_versions = True

    def _refusal(self, name: str) -> ReadOnlyStore:
        return ReadOnlyStore(f"cannot change {name} in {self.url}: it is the past")

    def _translated(self, failed: Exception, operation: str, name: str) -> LazaretteError:
        return translate(failed, operation, f"{name} in {self.url}")
