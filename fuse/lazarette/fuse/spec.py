"""What a server process is told: one JSON document, parsed once into these structs."""

from __future__ import annotations

import msgspec

from lazarette.fuse import jsontext


class _Common(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Fields of every kind.

    Attributes:
        mountpoint: an existing folder.
        control: path of the control socket the server makes, mode 0600.
        read_only: mount for reading only.
        passthrough: let the kernel read and write backing files where it can.
        allow_other: other users may enter; None: where the mounting user may allow it.
        standby: keep a process that goes on serving when the server is killed.
        log: file for the server's log; None: none is kept.
    """

    mountpoint: str
    control: str
    read_only: bool = False
    passthrough: bool = True
    allow_other: bool | None = None
    standby: bool = True
    log: str | None = None


class UnionSpec(_Common, tag="union", tag_field="kind", kw_only=True, frozen=True):
    """A union; fields as in :class:`lazarette.fuse.union.UnionOptions`."""

    lowers: list[str] = []
    upper: str | None = None
    work: str | None = None
    volatile: bool = False
    reserve_wh: bool = False
    redirect: bool = False


class LoopbackSpec(_Common, tag="loopback", tag_field="kind", kw_only=True, frozen=True):
    """A folder shown as it is."""

    root: str
    work: str


class LazySpec(_Common, tag="lazy", tag_field="kind", kw_only=True, frozen=True):
    """A tree whose content arrives on demand.

    Attributes:
        store: folder for local content and presence maps, kept between mounts.
        source: ``package.module:function``; called with ``arguments``, it returns a
            :class:`lazarette.fuse.lazy.Source`.
        arguments: for ``source``; never secrets, which it must fetch by itself.
        deadline: seconds a read is retried before it fails with EIO.
        reads: file that remembers what is read first of this tree, for the next one like it.
    """

    store: str
    source: str
    arguments: dict[str, str] = {}
    deadline: float = 30.0
    reads: str | None = None


Spec = UnionSpec | LoopbackSpec | LazySpec


def parse(document: bytes) -> Spec:
    """Parse a spec.

    Raises:
        msgspec.ValidationError: it is not one.
    """
    parsed: Spec = jsontext.decode(document, type=Spec)
    return parsed


def render(spec: Spec) -> bytes:
    """The reverse of :func:`parse`."""
    return msgspec.json.encode(spec)
