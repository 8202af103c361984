"""In what S3 servers differ: how bodies are guarded, permission asked, and ETags written."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from enum import Enum

from botocore.awsrequest import AWSRequest

from lazarette.storage.clock import NANOSECONDS

_AT_ONCE = 256 << 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Integrity(Enum):
    """How an upload is guarded on its way, the cheapest first."""

    CRC32 = "x-amz-checksum-crc32"
    MD5 = "content-md5"
    SIGNED = "signed payload"

    @property
    def and_dearer(self) -> tuple[Integrity, ...]:
        """This one, and what to try in turn with a server that refuses it."""
        order = tuple(Integrity)
        return order[order.index(self) :]


def send_small_bodies_at_once(request: AWSRequest, **_: object) -> None:
    """Ask permission (``Expect: 100-continue``) only where it may save sending a pack.

    boto3 always asks, and loses a second when a refusal comes instead of the permission.
    """
    body = request.data
    if isinstance(body, io.BytesIO) and body.getbuffer().nbytes <= _AT_ONCE:
        del request.headers["Expect"]


def quote(tag: str, quoted: bool) -> str:
    """An ETag as a server wants it in a condition."""
    return f'"{tag}"' if quoted else tag


def unquote(tag: str) -> str:
    """An ETag without its quotes."""
    return tag.strip('"')


def moment_ns(moment: datetime) -> int:
    """An aware datetime as nanoseconds since the epoch."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * NANOSECONDS + since.microseconds * 1000
