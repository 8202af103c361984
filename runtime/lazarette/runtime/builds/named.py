"""Named contexts: what ``--build-context NAME=…`` gives a build beside its own context.

A name stands for an image, for a git repository or archive that the daemon fetches, or for a
folder that the client sent before.  It goes before a stage or an image of the same name.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

from lazarette.runtime.builds import context as contexts
from lazarette.runtime.builds import remote
from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.sources import SourceTree
from lazarette.runtime.builds.tree import Tree
from lazarette.storage import beneath
from lazarette.storage.clock import NANOSECONDS, Clock

IMAGE: Final = "docker-image://"
SENT: Final = "sent:"
LIFETIME: Final = 3600 * NANOSECONDS
_TOKEN = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """Folders sent ahead of the build that uses them, each for one build.

    Args:
        folder: where their archives lie.
        clock: an archive nobody asks for within an hour goes.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock

    def recover(self) -> None:
        """Forget what was sent to an earlier daemon."""
        beneath.remove_path(self._folder)

    def put(self, stream: BinaryIO) -> str:
        """Keep a folder's tar.

        Returns:
            The value that names it once: ``sent:…``.

        Raises:
            ContextError: it is too large.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._expire()
        token = secrets.token_hex(16)
        file = self._folder / token
        try:
            contexts.spool(stream, file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return SENT + token

    def take(self, value: str, folder: Path) -> Path:
        """Move what :meth:`put` kept into a build's folder.

        Raises:
            ContextError: it is not there, or no longer.
        """
        token = value.removeprefix(SENT)
        target = folder / f"{token}.tar"
        try:
            if not _TOKEN.fullmatch(token):
                raise FileNotFoundError(token)
            (self._folder / token).rename(target)
        except FileNotFoundError as gone:
            raise ContextError("a named build context is unknown or expired") from gone
        return target

    def _expire(self) -> None:
        oldest = self._clock.now_ns() - LIFETIME
        for file in self._folder.iterdir():
            if file.stat().st_mtime_ns < oldest:
                file.unlink(missing_ok=True)


class NamedContexts:
    """The named contexts of one build; fetched or unpacked when first used.

    Args:
        given: value by name.
        uploads: what clients sent.
        folder: for this build's files.
        until: closes what is opened.

    Raises:
        ContextError: a value that means nothing, or a folder that was not sent.
    """

    def __init__(
        self, given: Mapping[str, str], uploads: Uploads, folder: Path, until: ExitStack
    ) -> None:
        self._given = {name.lower(): value for name, value in given.items()}
        self._folder = folder / "named"
        self._until = until
        self._lock = threading.Lock()
        self._trees: dict[str, SourceTree] = {}
        self._sent: dict[str, Path] = {}
        if given:
            self._folder.mkdir()
        for name, value in self._given.items():
            if value.startswith(SENT):
                self._sent[name] = uploads.take(value, self._folder)
            elif not value.startswith(IMAGE) and not remote.is_remote(value):
                raise ContextError(
                    f"invalid build context {name}={value}",
                    hint=f"a folder, {IMAGE}IMAGE, a git URL or an http URL",
                )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._key(name) in self._given

    def image(self, name: str) -> str:
        """The image a name stands for; empty when it stands for none."""
        value = self._given.get(self._key(name), "")
        return value.removeprefix(IMAGE) if value.startswith(IMAGE) else ""

    def files(self, name: str) -> SourceTree | None:
        """The files a name stands for; None when it stands for an image or nothing."""
        key = self._key(name)
        if key not in self._given or self.image(name):
            return None
        with self._lock:
            if key not in self._trees:
                self._trees[key] = self._opened(key)
            return self._trees[key]

    def _key(self, name: str) -> str:
        """``alpine`` and ``alpine:latest`` are one name, as for images."""
        lowered = name.lower()
        short = lowered.removesuffix(":latest")
        return lowered if lowered in self._given or short not in self._given else short

    def _opened(self, key: str) -> SourceTree:
        shown = f"build context {key}"
        if key in self._sent:
            root = self._folder / secrets.token_hex(8)
            root.mkdir()
            with self._sent[key].open("rb") as file:
                contexts.unpack(file, root)
        else:
            fetched = remote.fetch_context(self._given[key], self._folder)
            if isinstance(fetched, bytes):
                raise ContextError(f"{shown} is a single file: {self._given[key]}")
            root = fetched
        tree = self._until.enter_context(Tree(root))
        return SourceTree(tree, shown, True, {}, contexts.ignore_of(tree))
