"""What images are made of: configuration, manifest, index and descriptors.

Forms: OCI image specification 1.1 (https://github.com/opencontainers/image-spec) and
Docker's image manifest version 2, schema 2, which have the same fields.  An image's id
is the SHA-256 of its configuration *as bytes*, so those bytes are kept and handed on
untouched; the structs here are for reading them and for making new ones.
"""

from __future__ import annotations

import hashlib
import platform as host_platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.images.errors import BadArchive
from lazarette.storage.clock import NANOSECONDS

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFESTS = (DOCKER_MANIFEST, OCI_MANIFEST)
INDEXES = (DOCKER_INDEX, OCI_INDEX)

S = TypeVar("S", bound=msgspec.Struct)


class Healthcheck(msgspec.Struct, omit_defaults=True, kw_only=True, rename="pascal"):
    """How to ask a container whether it is well; durations in nanoseconds, 0 = inherit."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class RunConfig(msgspec.Struct, omit_defaults=True, kw_only=True, rename="pascal"):
    """Defaults an image gives to its containers."""

    hostname: str = ""
    domainname: str = ""
    user: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    exposed_ports: dict[str, object] | None = None
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    env: list[str] | None = None
    cmd: list[str] | None = None
    healthcheck: Healthcheck | None = None
    args_escaped: bool = False
    image: str = ""
    volumes: dict[str, object] | None = None
    working_dir: str = ""
    entrypoint: list[str] | None = None
    on_build: list[str] | None = None
    labels: dict[str, str] | None = None
    stop_signal: str = ""
    stop_timeout: int | None = None
    shell: list[str] | None = None


class RootFS(msgspec.Struct, kw_only=True):
    """The stack of layers, lowest first, by the digests of their uncompressed tars."""

    type: str = "layers"
    diff_ids: list[str] = []


class History(msgspec.Struct, omit_defaults=True, kw_only=True):
    """How one layer (or a step without one) came about."""

    created: str | None = None
    author: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The image configuration: the object whose digest is the image's id."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    created: str | None = None
    author: str = ""
    comment: str = ""
    docker_version: str = ""
    config: RunConfig | None = None
    rootfs: RootFS = msgspec.field(default_factory=RootFS)
    history: list[History] | None = None

    @property
    def run(self) -> RunConfig:
        """The container defaults, empty ones if the image gives none."""
        return self.config or RunConfig()


class Platform(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Where an image runs, e.g. ``linux/arm64/v8``."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def accepts(self, offered: Platform) -> bool:
        """Whether an image for ``offered`` is what was asked for."""
        wanted, has = self.normalised(), offered.normalised()
        return (wanted.os, wanted.architecture) == (has.os, has.architecture) and (
            not wanted.variant or not has.variant or wanted.variant == has.variant
        )

    def normalised(self) -> Platform:
        """One spelling for each: ``arm64/v8`` is ``arm64``, ``x86_64`` is ``amd64``."""
        architecture = _ARCHITECTURES.get(self.architecture.lower(), self.architecture.lower())
        variant = self.variant.lower()
        if architecture == "arm64" and variant in ("8", "v8"):
            variant = ""
        return Platform(architecture=architecture, os=self.os.lower() or "linux", variant=variant)


class Descriptor(msgspec.Struct, omit_defaults=True, kw_only=True, rename="camel"):
    """A blob by type, digest and size in bytes."""

    media_type: str = ""
    digest: str = ""
    size: int = 0
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Manifest(msgspec.Struct, kw_only=True, rename="camel"):
    """One image: its configuration and its layers, lowest first."""

    schema_version: int = 2
    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor]


class Kind(msgspec.Struct, rename="camel"):
    """As much of a manifest or index as tells which of the two it is."""

    media_type: str = ""
    manifests: list[msgspec.Raw] | None = None


class Index(msgspec.Struct, kw_only=True, rename="camel"):
    """Several manifests, usually one for each platform."""

    schema_version: int = 2
    media_type: str = ""
    manifests: list[Descriptor] = []


_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i486": "386",
    "i686": "386",
    "armv7l": "arm",
    "armhf": "arm",
}
_KNOWN_ARCHITECTURES = frozenset(
    [
        "386",
        "amd64",
        "arm",
        "arm64",
        "loong64",
        "mips",
        "mips64",
        "mips64le",
        "mipsle",
        "ppc64",
        "ppc64le",
        "riscv64",
        "s390x",
    ]
)
_OTHER_SYSTEMS = frozenset(("windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris"))


@dataclass(frozen=True, slots=True)
class Image:
    """One image of the store.

    Attributes:
        id: ``sha256:`` digest of the configuration.
        config: the configuration, read.
        layer: key of the topmost layer for the layer driver; None for an image of none.
        chain: chain ids of all layers, lowest first.
        tags: familiar names with tag, sorted.
        digests: familiar names with the digest of the manifest they came by, sorted.
        created_ns: when it was made, nanoseconds since the epoch; 0 if it does not say.
        tagged_ns: when a tag was last put on it; 0 if never.
        size: bytes of all its layers, unpacked.
        parent: id of the image it was built or committed from here; empty if none.
        manifest: digest of the manifest it was pulled by; empty if it was not.
    """

    id: str
    config: ImageConfig
    layer: str | None
    chain: tuple[str, ...]
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    created_ns: int
    tagged_ns: int
    size: int
    parent: str
    manifest: str = ""

    @property
    def short_id(self) -> str:
        """The first twelve digits."""
        return self.id.removeprefix("sha256:")[:12]

    @property
    def labels(self) -> Mapping[str, str]:
        """The image's labels."""
        return self.config.run.labels or {}


