"""A source that nobody waits for until something is fetched.

A server that begins again, after a kill or a reboot, may find the store away.  What it must
know of the source before anyone reads is kept beside the local tree: :class:`Facts`.  Whoever
knows it when the tree is made writes it there, and the first server need not wait either.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.fuse.source import Source, SourceEntry, Totals

log = logging.getLogger(__name__)

FACTS = "source.json"
"""Name of the file with a source's facts, beside the local tree."""


class Facts(msgspec.Struct, frozen=True):
    """What never changes about a source.

    Attributes:
        block_size: unit of fetching, bytes.
        files, bytes: how much there is to bring.
        root: its root folder; None if only the source itself can tell.
    """

    block_size: int
    files: int
    bytes: int
    root: SourceEntry | None = None

    @staticmethod
    def load(path: Path) -> Facts | None:
        """What was saved; None when nothing whole is there."""
        try:
            return jsontext.decode(path.read_bytes(), type=Facts)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def save(self, path: Path) -> None:
        """Write them whole or not at all, and onto the disk."""
        beside = path.with_name(path.name + ".new")
        with open(beside, "wb") as stream:
            stream.write(msgspec.json.encode(self))
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(beside, path)


class LateSource:
    """Implements :class:`Source`; the calls of many threads wait for one opening.

    Args:
        opening: makes the source; what it raises is raised by each call that waited for it, and
            the next call tries again.
        path: file where its facts are kept.
    """

    def __init__(self, opening: Callable[[], Source], path: Path) -> None:
        self._opening = opening
        self._path = path
        self._facts = Facts.load(path)
        self._lock = threading.Lock()
        self._opened: Future[Source] | None = None

    @property
    def block_size(self) -> int:
        """See :attr:`Source.block_size`."""
        return self._known().block_size

    def totals(self) -> Totals:
        """See :meth:`Source.totals`."""
        return Totals(self._known().files, self._known().bytes)

    def root(self) -> SourceEntry:
        """See :meth:`Source.root`."""
        known = None if self._facts is None else self._facts.root
        return known or self._source().root()

    def entries(self, folder: bytes) -> Iterable[SourceEntry]:
        """See :meth:`Source.entries`."""
        return self._source().entries(folder)

    def read(self, file: bytes, offset: int, length: int) -> bytes:
        """See :meth:`Source.read`."""
        return self._source().read(file, offset, length)

    def warm(self) -> None:
        """Begin to open the source, so that whoever reads first finds it open."""
        threading.Thread(target=self._open_early, name="fuse-source", daemon=True).start()

    def _open_early(self) -> None:
        try:
            self._source()
        except OSError as refused:
            log.info("the source cannot be opened yet: %s", refused)

    def _known(self) -> Facts:
        if self._facts is None:
            source = self._source()
            totals = source.totals()
            self._facts = Facts(source.block_size, totals.files, totals.bytes)
            self._facts.save(self._path)
        return self._facts

    def _source(self) -> Source:
        with self._lock:
            opened, mine = self._opened, self._opened is None
            if opened is None:
                opened = self._opened = Future()
        if mine:
            try:
                opened.set_result(self._opening())
            except BaseException as failed:
                self._opened = None
                opened.set_exception(failed)
                raise
        return opened.result()
