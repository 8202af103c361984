"""``docker pull``: an image from a registry, layer by layer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lazarette.runtime.images import model
from lazarette.runtime.images.blobs import LayerBlob
from lazarette.runtime.images.compression import Encoding
from lazarette.runtime.images.download import Downloads
from lazarette.runtime.images.errors import BadArchive, NoSuchPlatform
from lazarette.runtime.images.model import (
    Descriptor,
    Image,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    chain_ids,
    decode,
)
from lazarette.runtime.images.progress import Message, ProgressDetail, Sink, moving
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.registry import RemoteManifest, Repository
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import Clock

_MAX_CONFIG = 8 << 20
_STEP_NS = 100_000_000
_MAX_LAYERS = 127


class Pull:
    """One pull of one tag or digest.

    Args:
        store: where the image goes.
        downloads: fetches blobs.
        source: the repository.
        name: what to pull, as the user named it.
        platform: which image of an index; this host's if None.
        progress: told of everything.
        parallel: layers fetched at once.
    """

    def __init__(
        self,
        store: ImageStore,
        downloads: Downloads,
        source: Repository,
        name: Reference,
        *,
        platform: Platform | None,
        progress: Sink,
        parallel: int,
    ) -> None:
        self._store = store
        self._downloads = downloads
        self._source = source
        self._name = name
        self._platform = platform
        self._progress = progress
        self._slots = asyncio.Semaphore(parallel)

    async def run(self) -> Image:
        """Fetch, verify, unpack and name the image.

        Raises:
            ManifestUnknown: no such tag or digest.
            PullDenied: no such repository, or it needs a login.
            NoSuchPlatform: there is none for the platform.
            DigestMismatch: something is not what its digest says; nothing of it is visible.
            RegistryFault: the registry failed.
        """
        top = await self._source.manifest(self._name)
        chosen = await self._choose(top)
        shown = self._name.tag or self._name.digest
        self._progress(Message(status=f"Pulling from {self._name.path}", id=shown))
        async with self._store.adding():
            image, is_new = await self._take(chosen)
            await asyncio.to_thread(self._tag, image, top)
        self._progress(Message(status=f"Digest: {top.digest}"))
        verdict = "Downloaded newer image for" if is_new else "Image is up to date for"
        self._progress(Message(status=f"Status: {verdict} {self._name.familiar}"))
        return image

    async def _choose(self, top: RemoteManifest, depth: int = 0) -> RemoteManifest:
        if top.media_type in model.MANIFESTS:
            return top
        if top.media_type not in model.INDEXES or depth > 3:
            raise BadArchive(f"{self._name.familiar} is not an image: {top.media_type}")
        wanted = self._platform or model.host()
        index = decode(top.data, Index, "image index")
        found = _for_platform(index.manifests, wanted)
        if found is None:
            raise NoSuchPlatform(f"no matching manifest for {wanted} in the manifest list entries")
        return await self._choose(
            await self._source.manifest(self._name.with_digest(found.digest)), depth + 1
        )

    async def _take(self, chosen: RemoteManifest) -> tuple[Image, bool]:
        manifest = decode(chosen.data, Manifest, "image manifest")
        if len(manifest.layers) > _MAX_LAYERS:
            raise BadArchive(f"{self._name.familiar} has more than {_MAX_LAYERS} layers")
        raw = await self._config(manifest.config)
        config = decode(raw, ImageConfig, "image configuration")
        self._check_platform(config)
        if len(config.rootfs.diff_ids) != len(manifest.layers):
            raise BadArchive(f"{self._name.familiar} has a manifest that does not fit its layers")
        had = self._store.find(manifest.config.digest)
        named = self._store.find(str(self._name))
        await self._layers(manifest.layers, config.rootfs.diff_ids)
        image = await asyncio.to_thread(self._publish, raw, chosen)
        return image, had is None or named is None or named.id != image.id

    async def _config(self, wanted: Descriptor) -> bytes:
        if wanted.size > _MAX_CONFIG:
            raise BadArchive(f"{self._name.familiar} has a configuration of {wanted.size} bytes")
        await self._downloads.fetch(self._source, wanted, lambda _: None)
        return await asyncio.to_thread(self._store.blobs.read, wanted.digest)

    def _check_platform(self, config: ImageConfig) -> None:
        has = Platform(os=config.os, architecture=config.architecture, variant=config.variant)
        if self._platform is not None and config.os and not self._platform.accepts(has):
            raise NoSuchPlatform(
                f"image with reference {self._name.familiar} was found but does not match the "
                f"specified platform: wanted {self._platform}, actual: {has}"
            )

    async def _layers(self, layers: Sequence[Descriptor], diff_ids: Sequence[str]) -> None:
        """Fetch in parallel, unpack in order, each as soon as all below it are there."""
        chains = chain_ids(diff_ids)
        for layer in layers:
            self._tell("Pulling fs layer", layer)
        fetching = [
            asyncio.create_task(self._fetch(layer, chain))
            for layer, chain in zip(layers, chains, strict=True)
        ]
        parent: str | None = None
        try:
            for layer, diff_id, chain, task in zip(layers, diff_ids, chains, fetching, strict=True):
                if await task:
                    await self._unpack(layer, parent, diff_id)
                parent = chain
        finally:
            for task in fetching:
                task.cancel()
            await asyncio.gather(*fetching, return_exceptions=True)

    async def _fetch(self, layer: Descriptor, chain: str) -> bool:
        """Have a layer's blob; False if the layer is unpacked already."""
        if self._store.layers.get(chain) is not None:
            self._tell("Already exists", layer)
            return False
        if self._slots.locked():
            self._tell("Waiting", layer)
        async with self._slots:
            bar = Throttled(self._progress, self._store.clock, "Downloading", layer)
            await self._downloads.fetch(self._source, layer, bar)
        self._tell("Verifying Checksum", layer)
        self._tell("Download complete", layer)
        return True

    async def _unpack(self, layer: Descriptor, parent: str | None, diff_id: str) -> None:
        bar = Throttled(self._progress, self._store.clock, "Extracting", layer)
        bar(0)
        blob = self._store.blobs.stored(layer.digest)
        await asyncio.to_thread(
            self._store.layers.add, parent, LayerBlob(blob, Encoding.NONE), diff_id
        )
        bar(layer.size)
        await asyncio.to_thread(self._store.layers.remember_blob, diff_id, self._name.name, blob)
        self._tell("Pull complete", layer)

    def _publish(self, raw: bytes, chosen: RemoteManifest) -> Image:
        manifest = self._store.blobs.put(chosen.data)
        return self._store.add(raw, manifest=manifest.digest)

    def _tag(self, image: Image, top: RemoteManifest) -> None:
        self._store.tag(image.id, self._name.with_digest(top.digest), announce=False)
        if self._name.tag and not self._name.digest:
            self._store.tag(image.id, self._name, announce=False)
        self._store.announce("pull", image.id, self._name.familiar)

    def _tell(self, status: str, layer: Descriptor) -> None:
        self._progress(
            Message(status=status, id=short(layer.digest), progress_detail=ProgressDetail())
        )


class Throttled:
    """Draws a bar at most ten times a second, and at its end.

    Args:
        progress: told.
        clock: tells the time.
        status: what is going on.
        blob: of which blob.
    """

    def __init__(self, progress: Sink, clock: Clock, status: str, blob: Descriptor) -> None:
        self._progress = progress
        self._clock = clock
        self._status = status
        self._blob = blob
        self._last_ns = -_STEP_NS

    def __call__(self, done: int) -> None:
        """So many bytes are done."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._last_ns >= _STEP_NS or done >= self._blob.size:
            self._last_ns = now_ns
            self._progress(moving(self._status, short(self._blob.digest), done, self._blob.size))


def short(digest: str) -> str:
    """The first twelve digits."""
    return digest.partition(":")[2][:12]


def _for_platform(offered: Sequence[Descriptor], wanted: Platform) -> Descriptor | None:
    """The entry for a platform: the very variant first, then any that will do."""
    fitting = [one for one in offered if one.platform is not None and wanted.accepts(one.platform)]
    for one in fitting:
        if one.platform and one.platform.normalised().variant == wanted.normalised().variant:
            return one
    return fitting[0] if fitting else None