def decode(data: bytes, kind: type[S], what: str) -> S:
    """Read JSON as a struct.

    Raises:
        BadArchive: it is not one; the message says which part ``what``.
    """
    try:
        return jsontext.decode(data, type=kind, strict=False)
    except msgspec.MsgspecError as bad:
        raise BadArchive(f"{what} cannot be read: {bad}") from bad


def encode(value: msgspec.Struct) -> bytes:
    """A struct as compact JSON."""
    return msgspec.json.encode(value)


def digest_of(data: bytes) -> str:
    """``sha256:…`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Iterable[str]) -> tuple[str, ...]:
    """Names of stacks of layers: each the digest of the one below and its own diff id.

    Formula: OCI image specification, "Layer ChainID".
    """
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


def layer_key(chain_id: str) -> str:
    """The layer driver's key for a chain id."""
    return chain_id.replace(":", "-")


def host() -> Platform:
    """The platform of this host."""
    return Platform(architecture=host_platform.machine(), os="linux").normalised()


def parse_platform(text: str) -> Platform | None:
    """``linux/arm64/v8``, ``arm64`` or ``linux`` as a platform; None for an empty text.

    Raises:
        BadArchive: more than three parts or empty ones.
    """
    if not text:
        return None
    parts = text.split("/")
    if len(parts) > 3 or not all(re.fullmatch(r"[A-Za-z0-9_.-]+", part) for part in parts):
        raise BadArchive(f'invalid platform "{text}": use os[/arch[/variant]]')
    if len(parts) == 1:
        return _platform_of_one(parts[0].lower())
    variant = parts[2] if len(parts) == 3 else ""
    return Platform(os=parts[0], architecture=parts[1], variant=variant).normalised()


def _platform_of_one(word: str) -> Platform:
    """A platform from only an operating system or only an architecture.

    Raises:
        BadArchive: it is neither.
    """
    if word == "linux":
        return host()
    architecture = _ARCHITECTURES.get(word, word)
    if architecture in _KNOWN_ARCHITECTURES:
        return Platform(os="linux", architecture=architecture)
    if word in _OTHER_SYSTEMS:
        return Platform(os=word, architecture=host().architecture)
    raise BadArchive(f'"{word}": unknown operating system or architecture: invalid argument')


_TIME = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|z|[+-]\d\d:\d\d)")


def time_ns(text: str | None) -> int:
    """An RFC 3339 time as nanoseconds since the epoch; 0 where absent or unreadable."""
    match = _TIME.fullmatch(text or "")
    if match is None:
        return 0
    zone = "+00:00" if match[3] in "Zz" else match[3]
    try:
        whole = int(datetime.fromisoformat(match[1] + zone).timestamp())
    except ValueError:
        return 0
    fraction = int((match[2] or "").ljust(9, "0"))
    return max(whole * NANOSECONDS + fraction, 0)
