"""Which bucket of which server, and who asks; needs no S3 library."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from lazarette.backup.hidden import Hidden

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Credentials(Hidden, frozen=True):
    """An access key; its printed form shows no secret."""

    access_key: str
    secret_key: str
    session_token: str | None = None


class S3Place(msgspec.Struct, frozen=True):
    """Which bucket of which server.

    Attributes:
        bucket: its name.
        prefix: what every object's key begins with: empty, or ending in ``/``.
        endpoint: the server's URL; None for AWS.
        region: e.g. ``us-east-1``.
        virtual: whether the bucket's name goes into the host name, not into the path.
        as_of_ns: the moment its versions are looked at, wall clock; 0 for now.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str = "us-east-1"
    virtual: bool = False
    as_of_ns: int = 0

    @property
    def url(self) -> str:
        """The URL :func:`open_store` reads, without secrets."""
        options = [f"endpoint={self.endpoint}"] if self.endpoint else []
        if self.region != "us-east-1":
            options.append(f"region={self.region}")
        if self.virtual and self.endpoint:
            options.append("style=virtual")
        if self.as_of_ns:
            options.append(f"as-of={_text(self.as_of_ns)}")
        question = "?" + "&".join(options) if options else ""
        return f"s3://{self.bucket}/{self.prefix.rstrip('/')}".rstrip("/") + question


def moment(text: str) -> int:
    """Nanoseconds since the epoch of a time in RFC 3339 with its zone.

    Raises:
        ValueError: it is none.
    """
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError("the zone is missing")
    return (when - _EPOCH) // timedelta(microseconds=1) * 1000


def _text(time_ns: int) -> str:
    when = _EPOCH + timedelta(microseconds=time_ns // 1000)
    return when.isoformat().replace("+00:00", "Z")
