"""Where a step is looked up: this host's records, or the images of ``--cache-from``.

An image serves as cache for a step if its history up to there has the same texts and its
layers begin with the same ones; then the next line of its history is compared.  With
``--cache-from`` nothing else is consulted.
"""

from __future__ import annotations

from lazarette.runtime.builds.cache import BuildCache, Record
from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.builds.state import StageState
from lazarette.runtime.images.model import History, Image, chain_ids, time_ns
from lazarette.runtime.images.store import ImageStore


class CacheSources:
    """For the steps of one stage.

    Args:
        cache: records.
        images: for ``--cache-from``.
        options: of the build.
    """

    def __init__(self, cache: BuildCache, images: ImageStore, options: BuildOptions) -> None:
        self._cache = cache
        self._images = images
        self._only_images = bool(options.cache_from)
        found = (images.find(name) for name in options.cache_from)
        self._sources = [image for image in found if image is not None]

    def find(self, state: StageState, key: str, created_by: str) -> Record | None:
        """What a step gave before; None if it is not known."""
        if not self._only_images:
            return self._cache.find(key)
        for image in self._sources:
            line = _next_line(image, state)
            if line is not None and line.created_by == created_by:
                record = self._record(image, state, key, line)
                if record is not None:
                    self._cache.add(record)
                    return record
        return None

    def _record(self, image: Image, state: StageState, key: str, line: History) -> Record | None:
        diff_ids = image.config.rootfs.diff_ids
        count = len(state.diff_ids)
        made = "" if line.empty_layer else diff_ids[count] if count < len(diff_ids) else ""
        if not made and not line.empty_layer:
            return None
        chain = chain_ids([*state.diff_ids, made] if made else state.diff_ids)
        layer = self._images.layers.get(chain[-1]) if made else None
        return Record(
            key,
            state.key,
            "layer" if made else "metadata",
            line.created_by,
            chain[-1] if chain else "",
            made,
            layer.size if layer is not None else 0,
            time_ns(line.created),
        )


def _next_line(image: Image, state: StageState) -> History | None:
    history = image.config.history or []
    done = len(state.history)
    if len(history) <= done or image.config.rootfs.diff_ids[: len(state.diff_ids)] != (
        state.diff_ids
    ):
        return None
    before = zip(history[:done], state.history, strict=True)
    if any(theirs.created_by != ours.created_by for theirs, ours in before):
        return None
    return history[done]
