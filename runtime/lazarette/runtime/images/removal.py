"""``docker rmi`` and ``docker image prune``: who may be removed, and what goes with it.

The rules and texts are the Engine's (moby, ``daemon/images/image_delete.go``): hard
conflicts (a running container, images built on it) hold even with ``force``; soft ones
(several repositories, a stopped container) give way to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lazarette.runtime.images.errors import ImageConflict, PruneRunning
from lazarette.runtime.images.model import Image
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.store import ImageStore


@dataclass(frozen=True, slots=True)
class Removed:
    """One step of a removal: a name taken away, or an image or layer deleted."""

    untagged: str = ""
    deleted: str = ""


@dataclass(frozen=True, slots=True)
class _Refusal:
    message: str
    hard: bool = False
    used: bool = False


class Remover:
    """Removes images from a store by the Engine's rules.

    Args:
        store: the images.
    """

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._pruning = threading.Lock()

    def remove(self, ref: str, *, force: bool = False, prune: bool = True) -> list[Removed]:
        """Remove a name, and the image with its last one; or an image by its id.

        Args:
            ref: as for :meth:`ImageStore.get`.
            force: override soft conflicts.
            prune: remove untagged parents too.

        Raises:
            ImageNotFound: no such image.
            ImageConflict: it is used, tagged elsewhere or built upon.
        """
        image = self._store.get(ref)
        done: list[Removed] = []
        names = self._store.references(image.id)
        if image.id.removeprefix("sha256:").startswith(ref.removeprefix("sha256:")):
            if _one_repository(names):
                self._check(image.id, soft=not force, references=False)
                for name in names:
                    self._untag(image.id, name, done)
            quiet = False
        else:
            named = self._store.named(ref)
            assert named is not None  # get() found it, and not by its id
            if not force and _one_repository(names):
                self._check_last_name(image, ref)
            self._untag_repository(image.id, named, done)
            if self._store.references(image.id):
                return done
            quiet = True
        self._delete(image.id, done, force=force, prune=prune, quiet=quiet)
        return done

    def prune(
        self, wanted: Callable[[Image], bool], *, dangling: bool
    ) -> tuple[list[Removed], int]:
        """Remove images no container uses.

        Args:
            wanted: further condition, from the filters.
            dangling: only images without a tag.

        Returns:
            What was removed, and bytes freed.

        Raises:
            PruneRunning: another prune has not ended.
        """
        if not self._pruning.acquire(blocking=False):
            raise PruneRunning
        try:
            before = self._layer_bytes()
            done: list[Removed] = []
            for image in self._store.all():
                if self._prunable(image, dangling) and wanted(image):
                    self._prune_one(image, done)
            return done, max(before - self._layer_bytes(), 0)
        finally:
            self._pruning.release()

    def _prunable(self, image: Image, dangling: bool) -> bool:
        if dangling and image.tags:
            return False
        return not self._store.users(image.id) and not self._store.children(image.id)

    def _prune_one(self, image: Image, done: list[Removed]) -> None:
        try:
            for name in self._store.references(image.id):
                self._untag(image.id, name, done)
            self._delete(image.id, done, force=False, prune=True, quiet=False)
        except ImageConflict:
            return  # a container came in between

    def _layer_bytes(self) -> int:
        return sum(layer.size for layer in self._store.layers.all())

    def _untag(self, image_id: str, name: Reference, done: list[Removed]) -> None:
        self._store.untag(name)
        done.append(Removed(untagged=name.familiar))
        self._store.announce("untag", image_id, name.familiar)

    def _untag_repository(self, image_id: str, named: Reference, done: list[Removed]) -> None:
        """Take a name away; with the last tag of a repository its digests go too."""
        name = named.with_digest(named.digest) if named.digest else named
        self._untag(image_id, name, done)
        same = [other for other in self._store.references(image_id) if other.name == name.name]
        if not name.digest and not any(other.tag for other in same):
            for other in same:
                self._untag(image_id, other, done)

    def _delete(
        self, image_id: str, done: list[Removed], *, force: bool, prune: bool, quiet: bool
    ) -> None:
        refusal = self._refusal(image_id, soft=not force, references=True)
        if refusal is not None:
            if quiet and (refusal.used or self._has_names_or_children(image_id)):
                return
            raise _conflict(image_id, refusal)
        parent = self._store.get(image_id).parent
        for name in self._store.references(image_id):
            self._untag(image_id, name, done)
        labels = dict(self._store.config(image_id).run.labels or {})
        layers = self._store.forget(image_id)
        self._store.events.publish("image", "delete", image_id, labels | {"name": image_id})
        done.append(Removed(deleted=image_id))
        done.extend(Removed(deleted=layer) for layer in layers)
        if prune and parent and self._store.find(parent) and not self._store.references(parent):
            self._delete(parent, done, force=False, prune=True, quiet=True)

    def _has_names_or_children(self, image_id: str) -> bool:
        return bool(self._store.references(image_id) or self._store.children(image_id))

    def _check(self, image_id: str, *, soft: bool, references: bool) -> None:
        refusal = self._refusal(image_id, soft=soft, references=references)
        if refusal is not None:
            raise _conflict(image_id, refusal)

    def _refusal(self, image_id: str, *, soft: bool, references: bool) -> _Refusal | None:
        uses = self._store.users(image_id)
        if self._store.children(image_id):
            return _Refusal("image has dependent child images", hard=True)
        for use in uses:
            if use.running:
                return _Refusal(
                    f"image is being used by running container {use.container[:12]}",
                    hard=True,
                    used=True,
                )
        if not soft:
            return None
        if references and self._store.references(image_id):
            return _Refusal("image is referenced in multiple repositories")
        if uses:
            return _Refusal(
                f"image is being used by stopped container {uses[0].container[:12]}", used=True
            )
        return None

    def _check_last_name(self, image: Image, ref: str) -> None:
        for use in self._store.users(image.id):
            raise ImageConflict(
                f'conflict: unable to remove repository reference "{ref}" (must force)'
                f" - container {use.container[:12]} is using its referenced image {image.short_id}"
            )


def _conflict(image_id: str, refusal: _Refusal) -> ImageConflict:
    how = "cannot be forced" if refusal.hard else "must be forced"
    short = image_id.removeprefix("sha256:")[:12]
    return ImageConflict(f"conflict: unable to delete {short} ({how}) - {refusal.message}")


def _one_repository(names: list[Reference]) -> bool:
    """Whether at most one tag, and only one repository, names an image."""
    return len({name.name for name in names}) <= 1 and sum(bool(name.tag) for name in names) <= 1
