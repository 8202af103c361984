"""Which bucket of which server, and who asks; needs no S3 library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """An access key; its printed form shows no secret."""

    access_key: str
    secret_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.access_key!r}, …)"


@dataclass(frozen=True, slots=True)
class S3Place:
    """Which bucket of which server.

    Attributes:
        bucket: its name.
        prefix: what every object's key begins with: empty, or ending in ``/``.
        endpoint: the server's URL; None for AWS.
        region: e.g. ``us-east-1``.
        virtual: whether the bucket's name goes into the host name, not into the path.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str = "us-east-1"
    virtual: bool = False

    @property
    def url(self) -> str:
        """The URL :func:`open_store` reads, without secrets."""
        options = [f"endpoint={self.endpoint}"] if self.endpoint else []
        if self.region != "us-east-1":
            options.append(f"region={self.region}")
        if self.virtual and self.endpoint:
            options.append("style=virtual")
        question = "?" + "&".join(options) if options else ""
        return f"s3://{self.bucket}/{self.prefix.rstrip('/')}".rstrip("/") + question
