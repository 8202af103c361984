"""The image store: which images there are and what they are called.

Semantics
    I1. An image is visible only when its configuration, all its layers and their digests
        were checked and are on the disk; its row is written last.
    I2. Configuration bytes are kept as they came: their digest is the id.
    I3. Blobs and layers are shared; what nothing refers to goes when the last image that
        used it goes, or at the next start.
    I4. While anything is being added (:meth:`ImageStore.working`) nothing is collected, so
        that a pull may rely on the layers it found.
    I5. A tag moves to another image in one transaction; the image it leaves stays, untagged.

All methods may be called from any thread and block; the API calls them in threads.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazarette.runtime.events import EventBus
from lazarette.runtime.images import reference
from lazarette.runtime.images.blobs import BlobStore
from lazarette.runtime.images.compression import UnpackLimits
from lazarette.runtime.images.errors import BadArchive, ImageNotFound, InvalidReference
from lazarette.runtime.images.layers import Layer, LayerStore
from lazarette.runtime.images.model import Image, ImageConfig, chain_ids, decode, layer_key, time_ns
from lazarette.runtime.images.reference import Reference
from lazarette.storage.clock import Clock
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.state import State

MIGRATIONS = (
    """
    CREATE TABLE images (
        id TEXT PRIMARY KEY, parent TEXT NOT NULL, manifest TEXT NOT NULL,
        size INTEGER NOT NULL, tagged_ns INTEGER NOT NULL) STRICT;
    CREATE TABLE image_references (
        name TEXT PRIMARY KEY,
        image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE) STRICT;
    CREATE INDEX image_references_image ON image_references (image)
    """,
)
_SHORTEST_PREFIX = 1


@dataclass(frozen=True, slots=True)
class ImageUse:
    """A container made of an image."""

    container: str
    running: bool


def _nobody(_image: str) -> Sequence[ImageUse]:
    return ()


class ImageStore:
    """All images of this host.

    Args:
        root: folder for blobs.
        layers: driver that unpacks layers.
        state: the daemon's database.
        events: told of tags, untags, deletions and arrivals.
        clock: dates tags.
        limits: what one layer may unpack to.

    Attributes:
        users: asked which containers use an image (its id); set by the engine.
        holders: asked for chain ids that stay although no image has them (build cache);
            to be set before :meth:`recover`.
    """

    def __init__(
        self,
        root: Path,
        layers: LayerDriver,
        state: State,
        events: EventBus,
        clock: Clock,
        limits: UnpackLimits | None = None,
    ) -> None:
        self.clock = clock
        self.events = events
        self.blobs = BlobStore(root)
        self.layers = LayerStore(layers, self.blobs, state, limits)
        self.users: Callable[[str], Sequence[ImageUse]] = _nobody
        self.holders: list[Callable[[], Collection[str]]] = []
        self._state = state
        self._configs: dict[str, ImageConfig] = {}
        self._lock = threading.RLock()
        self._working = 0
        state.migrate("images", MIGRATIONS)

    def recover(self) -> None:
        """Put right what a killed process left; called once at start, after the driver's own."""
        self.blobs.recover(self.clock.now_ns())
        self.layers.recover()
        for row in self._state.rows("SELECT id FROM images"):
            if not self._whole(row["id"]):
                with self._state.write() as db:
                    db.execute("DELETE FROM images WHERE id = ?", (row["id"],))
        self.collect()

    def _whole(self, image_id: str) -> bool:
        if not self.blobs.has(image_id):
            return False
        chain = chain_ids(self.config(image_id).rootfs.diff_ids)
        return all(self.layers.get(layer) is not None for layer in chain)

    # looking up

    def get(self, ref: str) -> Image:
        """An image by id, unique beginning of an id, name, name:tag or name@digest.

        Raises:
            ImageNotFound: there is none, or the beginning fits several.
            InvalidReference: the text cannot be a reference.
        """
        found = self.find(ref)
        if found is None:
            try:
                wanted = reference.parse(ref).with_default_tag().familiar
            except InvalidReference:
                if not _is_hex(ref.removeprefix("sha256:")):
                    raise
                wanted = ref
            raise ImageNotFound(wanted)
        return found

    def find(self, ref: str) -> Image | None:
        """As :meth:`get`, with None for an image that is not there."""
        name = self.named(ref)
        row = None
        if name is not None:
            row = self._state.row(
                "SELECT images.* FROM images JOIN image_references ON images.id = image"
                " WHERE name = ?",
                (str(name.with_digest(name.digest) if name.digest else name),),
            )
        if row is None and _is_hex(prefix := ref.removeprefix("sha256:")):
            rows = self._state.rows(
                "SELECT * FROM images WHERE id >= ? AND id < ? LIMIT 2",
                (f"sha256:{prefix}", f"sha256:{prefix}g"),
            )
            row = rows[0] if len(rows) == 1 else None
        return None if row is None else self._image(row)

    @staticmethod
    def named(ref: str) -> Reference | None:
        """The text as a reference by name; None where it can only be an id."""
        if ref.startswith("sha256:") and _is_hex(ref.removeprefix("sha256:")):
            return None
        try:
            return reference.parse(ref).with_default_tag()
        except InvalidReference:
            return None

    def all(self) -> list[Image]:
        """Every image, newest first."""
        images = [self._image(row) for row in self._state.rows("SELECT * FROM images")]
        return sorted(images, key=lambda image: (-image.created_ns, image.id))

    def children(self, image_id: str) -> list[str]:
        """Ids of images built on one here."""
        rows = self._state.rows("SELECT id FROM images WHERE parent = ?", (image_id,))
        return [row["id"] for row in rows]

    def references(self, image_id: str) -> list[Reference]:
        """Names of an image, tags and digests, sorted."""
        rows = self._state.rows(
            "SELECT name FROM image_references WHERE image = ? ORDER BY name", (image_id,)
        )
        return [reference.parse(row["name"]) for row in rows]

    def config(self, image_id: str) -> ImageConfig:
        """The configuration of an image."""
        known = self._configs.get(image_id)
        if known is None:
            raw = self.blobs.read(image_id)
            known = self._configs[image_id] = decode(raw, ImageConfig, "image configuration")
        return known

    def layers_of(self, image: Image) -> list[Layer]:
        """The layers of an image, lowest first."""
        found = [self.layers.get(chain) for chain in image.chain]
        return [layer for layer in found if layer is not None]

    def _image(self, row: sqlite3.Row) -> Image:
        config = self.config(row["id"])
        chain = chain_ids(config.rootfs.diff_ids)
        names = self.references(row["id"])
        return Image(
            id=row["id"],
            config=config,
            layer=layer_key(chain[-1]) if chain else None,
            chain=chain,
            tags=tuple(name.familiar for name in names if name.tag),
            digests=tuple(name.familiar for name in names if name.digest),
            created_ns=time_ns(config.created),
            tagged_ns=row["tagged_ns"],
            size=row["size"],
            parent=row["parent"],
            manifest=row["manifest"],
        )

    # adding

    @contextmanager
    def working(self) -> Iterator[None]:
        """While inside, nothing is collected (I4)."""
        with self._lock:
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
            self.collect()

    @asynccontextmanager
    async def adding(self) -> AsyncIterator[None]:
        """:meth:`working`, for the event loop: what is collected at its end is so in a thread."""
        with self._lock:
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
            await asyncio.to_thread(self.collect)

    def add(self, config: bytes, *, parent: str = "", manifest: str = "") -> Image:
        """Make an image visible; its layers must have been added.  Within :meth:`working`.

        Args:
            config: the configuration's bytes.
            parent: id of the image it was made from here.
            manifest: digest of the stored manifest it came by.

        Raises:
            BadArchive: the configuration is broken, or a layer it names is missing.
        """
        read = decode(config, ImageConfig, "image configuration")
        size = 0
        for chain in chain_ids(read.rootfs.diff_ids):
            layer = self.layers.get(chain)
            if layer is None:
                raise BadArchive(f"image configuration names a layer that is missing: {chain}")
            size += layer.size
        image_id = self.blobs.put(config).digest
        with self._state.write() as db:
            db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, 0) ON CONFLICT (id) DO UPDATE SET"
                " manifest = CASE excluded.manifest WHEN '' THEN manifest"
                " ELSE excluded.manifest END",
                (image_id, parent, manifest, size),
            )
        return self.get(image_id)

    def tag(self, image_id: str, name: Reference, *, announce: bool = True) -> None:
        """Give an image a name; it is taken from the image that had it.

        Args:
            image_id: the image's full id.
            name: with a tag or a digest; ``latest`` if neither.
            announce: publish Docker's ``tag`` event.

        Raises:
            ImageNotFound: the image is gone.
        """
        name = name.with_default_tag()
        if name.digest:
            name = name.with_digest(name.digest)
        with self._state.write() as db:
            if db.execute("SELECT 1 FROM images WHERE id = ?", (image_id,)).fetchone() is None:
                raise ImageNotFound(image_id)
            db.execute(
                "INSERT INTO image_references VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET image = excluded.image",
                (str(name), image_id),
            )
            db.execute(
                "UPDATE images SET tagged_ns = ? WHERE id = ?", (self.clock.now_ns(), image_id)
            )
        if announce:
            self.announce("tag", image_id, name.familiar)

    # removing: the rules are in removal.py, these are its primitives

    def untag(self, name: Reference) -> None:
        """Take a name away, whoever has it."""
        with self._state.write() as db:
            db.execute("DELETE FROM image_references WHERE name = ?", (str(name),))

    def forget(self, image_id: str) -> list[str]:
        """Remove an image without asking anybody.

        Returns:
            Chain ids of the layers that went with it, topmost first.
        """
        with self._state.write() as db:
            db.execute("DELETE FROM images WHERE id = ?", (image_id,))
            db.execute("UPDATE images SET parent = '' WHERE parent = ?", (image_id,))
        removed = self.collect()
        self._configs.pop(image_id, None)
        return removed

    def collect(self) -> list[str]:
        """Remove layers and blobs nothing refers to, unless something is being added.

        Returns:
            Chain ids removed, topmost first.
        """
        with self._lock:
            if self._working:
                return []
            images = self.all()
            used = {chain for i in images for chain in i.chain}
            used.update(chain for holder in self.holders for chain in holder())
            removed = self.layers.remove_unused(used)
            live = self.layers.live_blobs()
            for image in images:
                live |= {image.id, image.manifest}
            self.blobs.collect(live)
            return removed

    def announce(self, action: str, image_id: str, name: str) -> None:
        """Publish an event about an image, with its labels."""
        labels = dict(self.config(image_id).run.labels or {}) if self.blobs.has(image_id) else {}
        self.events.publish("image", action, image_id, labels | {"name": name})


def _is_hex(text: str) -> bool:
    return len(text) >= _SHORTEST_PREFIX and all(digit in "0123456789abcdef" for digit in text)
