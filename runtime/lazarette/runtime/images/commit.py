"""New images from what is here: a container's changes, a root filesystem tar."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import BinaryIO, cast

import msgspec

from lazarette.runtime.images.blobs import LayerBlob
from lazarette.runtime.images.compression import Chained
from lazarette.runtime.images.instructions import apply_changes
from lazarette.runtime.images.layers import Layer
from lazarette.runtime.images.model import (
    History,
    Image,
    ImageConfig,
    Platform,
    RootFS,
    RunConfig,
    encode,
    host,
)
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import rfc3339

_LARGEST_EMPTY_TAR = 10240


def extend(
    store: ImageStore,
    base: Image | None,
    *,
    config: RunConfig,
    created_by: str,
    comment: str = "",
    author: str = "",
    layer: BinaryIO | None = None,
    platform: Platform | None = None,
) -> Image:
    """One more step on an image: a build instruction or a commit.

    Args:
        store: where the image goes.
        base: the image it is built on; None for none.
        config: container defaults of the new image, whole (nothing is inherited).
        created_by: for the history.
        comment: for the history.
        author: of the image; the base's if empty.
        layer: the changes as a layer tar, compressed or not; None, or a tar of nothing,
            adds no layer.
        platform: of the image; the base's, or this host's, if None.

    Raises:
        InvalidArgument: the layer is broken or hostile.
    """
    with store.working():
        added = None if layer is None else _add_layer(store, base, layer)
        old = base.config if base else ImageConfig()
        created = rfc3339(store.clock.now_ns())
        place = platform or Platform(
            os=old.os or "linux",
            architecture=old.architecture or host().architecture,
            variant=old.variant,
        )
        step = History(
            created=created,
            created_by=created_by,
            comment=comment,
            author=author,
            empty_layer=added is None,
        )
        diff_ids = [*old.rootfs.diff_ids, *([added.diff_id] if added else [])]
        made = ImageConfig(
            architecture=place.architecture,
            os=place.os,
            variant=place.variant,
            os_version=old.os_version,
            created=created,
            author=author or old.author,
            comment=comment,
            config=config,
            rootfs=RootFS(diff_ids=diff_ids),
            history=[*(old.history or []), step],
        )
        return store.add(encode(made), parent=base.id if base else "")


def commit(
    store: ImageStore,
    *,
    layer_key: str,
    base: Image | None,
    config: RunConfig,
    changes: Sequence[str] = (),
    command: str = "",
    comment: str = "",
    author: str = "",
) -> Image:
    """``docker commit``: an image of a container's changes.

    Args:
        store: where the image goes.
        layer_key: the container's layer in the layer driver.
        base: the image the container was made of.
        config: the container's configuration.
        changes: Dockerfile instructions applied to it.
        command: what the container ran, for the history.
        comment: for the history.
        author: of the image.

    Raises:
        InvalidArgument: a change is not allowed.
    """
    changed = apply_changes(config, changes)
    with store.layers.driver.diff(layer_key) as tar:
        image = extend(
            store,
            base,
            config=changed,
            created_by=command,
            comment=comment,
            author=author,
            layer=tar,
        )
    store.announce("create", image.id, image.id)
    store.announce("commit", image.id, image.id)
    return image


_EMPTY_TAR = bytes(1024)


def import_tar(
    store: ImageStore,
    stream: BinaryIO,
    *,
    changes: Sequence[str] = (),
    message: str = "",
    platform: Platform | None = None,
) -> Image:
    """``docker import``: an image of one layer from a root filesystem tar.

    Args:
        store: where the image goes.
        stream: the tar, compressed or not.
        changes: Dockerfile instructions that make its configuration.
        message: for the history.
        platform: what it is for; this host if None.

    Raises:
        InvalidArgument: the tar or a change is broken.
    """
    config = apply_changes(RunConfig(), changes)
    head = stream.read(1)
    image = extend(
        store,
        None,
        config=config,
        created_by="",
        comment=message or "Imported from -",
        layer=cast(BinaryIO, Chained(head, stream)) if head else io.BytesIO(_EMPTY_TAR),
        platform=platform or host(),
    )
    store.announce("import", image.id, image.id)
    return image


def run_config(value: object) -> RunConfig:
    """A plain object (a container's ``Config``) as container defaults; unknown keys fall."""
    return msgspec.convert(value, RunConfig, strict=False)


def _add_layer(store: ImageStore, base: Image | None, tar: BinaryIO) -> Layer | None:
    stored = store.layers.with_diff_id(store.blobs.put_layer(tar))
    if _is_empty(stored):
        return None
    return store.layers.add(base.chain[-1] if base and base.chain else None, stored, stored.diff_id)


def _is_empty(stored: LayerBlob) -> bool:
    """Whether the tar holds no entry: zero blocks only."""
    if stored.tar_size > _LARGEST_EMPTY_TAR:
        return False
    return stored.diff_id == "sha256:" + hashlib.sha256(bytes(stored.tar_size)).hexdigest()
