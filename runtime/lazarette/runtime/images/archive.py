"""``docker load``: images out of a Docker archive or an OCI layout, in one pass.

The archive is read once, as it comes.  Its members are never written under their own
names: layers become blobs of the store, JSON stays in memory, so nothing in a name can
lead anywhere.  Images become visible after the whole archive was read and checked.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.images import model, reference
from lazarette.runtime.images.blobs import LayerBlob
from lazarette.runtime.images.compression import (
    CHUNK,
    Chained,
    Encoding,
    Unpacked,
    read_up_to,
    sniff,
)
from lazarette.runtime.images.errors import BadArchive, DigestMismatch, InvalidReference
from lazarette.runtime.images.model import (
    Descriptor,
    Image,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    decode,
    digest_of,
)
from lazarette.runtime.images.progress import Message, Sink, discard, moving
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.store import ImageStore

_MAX_MEMBERS = 20_000
_MAX_JSON = 8 << 20
_MAX_JSON_TOTAL = 64 << 20
_MAX_NESTING = 4
_NAME_ANNOTATION = "io.containerd.image.name"
_REF_ANNOTATION = "org.opencontainers.image.ref.name"


class _Entry(msgspec.Struct, rename="pascal"):
    """One image of a Docker archive's ``manifest.json``."""

    config: str
    layers: list[str] = []
    repo_tags: list[str] | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """An image of the archive, not yet stored."""

    config: bytes
    layers: tuple[LayerBlob, ...]
    names: tuple[Reference, ...]
    manifest: bytes = b""


@dataclass
class _Contents:
    """What an archive holds, by normalised member name."""

    documents: dict[str, bytes] = field(default_factory=dict)
    layers: dict[str, LayerBlob] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def resolve(self, name: str) -> str:
        """Follow links between members.

        Raises:
            BadArchive: they go round in a circle.
        """
        name = _normal(name)
        for _ in range(16):
            if name not in self.links:
                return name
            name = self.links[name]
        raise BadArchive(f"archive member {name} is a link to itself")

    def document(self, name: str) -> bytes:
        """A JSON member.

        Raises:
            BadArchive: there is none.
        """
        found = self.documents.get(self.resolve(name))
        if found is None:
            raise BadArchive(f"archive has no {name}")
        return found

    def layer(self, name: str) -> LayerBlob:
        """A layer member.

        Raises:
            BadArchive: there is none.
        """
        found = self.layers.get(self.resolve(name))
        if found is None:
            raise BadArchive(f"archive has no layer {name}")
        return found


def load(
    store: ImageStore,
    stream: BinaryIO,
    *,
    progress: Sink = discard,
    platform: Platform | None = None,
) -> list[Image]:
    """Store every image of an archive.

    Args:
        store: where they go.
        stream: the archive, plain or compressed by gzip, zstd, xz or bzip2.
        progress: told of layers and of each image loaded.
        platform: which image to take from an index; this host's if None.

    Raises:
        BadArchive: it is broken, hostile or not an image archive.
        DigestMismatch: a layer is not what the configuration says.
    """
    with store.working():
        contents = _read(store, stream)
        if "manifest.json" in contents.documents:
            found = _docker_images(contents)
        elif "index.json" in contents.documents:
            found = _layout_images(contents, platform or model.host())
        else:
            raise BadArchive(
                "archive has neither manifest.json nor index.json",
                hint="docker import takes a root filesystem, docker load an image archive",
            )
        return [_store(store, one, progress) for one in found]


def _read(store: ImageStore, stream: BinaryIO) -> _Contents:
    contents = _Contents()
    total = 0
    plain = Unpacked(stream)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, plain), mode="r|", bufsize=CHUNK) as archive:
            for count, member in enumerate(archive):
                if count >= _MAX_MEMBERS:
                    raise BadArchive(f"archive has more than {_MAX_MEMBERS} members")
                total += _read_member(store, contents, archive, member)
                if total > _MAX_JSON_TOTAL:
                    raise BadArchive("archive has too much JSON")
    except (tarfile.TarError, EOFError) as bad:
        raise BadArchive(f"archive cannot be read: {bad}") from bad
    plain.finish()
    return contents


def _read_member(
    store: ImageStore, contents: _Contents, archive: tarfile.TarFile, member: tarfile.TarInfo
) -> int:
    """Take in one member; the bytes of JSON it added."""
    name = _normal(member.name)
    if member.issym():
        contents.links[name] = _normal(posixpath.join(posixpath.dirname(name), member.linkname))
        return 0
    if member.islnk():
        contents.links[name] = _normal(member.linkname)
        return 0
    if not member.isfile():
        return 0
    opened = archive.extractfile(member)
    assert opened is not None  # a regular member has content
    content = cast(BinaryIO, opened)
    head = read_up_to(content, tarfile.BLOCKSIZE)
    if head[:1] in (b"{", b"[") and head[257:262] != b"ustar":
        if member.size > _MAX_JSON:
            raise BadArchive(f"archive member {name} is too large for JSON")
        contents.documents[name] = head + read_up_to(content, member.size)
        _check_name(name, digest_of(contents.documents[name]))
        return member.size
    if len(head) < tarfile.BLOCKSIZE and sniff(head) is Encoding.NONE:
        return 0  # "VERSION" and the like: no tar is that short
    stored = store.blobs.put_layer(cast(BinaryIO, Chained(head, content)))
    _check_name(name, stored.blob.digest, stored.diff_id)
    contents.layers[name] = stored
    return 0


