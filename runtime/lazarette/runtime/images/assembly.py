"""An image archive from layer tars on the disk, without a store or a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from lazarette.runtime.images.compression import CHUNK
from lazarette.runtime.images.model import (
    History,
    ImageConfig,
    RootFS,
    RunConfig,
    digest_of,
    encode,
    host,
)
from lazarette.runtime.images.save import ArchiveWriter, blob_path


def assemble(
    target: BinaryIO,
    layers: Sequence[tuple[Path, str]],
    *,
    config: RunConfig,
    tags: Sequence[str],
    created: str,
    author: str = "",
) -> str:
    """Write a Docker archive for ``docker load``.

    Args:
        target: written to.
        layers: uncompressed layer tars, lowest first, each with what made it.
        config: container defaults.
        tags: names the image is to have.
        created: RFC 3339 time.
        author: of the image.

    Returns:
        The image's id.
    """
    diff_ids = [_digest(path) for path, _ in layers]
    place = host()
    image = ImageConfig(
        architecture=place.architecture,
        os=place.os,
        created=created,
        author=author,
        config=config,
        rootfs=RootFS(diff_ids=diff_ids),
        history=[History(created=created, created_by=made_by) for _, made_by in layers],
    )
    raw = encode(image)
    archive = ArchiveWriter(target)
    for (path, _), diff_id in zip(layers, diff_ids, strict=True):
        with path.open("rb") as stream:
            archive.stream(blob_path(diff_id), path.stat().st_size, stream)
    archive.blob(raw)
    entry = {
        "Config": blob_path(digest_of(raw)),
        "RepoTags": list(tags),
        "Layers": [blob_path(diff_id) for diff_id in diff_ids],
    }
    archive.file("manifest.json", msgspec.json.encode([entry]))
    archive.close()
    return digest_of(raw)


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            made.update(data)
    return "sha256:" + made.hexdigest()
