"""Image references: parse, normalise, shorten.

Grammar and short forms are those of the distribution project's ``reference`` package
(https://pkg.go.dev/github.com/distribution/reference): ``busybox`` stands for
``docker.io/library/busybox:latest``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lazarette.runtime.images.errors import InvalidReference

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library/"
_MAX_NAME = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_PATH = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha384:[a-f0-9]{96}|sha512:[a-f0-9]{128}")
_HEX_ID = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised name with a tag, a digest, both or neither.

    Attributes:
        domain: the registry, e.g. ``docker.io`` or ``localhost:5000``.
        path: the repository there, e.g. ``library/busybox``.
        tag: without the colon; empty if none.
        digest: ``sha256:…``; empty if none.
    """

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """``docker.io/library/busybox``."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """``busybox``."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix(_OFFICIAL)
        return short if "/" not in short else self.path

    @property
    def suffix(self) -> str:
        """``:tag@digest``, as far as given."""
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def familiar(self) -> str:
        """The short form a person reads: ``busybox:latest``."""
        return self.familiar_name + self.suffix

    def __str__(self) -> str:
        return self.name + self.suffix

    def with_default_tag(self) -> Reference:
        """The same, with ``latest`` where neither tag nor digest is given."""
        return self if self.tag or self.digest else replace(self, tag=DEFAULT_TAG)

    def with_tag(self, tag: str) -> Reference:
        """The same name with that tag and no digest.

        Raises:
            InvalidReference: not a tag.
        """
        if not _TAG.fullmatch(tag):
            raise InvalidReference("invalid tag format")
        return replace(self, tag=tag, digest="")

    def with_digest(self, digest: str) -> Reference:
        """The same name at that digest, without a tag."""
        return replace(self, tag="", digest=digest)


def is_digest(text: str) -> bool:
    """Whether the text is ``sha256:…`` (or 384, 512) in full."""
    return _DIGEST.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """Read a reference in its short or long form.

    Raises:
        InvalidReference: it is none; the text is the Engine's.
    """
    if _HEX_ID.fullmatch(text):
        raise InvalidReference(
            f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings"
        )
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidReference("invalid reference format")
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        domain, path = first, remainder
    else:
        domain, path = DEFAULT_DOMAIN, rest
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    path, colon, tag = path.partition(":")
    if path.lower() != path:
        raise InvalidReference(
            f"invalid reference format: repository name ({path}) must be lowercase"
        )
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = _OFFICIAL + path
    if (
        not _DOMAIN.fullmatch(domain)
        or not _PATH.fullmatch(path)
        or (colon and not _TAG.fullmatch(tag))
        or len(domain) + 1 + len(path) > _MAX_NAME
    ):
        raise InvalidReference("invalid reference format")
    return Reference(domain, path, tag, digest)
