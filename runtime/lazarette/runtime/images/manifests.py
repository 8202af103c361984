"""The manifests of an image as the Engine API tells them from 1.47 on (``ManifestSummary``).

This store keeps one platform of an image, so there is one: the manifest the image was pulled
by, or for any other image the one it is saved with.
"""

from __future__ import annotations

import msgspec

from lazarette.runtime.images import model
from lazarette.runtime.images.model import Descriptor, Image, Kind, Platform, decode
from lazarette.runtime.images.save import manifest_of
from lazarette.runtime.images.store import ImageStore


class ContentSize(msgspec.Struct, rename="pascal", kw_only=True):
    """Bytes of the stored manifest, configuration and packed layers; and with what is unpacked."""

    content: int
    total: int


class UnpackedSize(msgspec.Struct, rename="pascal", kw_only=True):
    """Bytes of the files of all layers."""

    unpacked: int


class ImageData(msgspec.Struct, rename="pascal", kw_only=True):
    """What is told of a manifest that is an image's."""

    platform: Platform
    size: UnpackedSize
    containers: list[str]


class ManifestSummary(msgspec.Struct, rename="pascal", kw_only=True):
    """One manifest of an image."""

    id: str = msgspec.field(name="ID")
    descriptor: Descriptor
    available: bool
    size: ContentSize
    kind: str
    image_data: ImageData


def target_of(store: ImageStore, image: Image) -> Descriptor:
    """The manifest of an image by type, digest and size."""
    if image.manifest and store.blobs.has(image.manifest):
        raw = store.blobs.read(image.manifest)
        kind = decode(raw, Kind, "image manifest").media_type or model.OCI_MANIFEST
    else:
        size = store.blobs.size(image.id)
        raw = model.encode(manifest_of(image, size, store.layers_of(image)))
        kind = model.OCI_MANIFEST
    return Descriptor(media_type=kind, digest=model.digest_of(raw), size=len(raw))


def manifests_of(store: ImageStore, image: Image, descriptor: Descriptor) -> list[ManifestSummary]:
    """All manifests of an image, whose own :func:`target_of` is ``descriptor``."""
    config = image.config
    platform = Platform(
        architecture=config.architecture,
        os=config.os or "linux",
        variant=config.variant,
        os_version=config.os_version,
    )
    layers = store.layers_of(image)
    packed = {layer.blob.digest: layer.blob.size for layer in layers}
    content = descriptor.size + store.blobs.size(image.id) + sum(packed.values())
    return [
        ManifestSummary(
            id=descriptor.digest,
            descriptor=msgspec.structs.replace(descriptor, platform=platform),
            available=len(layers) == len(image.chain),
            size=ContentSize(content=content, total=content + image.size),
            kind="image",
            image_data=ImageData(
                platform=platform,
                size=UnpackedSize(unpacked=image.size),
                containers=[use.container for use in store.users(image.id)],
            ),
        )
    ]
