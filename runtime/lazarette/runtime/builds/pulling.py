"""Base images from registries, for builds that run in threads."""

from __future__ import annotations

import asyncio

import msgspec

from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.builds.progress import Emit
from lazarette.runtime.images import reference
from lazarette.runtime.images.errors import ImageNotFound, InvalidReference
from lazarette.runtime.images.model import parse_platform
from lazarette.runtime.images.progress import Message
from lazarette.runtime.images.registries import Registries


class RegistryPull:
    """See :class:`lazarette.runtime.builds.work.Pull`.

    Args:
        registries: asked.
        loop: where they run.
    """

    def __init__(self, registries: Registries, loop: asyncio.AbstractEventLoop) -> None:
        self._registries = registries
        self._loop = loop

    def __call__(self, ref: str, platform: str, options: BuildOptions, emit: Emit) -> None:
        """Fetch; blocks."""
        try:
            name = reference.parse(ref).with_default_tag()
        except InvalidReference as bad:
            raise ImageNotFound(ref) from bad

        def progress(message: Message) -> None:
            emit(msgspec.to_builtins(message))

        fetching = self._registries.pull(
            name,
            auth=options.auths.get(name.domain, ""),
            platform=parse_platform(platform),
            progress=progress,
        )
        asyncio.run_coroutine_threadsafe(fetching, self._loop).result()
