"""``docker save``: images as one tar that is a Docker archive and an OCI layout at once.

Layers are written uncompressed, named by the digest of their tar, each once; the bytes
are those that were loaded or pulled, so a saved image has its old ids anywhere.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from lazarette.runtime.images import model
from lazarette.runtime.images.compression import CHUNK
from lazarette.runtime.images.errors import DigestMismatch
from lazarette.runtime.images.layers import Layer
from lazarette.runtime.images.model import Descriptor, Image, Index, Manifest, digest_of, encode
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.store import ImageStore


@dataclass
class _Selected:
    image: Image
    names: list[Reference] = field(default_factory=list)


def select(store: ImageStore, refs: Sequence[str]) -> list[_Selected]:
    """The images named, each with the names it is to carry.

    A name without a tag takes every tag of its repository, an id none.

    Raises:
        ImageNotFound: one does not exist.
    """
    chosen: dict[str, _Selected] = {}
    for ref in refs:
        for image, name in _matches(store, ref):
            one = chosen.setdefault(image.id, _Selected(image))
            if name is not None and name not in one.names:
                one.names.append(name)
    return list(chosen.values())


def _matches(store: ImageStore, ref: str) -> list[tuple[Image, Reference | None]]:
    name = store.named(ref)
    if name is not None and ":" not in ref.rpartition("/")[2] and "@" not in ref:
        repository = [
            (image, other)
            for image in store.all()
            for other in store.references(image.id)
            if other.name == name.name and other.tag
        ]
        if repository:
            return list(repository)
    image = store.get(ref)
    named = name is not None and name.tag and name in store.references(image.id)
    return [(image, name if named else None)]


def save(store: ImageStore, refs: Sequence[str], target: BinaryIO) -> None:
    """Write an archive of images.

    Args:
        store: where they are.
        refs: which ones; see :func:`select`.
        target: written to, never read or moved in.

    Raises:
        ImageNotFound: one does not exist (before anything is written).
        DigestMismatch: a layer is damaged on disk.
    """
    chosen = select(store, refs)
    with store.working():
        writer = ArchiveWriter(target)
        entries: list[dict[str, object]] = []
        index = Index(media_type=model.OCI_INDEX)
        for one in chosen:
            layers = store.layers_of(one.image)
            config = store.blobs.read(one.image.id)
            manifest = encode(manifest_of(one.image, len(config), layers))
            for layer in layers:
                writer.layer(store, layer)
            writer.blob(config)
            writer.blob(manifest)
            entries.append(_entry(one, layers))
            index.manifests.extend(_descriptors(one, manifest))
            store.announce("save", one.image.id, one.image.id)
        writer.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        writer.file("index.json", encode(index))
        writer.file("manifest.json", msgspec.json.encode(entries))
        writer.close()


def manifest_of(image: Image, config_size: int, layers: Sequence[Layer]) -> Manifest:
    """The manifest an image is saved with: its layers as plain tars."""
    return Manifest(
        media_type=model.OCI_MANIFEST,
        config=Descriptor(media_type=model.OCI_CONFIG, digest=image.id, size=config_size),
        layers=[
            Descriptor(media_type=model.OCI_LAYER, digest=layer.diff_id, size=layer.tar_size)
            for layer in layers
        ],
    )


def _entry(one: _Selected, layers: Sequence[Layer]) -> dict[str, object]:
    return {
        "Config": blob_path(one.image.id),
        "RepoTags": [name.familiar for name in one.names] or None,
        "Layers": [blob_path(layer.diff_id) for layer in layers],
    }


def _descriptors(one: _Selected, manifest: bytes) -> list[Descriptor]:
    def described(annotations: dict[str, str] | None) -> Descriptor:
        return Descriptor(
            media_type=model.OCI_MANIFEST,
            digest=digest_of(manifest),
            size=len(manifest),
            annotations=annotations,
        )

    named = [
        described(
            {
                "io.containerd.image.name": str(name),
                "org.opencontainers.image.ref.name": name.tag,
            }
        )
        for name in one.names
    ]
    return named or [described(None)]


def blob_path(digest: str) -> str:
    """Where an archive keeps a blob."""
    return "blobs/" + digest.replace(":", "/")


class ArchiveWriter:
    """A tar being written; a member of a name it has is not written again."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._names: set[str] = set()
        for folder in ("blobs", "blobs/sha256"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            target.write(entry.tobuf(tarfile.PAX_FORMAT))

    def layer(self, store: ImageStore, layer: Layer) -> None:
        """Add a layer's tar."""
        if blob_path(layer.diff_id) not in self._names:
            with store.layers.open_tar(layer) as stream:
                self.stream(blob_path(layer.diff_id), layer.tar_size, stream)

    def blob(self, data: bytes) -> None:
        """Add a document under its digest."""
        self.file(blob_path(digest_of(data)), data)

    def file(self, name: str, data: bytes) -> None:
        """Add a document."""
        if name not in self._names:
            self.stream(name, len(data), io.BytesIO(data))

    def close(self) -> None:
        """Write the end of the archive."""
        self._target.write(bytes(2 * tarfile.BLOCKSIZE))

    def stream(self, name: str, size: int, stream: BinaryIO) -> None:
        """Add a member of that many bytes.

        Raises:
            DigestMismatch: the stream has more or fewer.
        """
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = size, 0o644
        self._target.write(entry.tobuf(tarfile.PAX_FORMAT))
        written = 0
        while data := stream.read(CHUNK):
            self._target.write(data)
            written += len(data)
        if written != size:
            raise DigestMismatch(f"stored layer has {written} bytes, not {size}")
        self._target.write(bytes(-size % tarfile.BLOCKSIZE))
        self._names.add(name)
