"""``docker push``: an image to a registry.

An image that was pulled goes out with the manifest it came with, so that its digest is
the same everywhere.  Others get a manifest of Docker's schema 2 with gzip layers, which
every registry and engine takes; layers kept as zstd are packed anew, to the same bytes
every time.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from lazarette.runtime.images import model
from lazarette.runtime.images.blobs import Blob, BlobWriter
from lazarette.runtime.images.compression import Encoding, read_up_to
from lazarette.runtime.images.errors import RegistryFault
from lazarette.runtime.images.layers import Layer
from lazarette.runtime.images.model import Descriptor, Image, Manifest, decode, encode
from lazarette.runtime.images.progress import Message, ProgressDetail, Sink
from lazarette.runtime.images.pull import Throttled, short
from lazarette.runtime.images.reference import Reference, parse
from lazarette.runtime.images.registry import Repository
from lazarette.runtime.images.store import ImageStore

_GZIP_LEVEL = 4
_GZIP_HEADER = 31
_GZIP_BLOCK = 4 << 20
_ATTEMPTS = 3


class Push:
    """One push of one tag.

    Args:
        store: where the image is.
        target: the repository.
        name: the tag, as the user named it.
        progress: told of everything.
        parallel: layers sent at once.
    """

    def __init__(
        self,
        store: ImageStore,
        target: Repository,
        name: Reference,
        *,
        progress: Sink,
        parallel: int,
    ) -> None:
        self._store = store
        self._target = target
        self._name = name
        self._progress = progress
        self._slots = asyncio.Semaphore(parallel)

    async def run(self) -> str:
        """Send what the registry lacks, then the manifest; its digest.

        Raises:
            ImageNotFound: no such image.
            LoginFailed: the registry refuses the login.
            RegistryFault: it failed.
        """
        async with self._store.adding():
            image = self._store.get(str(self._name))
            layers = self._store.layers_of(image)
            for layer in layers:
                self._tell("Preparing", layer.diff_id)
            original = self._original(image, layers)
            sent = await self._send_layers(layers, original)
            config = self._store.blobs.stored(image.id)
            if not await self._target.has_blob(image.id):
                path = self._store.blobs.path(image.id)
                await self._target.upload(path, config, lambda _: None)
            data, media_type = original or self._manifest(config, sent)
            digest = await self._target.put_manifest(self._name.tag, data, media_type)
            await asyncio.to_thread(
                self._store.tag, image.id, self._name.with_digest(digest), announce=False
            )
            self._store.announce("push", image.id, self._name.familiar)
        self._progress(Message(status=f"{self._name.tag}: digest: {digest} size: {len(data)}"))
        aux: dict[str, object] = {"Tag": self._name.tag, "Digest": digest, "Size": len(data)}
        self._progress(Message(progress_detail=ProgressDetail(), aux=aux))
        return digest

    def _original(self, image: Image, layers: Sequence[Layer]) -> tuple[bytes, str] | None:
        """The manifest the image came with, if the layers are still those blobs."""
        if not image.manifest or not self._store.blobs.has(image.manifest):
            return None
        data = self._store.blobs.read(image.manifest)
        manifest = decode(data, Manifest, "image manifest")
        blobs = [layer.blob.digest for layer in layers]
        if [layer.digest for layer in manifest.layers] != blobs:
            return None
        return data, manifest.media_type or model.OCI_MANIFEST

    async def _send_layers(
        self, layers: Sequence[Layer], original: tuple[bytes, str] | None
    ) -> list[Descriptor]:
        tasks = [
            asyncio.create_task(self._send_layer(layer, original is not None)) for layer in layers
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_layer(self, layer: Layer, as_it_is: bool) -> Descriptor:
        if self._slots.locked():
            self._tell("Waiting", layer.diff_id)
        async with self._slots:
            if as_it_is or layer.encoding is Encoding.GZIP:
                path = self._store.blobs.path(layer.blob.digest)
                return await self._send_blob(layer, path, layer.blob)
            if (known := await self._already_there(layer)) is not None:
                return known
            with tempfile.TemporaryDirectory(dir=self._store.blobs.ingest) as folder:
                path = Path(folder) / "layer.gz"
                blob = await asyncio.to_thread(self._pack, layer, path)
                return await self._send_blob(layer, path, blob)

    async def _already_there(self, layer: Layer) -> Descriptor | None:
        """A layer some repository got from here before: no need to pack it to see."""
        for blob in set(self._store.layers.remembered_blobs(layer.diff_id).values()):
            if await self._target.has_blob(blob.digest):
                self._tell("Layer already exists", layer.diff_id)
                self._remember(layer, blob)
                return _gzip_descriptor(blob)
        return None

    async def _send_blob(self, layer: Layer, path: Path, blob: Blob) -> Descriptor:
        if await self._target.has_blob(blob.digest):
            self._tell("Layer already exists", layer.diff_id)
        elif (source := await self._mounted(layer, blob)) is not None:
            self._tell(f"Mounted from {source}", layer.diff_id)
        else:
            await self._upload(layer, path, blob)
            self._tell("Pushed", layer.diff_id)
        self._remember(layer, blob)
        return _gzip_descriptor(blob)

    async def _mounted(self, layer: Layer, blob: Blob) -> str | None:
        for repository, known in self._store.layers.remembered_blobs(layer.diff_id).items():
            other = parse(repository)
            near = other.domain == self._name.domain and other.path != self._name.path
            if near and known == blob and await self._target.mount(blob.digest, other.path):
                return other.path
        return None

    async def _upload(self, layer: Layer, path: Path, blob: Blob) -> None:
        shown = Descriptor(digest=layer.diff_id, size=blob.size)
        bar = Throttled(self._progress, self._store.clock, "Pushing", shown)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._target.upload(path, blob, bar)
                return
            except RegistryFault:
                if attempt == _ATTEMPTS:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)

    def _pack(self, layer: Layer, path: Path) -> Blob:
        with path.open("wb", buffering=0) as file, self._store.layers.open_tar(layer) as tar:
            writer = BlobWriter(file)
            for member in gzip_members(tar):
                writer.write(member)
        return writer.blob

    @staticmethod
    def _manifest(config: Blob, layers: Sequence[Descriptor]) -> tuple[bytes, str]:
        made = Manifest(
            media_type=model.DOCKER_MANIFEST,
            config=Descriptor(
                media_type=model.DOCKER_CONFIG, digest=config.digest, size=config.size
            ),
            layers=list(layers),
        )
        return encode(made), model.DOCKER_MANIFEST

    def _remember(self, layer: Layer, blob: Blob) -> None:
        self._store.layers.remember_blob(layer.diff_id, self._name.name, blob)

    def _tell(self, status: str, diff_id: str) -> None:
        self._progress(Message(status=status, id=short(diff_id), progress_detail=ProgressDetail()))


def gzip_members(plain: BinaryIO) -> Iterator[bytes]:
    """A stream as gzip, packed on all processors: one member for every 4 MiB.

    Members one after the other are one gzip file (RFC 1952, 2.2); the same bytes come of
    the same stream, whatever the number of processors.
    """
    workers = os.cpu_count() or 1
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while block := read_up_to(plain, _GZIP_BLOCK):
            waiting.append(pool.submit(_gzip_member, block))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _gzip_member(block: bytes) -> bytes:
    packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_HEADER)
    return packer.compress(block) + packer.flush()


def _gzip_descriptor(blob: Blob) -> Descriptor:
    return Descriptor(media_type=model.DOCKER_LAYER_GZIP, digest=blob.digest, size=blob.size)