def _check_name(name: str, *digests: str) -> None:
    """A member ``blobs/sha256/HEX`` must have that digest."""
    if name.startswith("blobs/sha256/"):
        promised = "sha256:" + name.removeprefix("blobs/sha256/")
        if promised not in digests:
            raise DigestMismatch(f"archive member {name} has digest {digests[0]}")


def _docker_images(contents: _Contents) -> list[_Found]:
    try:
        entries = jsontext.decode(contents.document("manifest.json"), type=list[_Entry])
    except msgspec.MsgspecError as bad:
        raise BadArchive(f"manifest.json cannot be read: {bad}") from bad
    return [
        _Found(
            config=contents.document(entry.config),
            layers=tuple(contents.layer(name) for name in entry.layers),
            names=tuple(_name(tag) for tag in entry.repo_tags or ()),
        )
        for entry in entries
    ]


def _layout_images(contents: _Contents, platform: Platform) -> list[_Found]:
    index = decode(contents.document("index.json"), Index, "index.json")
    found: dict[str, _Found] = {}
    for descriptor in index.manifests:
        names = tuple(_annotated_names(descriptor))
        chosen = _choose(contents, descriptor, platform, 0)
        if chosen is None:
            continue
        known = found.get(chosen.digest)
        before = known.names if known else ()
        found[chosen.digest] = _from_manifest(contents, chosen, (*before, *names))
    if not found:
        raise BadArchive(f"archive has no image for {platform}")
    return list(found.values())


def _choose(
    contents: _Contents, descriptor: Descriptor, platform: Platform, depth: int
) -> Descriptor | None:
    """The manifest for a platform behind a descriptor that may be an index of them."""
    if depth > _MAX_NESTING:
        raise BadArchive("archive nests indexes too deeply")
    if descriptor.media_type not in model.INDEXES:
        fits = descriptor.platform is None or platform.accepts(descriptor.platform)
        return descriptor if fits and _blob(descriptor) in contents.documents else None
    index = decode(contents.document(_blob(descriptor)), Index, "image index")
    for inner in index.manifests:
        chosen = _choose(contents, inner, platform, depth + 1)
        if chosen is not None:
            return chosen
    return None


def _from_manifest(
    contents: _Contents, descriptor: Descriptor, names: tuple[Reference, ...]
) -> _Found:
    raw = contents.document(_blob(descriptor))
    manifest = decode(raw, Manifest, "image manifest")
    return _Found(
        config=contents.document(_blob(manifest.config)),
        layers=tuple(contents.layer(_blob(layer)) for layer in manifest.layers),
        names=names,
        manifest=raw,
    )


def _annotated_names(descriptor: Descriptor) -> list[Reference]:
    annotations = descriptor.annotations or {}
    for key in (_NAME_ANNOTATION, _REF_ANNOTATION):
        text = annotations.get(key, "")
        # Buildah and skopeo put a bare tag into ref.name: that alone names no repository.
        if text and (key == _NAME_ANNOTATION or "/" in text or ":" in text):
            return [_name(text)]
    return []


def _name(text: str) -> Reference:
    try:
        return reference.parse(text).with_default_tag()
    except InvalidReference as bad:
        raise BadArchive(f'archive names an image "{text}": {bad}') from bad


def _store(store: ImageStore, found: _Found, progress: Sink) -> Image:
    config = decode(found.config, ImageConfig, "image configuration")
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != len(found.layers):
        raise BadArchive(
            "invalid manifest, layers length mismatch: "
            f"expected {len(diff_ids)}, got {len(found.layers)}"
        )
    _add_layers(store, diff_ids, found.layers, progress)
    manifest = store.blobs.put(found.manifest).digest if found.manifest else ""
    image = store.add(found.config, manifest=manifest)
    for name in found.names:
        _announce_move(store, name, image, progress)
        store.tag(image.id, name)
        progress(Message(stream=f"Loaded image: {name.familiar}\n"))
    if not found.names:
        progress(Message(stream=f"Loaded image ID: {image.id}\n"))
    store.announce("load", image.id, image.id)
    return store.get(image.id)


def _add_layers(
    store: ImageStore, diff_ids: Sequence[str], layers: Sequence[LayerBlob], progress: Sink
) -> None:
    parent: str | None = None
    for diff_id, stored in zip(diff_ids, layers, strict=True):
        if stored.diff_id and stored.diff_id != diff_id:
            raise DigestMismatch(f"layer has digest {stored.diff_id}, not {diff_id}")
        short = diff_id.removeprefix("sha256:")[:12]
        progress(moving("Loading layer", short, 0, stored.blob.size))
        parent = store.layers.add(parent, stored, diff_id).chain
        progress(moving("Loading layer", short, stored.blob.size, stored.blob.size))


def _announce_move(store: ImageStore, name: Reference, image: Image, progress: Sink) -> None:
    old = store.find(str(name))
    if old is not None and old.id != image.id:
        progress(
            Message(
                stream=f"The image {name.familiar} already exists, "
                f"renaming the old one with ID {old.id} to empty string\n"
            )
        )


def _blob(descriptor: Descriptor) -> str:
    return "blobs/" + descriptor.digest.replace(":", "/")


def _normal(name: str) -> str:
    """A member's name without ``./``; one that climbs out of the archive is refused."""
    clean = posixpath.normpath(name).lstrip("/")
    if clean == ".." or clean.startswith("../"):
        raise BadArchive(f"archive member {name} leads out of the archive")
    return clean
