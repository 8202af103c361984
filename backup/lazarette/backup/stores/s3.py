"""A store in a bucket of any S3 server.

Whole objects go up with one ``PutObject``: no multipart upload, so none of the servers'
rules about parts can bite.  What differs between servers is learnt from their answers and
remembered for the life of the store:

*Integrity of an upload* (:class:`Integrity`).  The payload is not signed (hashing it with
SHA-256 costs three times the upload's CPU); a CRC-32 header guards it.  A server that
refuses the header, or an unsigned payload, gets Content-MD5, then a signed payload.  Each
object carries its CRC-32 in its metadata too, checked whenever it is read whole: a server
that accepts the header and does not verify it is found out then.  Whether bytes are the
right ones is in the end decided by the engine's own hashes.

*Quotes around If-Match*.  Ceph compares literally with an unquoted tag, others want the
quotes of the standard.  A mismatch although the tag is still the same switches over.

*Conditional writes* (S2-S4).  A lost reply to one makes its repetition fail with 412, by
our own hand or a proxy's.  Every conditional write carries a token in the object's
metadata; after a 412 or no answer the token is read back, and if it is ours, we won.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import secrets
import threading
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from lazarette.backup.stores._s3body import body_of
from lazarette.backup.stores._s3dialect import (
    Integrity,
    moment_ns,
    quote,
    send_small_bodies_at_once,
    unquote,
)
from lazarette.backup.stores._s3errors import DIALECT_CODES, Answer, translate
from lazarette.backup.stores._s3models import new_session
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobInfo,
    BlobNotFound,
    Buffer,
    DamagedBlob,
    ShortBlob,
    StoreCapabilities,
    StoreRefused,
    StoreUnavailable,
    TagMismatch,
    WrongStore,
    check_name,
    is_name,
)
from lazarette.backup.stores.s3place import Credentials, S3Place
from lazarette.storage.errors import LazaretteError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        HeadObjectOutputTypeDef,
        ListObjectsV2RequestTypeDef,
        PutObjectRequestTypeDef,
    )

_CRC = "lazarette-crc32"
_OWNER = "lazarette-owner"
FAILURES = (ClientError, BotoCoreError, HTTPError, OSError)


class _Condition(TypedDict, total=False):
    """The condition of a write, as boto3 calls it."""

    IfNoneMatch: str
    IfMatch: str


class S3Store:
    """Objects of a bucket whose keys begin with a prefix.

    One attempt an operation: wrap it in :class:`RetryStore`, as ``open_store`` does.

    Args:
        place: where.
        credentials: the key; None takes what boto3 finds (environment, ``~/.aws``).
        conditional: whether the server's conditional writes were seen to be exact.
        connect_timeout: seconds.
        read_timeout: seconds without a byte after which a request counts as lost.
    """

    def __init__(
        self,
        place: S3Place,
        credentials: Credentials | None = None,
        *,
        conditional: bool = True,
        connect_timeout: float = 10.0,
        read_timeout: float = 60.0,
    ) -> None:
        self.place = place
        self._credentials = credentials
        self._capabilities = StoreCapabilities(conditional=conditional, distant=True)
        self._timeouts = (connect_timeout, read_timeout)
        self._integrity = Integrity.CRC32
        self._quoted = True
        self._conditional_refused = False
        self._bucket_seen = False
        self._lock = threading.Lock()
        self._clients: dict[bool, S3Client] = {}

    @property
    def url(self) -> str:
        """See :attr:`BlobStore.url`."""
        return self.place.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """See :attr:`BlobStore.capabilities`."""
        return self._capabilities

    @property
    def integrity(self) -> Integrity:
        """How uploads are guarded, as far as learnt."""
        return self._integrity

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        check_name(name)
        if not if_absent:
            return self._put(name, data, {}, "")
        if self._conditional_refused:
            return self._put_looking_first(name, data)
        owner = secrets.token_hex(16)
        try:
            return self._put(name, data, {"IfNoneMatch": "*"}, owner)
        except (TagMismatch, StoreUnavailable) as doubt:
            return self._settle(name, owner, doubt)
        except StoreRefused:
            if self._capabilities.conditional:
                raise
            self._conditional_refused = True
            return self._put_looking_first(name, data)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        check_name(name)
        owner = secrets.token_hex(16)
        if self._conditional_refused:
            return self._replace_looking_first(name, data, tag)
        quoted = self._quoted
        try:
            return self._put(name, data, {"IfMatch": quote(tag, quoted)}, owner)
        except StoreUnavailable as doubt:
            return self._settle(name, owner, doubt)
        except BlobNotFound as gone:
            raise TagMismatch(f"object {name} in {self.url} is gone") from gone
        except StoreRefused:
            if self._capabilities.conditional:
                raise
            self._conditional_refused = True
            return self._replace_looking_first(name, data, tag)
        except TagMismatch as doubt:
            found = self._head(name)
            if found is not None and found["Metadata"].get(_OWNER) == owner:
                return unquote(found["ETag"])
            if found is None or unquote(found["ETag"]) != tag:
                raise TagMismatch(f"object {name} in {self.url} changed meanwhile") from doubt
        other = self._put(name, data, {"IfMatch": quote(tag, not quoted)}, owner)
        self._quoted = not quoted
        return other

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        check_name(name)
        if length == 0:
            if self.stat(name).size < offset:
                raise ShortBlob(f"object {name} in {self.url} ends before byte {offset}")
            return b""
        ranged = offset > 0 or length is not None
        request: GetObjectRequestTypeDef = {"Bucket": self.place.bucket, "Key": self.key(name)}
        if ranged:
            end = "" if length is None else str(offset + length - 1)
            request["Range"] = f"bytes={offset}-{end}"
        try:
            answer = self.client().get_object(**request)
            data = self._body(answer)
        except FAILURES as failed:
            raise self._translated(failed, "read", name) from failed
        self._bucket_seen = True
        if ranged and answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
            data = data[offset:] if length is None else data[offset : offset + length]
        if length is not None and len(data) != length:
            raise ShortBlob(f"object {name} in {self.url} ends before byte {offset + length}")
        if not ranged:
            self._verify(name, data, answer["Metadata"].get(_CRC))
        return data

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        check_name(name)
        found = self._head(name)
        if found is None:
            raise BlobNotFound(f"no object {name} in {self.url}")
        return BlobInfo(
            name, found["ContentLength"], unquote(found["ETag"]), moment_ns(found["LastModified"])
        )

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`."""
        token: str | None = None
        skip = len(self.place.prefix)
        while True:
            request: ListObjectsV2RequestTypeDef = {
                "Bucket": self.place.bucket,
                "Prefix": self.place.prefix + prefix,
            }
            if token:
                request["ContinuationToken"] = token
            try:
                page = self.client().list_objects_v2(**request)
            except FAILURES as failed:
                raise self._translated(failed, "list", prefix or "objects") from failed
            self._bucket_seen = True
            for entry in page.get("Contents", []):
                name = entry["Key"][skip:]
                if is_name(name):
                    modified = moment_ns(entry["LastModified"])
                    yield BlobInfo(name, entry["Size"], unquote(entry["ETag"]), modified)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not token:
                raise StoreUnavailable(f"{self.url} cut a list short without saying how to go on")

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        check_name(name)
        try:
            self.client().delete_object(Bucket=self.place.bucket, Key=self.key(name))
        except FAILURES as failed:
            error = self._translated(failed, "delete", name)
            if not isinstance(error, BlobNotFound):
                raise error from failed
        self._bucket_seen = True

    def _said(self, refused: ClientError) -> ClientError:
        """Why HEAD was refused: its answer has no body that could say, that of a GET has."""
        try:
            self.client().list_objects_v2(Bucket=self.place.bucket, MaxKeys=1)
        except ClientError as told:
            return told
        return refused

    def create_bucket(self) -> bool:
        """Make the bucket; False when it was there.

        Raises:
            Forbidden: the key may not, or the bucket is somebody else's.
        """
        client = self.client()
        try:
            client.head_bucket(Bucket=self.place.bucket)
        except ClientError as failed:
            if Answer.of(failed).status != 404:
                raise self._translated(self._said(failed), "open", "the bucket") from failed
        except FAILURES as failed:
            raise self._translated(failed, "open", "the bucket") from failed
        else:
            return False
        try:
            if self.place.endpoint is None and self.place.region != "us-east-1":
                client.create_bucket(
                    Bucket=self.place.bucket,
                    CreateBucketConfiguration={
                        "LocationConstraint": self.place.region  # type: ignore[typeddict-item]
                    },
                )
            else:
                client.create_bucket(Bucket=self.place.bucket)
        except ClientError as failed:
            if Answer.of(failed).code == "BucketAlreadyOwnedByYou":
                return False
            raise self._translated(failed, "make", "the bucket") from failed
        except FAILURES as failed:
            raise self._translated(failed, "make", "the bucket") from failed
        return True

    def close(self) -> None:
        """See :meth:`BlobStore.close`."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def client(self, *, signed: bool = False) -> S3Client:
        """The boto3 client; for the modules beside this one."""
        with self._lock:
            client = self._clients.get(signed)
        if client is not None:
            return client
        with _session_lock, self._lock:
            if signed not in self._clients:
                self._clients[signed] = self._connect(signed)
            return self._clients[signed]

    def _connect(self, signed: bool) -> S3Client:
        place, key = self.place, self._credentials
        connect, read = self._timeouts
        config = Config(
            signature_version="s3v4",
            region_name=place.region,
            connect_timeout=connect,
            read_timeout=read,
            max_pool_connections=32,
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={
                "addressing_style": "virtual" if place.virtual else "path",
                "payload_signing_enabled": signed,
            },
            tcp_keepalive=True,
        )
        try:
            session = new_session() if key is None else _session()
            client = session.client(
                "s3",
                endpoint_url=place.endpoint,
                aws_access_key_id=key.access_key if key else None,
                aws_secret_access_key=key.secret_key if key else None,
                aws_session_token=key.session_token if key else None,
                config=config,
            )
        except (BotoCoreError, ValueError) as failed:
            raise StoreRefused(f"cannot use {place.url}: {failed}") from failed
        client.meta.events.register("before-sign.s3.PutObject", send_small_bodies_at_once)
        return client

    def key(self, name: str) -> str:
        """The object's key in the bucket."""
        return self.place.prefix + name

    def _put(self, name: str, data: Buffer, condition: _Condition, owner: str) -> str:
        """One PutObject, in the cheapest dialect the server has not yet refused."""
        first: ClientError | None = None
        for integrity in self._integrity.and_dearer:
            try:
                tag = self._put_guarded(name, data, condition, owner, integrity)
            except ClientError as failed:
                answer = Answer.of(failed)
                first = first or failed
                if answer.code not in DIALECT_CODES and answer.status != 501:
                    raise self._translated(failed, "write", name) from failed
            except FAILURES as failed:
                raise self._translated(failed, "write", name) from failed
            else:
                self._integrity = integrity
                self._bucket_seen = True
                return tag
        assert first is not None
        raise self._translated(first, "write", name) from first

    def _put_guarded(
        self, name: str, data: Buffer, condition: _Condition, owner: str, integrity: Integrity
    ) -> str:
        crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        request: PutObjectRequestTypeDef = {
            "Bucket": self.place.bucket,
            "Key": self.key(name),
            "Body": body_of(data),
            "Metadata": {_CRC: crc, _OWNER: owner} if owner else {_CRC: crc},
        }
        if "IfNoneMatch" in condition:
            request["IfNoneMatch"] = condition["IfNoneMatch"]
        if "IfMatch" in condition:
            request["IfMatch"] = condition["IfMatch"]
        if integrity is Integrity.CRC32:
            request["ChecksumCRC32"] = crc
        elif integrity is Integrity.MD5:
            digest = hashlib.md5(data, usedforsecurity=False).digest()
            request["ContentMD5"] = base64.b64encode(digest).decode()
        answer = self.client(signed=integrity is Integrity.SIGNED).put_object(**request)
        return unquote(answer["ETag"])

    def _settle(self, name: str, owner: str, doubt: TagMismatch | StoreUnavailable) -> str:
        """Find out who won a conditional write (S4)."""
        found = self._head(name)
        if found is not None and found["Metadata"].get(_OWNER) == owner:
            return unquote(found["ETag"])
        if isinstance(doubt, TagMismatch):
            if found is None:
                raise StoreUnavailable(
                    f"{self.url} says {name} exists and does not show it"
                ) from doubt
            raise AlreadyThere(f"object {name} exists in {self.url}") from doubt
        raise doubt

    def _put_looking_first(self, name: str, data: Buffer) -> str:
        """``if_absent`` on a server without conditional writes: not exact under a race."""
        if self._head(name) is not None:
            raise AlreadyThere(f"object {name} exists in {self.url}")
        return self._put(name, data, {}, "")

    def _replace_looking_first(self, name: str, data: Buffer, tag: str) -> str:
        found = self._head(name)
        if found is None or unquote(found["ETag"]) != tag:
            raise TagMismatch(f"object {name} in {self.url} changed meanwhile")
        return self._put(name, data, {}, "")

    def _head(self, name: str) -> HeadObjectOutputTypeDef | None:
        try:
            found = self.client().head_object(Bucket=self.place.bucket, Key=self.key(name))
        except FAILURES as failed:
            error = self._translated(failed, "look up", name)
            if isinstance(error, BlobNotFound):
                self._check_bucket()
                return None
            raise error from failed
        self._bucket_seen = True
        return found

    def _check_bucket(self) -> None:
        """A HEAD's 404 does not say whether the key or the bucket is missing."""
        if self._bucket_seen:
            return
        try:
            self.client().head_bucket(Bucket=self.place.bucket)
        except ClientError as failed:
            if Answer.of(failed).status == 404:
                raise WrongStore(
                    f"bucket {self.place.bucket} does not exist at {self.url}",
                    hint="check its name, or make it with laz repo init",
                ) from failed
            raise self._translated(failed, "open", "the bucket") from failed
        except FAILURES as failed:
            raise self._translated(failed, "open", "the bucket") from failed
        self._bucket_seen = True

    def _body(self, answer: GetObjectOutputTypeDef) -> bytes:
        """The body, of which botocore checks the length while it is read."""
        stream = answer["Body"]
        try:
            return stream.read()
        finally:
            stream.close()

    def _verify(self, name: str, data: bytes, crc: str | None) -> None:
        if crc is None:
            return
        if base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode() != crc:
            raise DamagedBlob(
                f"object {name} in {self.url} is not what was written (checksum)",
                hint="run laz repo check",
            )

    def _translated(self, failed: Exception, operation: str, name: str) -> LazaretteError:
        return translate(failed, operation, f"{name} in {self.url}")


_session_lock = threading.Lock()


@functools.cache
def _session() -> boto3.session.Session:
    """One session for all clients with a key of their own: making another costs 0.1 s."""
    return new_session()
