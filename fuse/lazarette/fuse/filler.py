"""Bringing a lazy tree here in the background, until nothing is missing."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from lazarette.fuse import layers
from lazarette.fuse.content import Content, Contents
from lazarette.fuse.expand import Expander
from lazarette.fuse.firstreads import SPAN, FirstReads, Place
from lazarette.fuse.layers import Format

log = logging.getLogger(__name__)

_WORKERS = 4
_PAUSE = 2.0
# A reader that comes to what a filler is after waits for that one to give up first.
_DEADLINE = 5.0
_SMALL = 1 << 20


@dataclass(slots=True)
class Progress:
    """How far the filling is.

    Attributes:
        files, bytes: of the source.
        fetched_files: made whole by this server so far.
        filling: a fill is running.
        complete: everything is here and on disk.
        error: why the last fill ended early, or empty.
    """

    files: int
    bytes: int
    fetched_files: int = 0
    filling: bool = False
    complete: bool = False
    error: str = ""


class Filler:
    """Fills one tree; what was read first the last time comes first, then what is small.

    Args:
        root: descriptor of the local tree's root.
        contents: its incomplete files.
        expander: makes the entries of its folders.
        form: names of xattrs.
        first: what is read first.
        progress: told how it goes.
        complete: called when nothing is missing any more.
    """

    def __init__(
        self,
        root: int,
        contents: Contents,
        expander: Expander,
        form: Format,
        first: FirstReads,
        progress: Progress,
        complete: Callable[[], None],
    ) -> None:
        self._root = root
        self._contents = contents
        self._expander = expander
        self._form = form
        self._first = first
        self._progress = progress
        self._complete = complete
        self._rate = 0.0
        self._paces = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def rate(self) -> float:
        """Most bytes a second; 0: as fast as can be."""
        return self._rate

    @rate.setter
    def rate(self, bytes_per_second: float) -> None:
        with self._paces:
            self._rate = bytes_per_second
            self._paces.notify_all()

    def start(self) -> None:
        """Begin; ends by itself, with an error after a pause that is repeated until it works."""
        self._thread = threading.Thread(target=self._run, name="fuse-fill", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Fill no more, and wait for what is under way."""
        self._contents.stopping.set()
        with self._paces:
            self._paces.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _pace(self, length: int) -> None:
        """Wait as long as the limit of the moment asks for before so many bytes."""
        began = time.monotonic()
        with self._paces:
            while self._rate > 0 and not self._contents.stopping.is_set():
                left = began + _WORKERS * length / self._rate - time.monotonic()
                if left <= 0:
                    return
                self._paces.wait(left)

    def _run(self) -> None:
        progress, stopping = self._progress, self._contents.stopping
        try:
            with contextlib.suppress(OSError):  # what fails comes in its turn
                self._bring_first()
            while not stopping.is_set():
                try:
                    missing = self._pass()
                except OSError as error:
                    progress.error = str(error)
                    log.warning("filling pauses: %s", error)
                    stopping.wait(_PAUSE)
                    continue
                progress.error = ""
                if missing == 0 and not stopping.is_set():
                    self._first.save()
                    self._complete()
                    return
        finally:
            progress.filling = False

    # -- what was read first the last time ----------------------------------------------

    def _bring_first(self) -> None:
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(_WORKERS, "fuse-first") as pool:
            for place in self._first.known:
                running.add(pool.submit(self._bring_place, place))
                running = _at_most(2 * _WORKERS, running)
            _at_most(0, running)

    def _bring_place(self, place: Place) -> None:
        path, span = place
        *folders, name = path.split(b"/")
        gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with gone, contextlib.ExitStack() as held:
            fd = os.open(b".", layers.DIRECTORY, dir_fd=self._root)
            held.callback(os.close, fd)
            for folder in folders:
                self._expander.expand(fd)
                fd = os.open(folder, layers.DIRECTORY, dir_fd=fd)
                held.callback(os.close, fd)
            self._expander.expand(fd)
            content = self._open_incomplete(fd, name, sys.maxsize)
            if content is None:
                return
            held.callback(self._contents.release, content)
            self._pace(SPAN)
            if not self._contents.stopping.is_set():
                content.ensure(span * SPAN, SPAN, 0)

    # -- everything ---------------------------------------------------------------------

    def _pass(self) -> int:
        """Bring what is missing, everywhere, all names before large files; how many files were."""
        missing = 0
        with ThreadPoolExecutor(_WORKERS, "fuse-filler") as pool:
            for most in (_SMALL, sys.maxsize):
                running: set[Future[None]] = set()
                for content in self._incomplete_files(most):
                    missing += 1
                    try:
                        for start in content.spans():
                            self._contents.hold(content)
                            running.add(pool.submit(self._fill_span, content, start))
                            running = _at_most(2 * _WORKERS, running)
                    finally:
                        self._contents.release(content)
                _at_most(0, running)
        return missing

    def _fill_span(self, content: Content, start: int) -> None:
        try:
            content.fill(start, self._pace, _DEADLINE)
        finally:
            self._contents.release(content)

    def _incomplete_files(self, most: int) -> Iterator[Content]:
        """Incomplete files of at most a size, acquired; folders are expanded on the way."""
        pending = [os.open(b".", layers.DIRECTORY, dir_fd=self._root)]
        try:
            while pending and not self._contents.stopping.is_set():
                fd = pending.pop()
                try:
                    self._expander.expand(fd)
                    with os.scandir(layers.descriptor_path(fd)) as entries:
                        found = [
                            (each.name, each.is_dir(follow_symlinks=False)) for each in entries
                        ]
                    for name, is_dir in found:
                        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                            if is_dir:
                                pending.append(os.open(name, layers.DIRECTORY, dir_fd=fd))
                                continue
                            content = self._open_incomplete(fd, name, most)
                            if content is not None:
                                yield content
                finally:
                    os.close(fd)
        finally:
            for fd in pending:
                os.close(fd)

    def _open_incomplete(self, folder: int, name: bytes, most: int) -> Content | None:
        st = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(st.st_mode) or st.st_size > most:
            return None
        path = layers.entry_path(folder, name)
        if self._form.read(path, self._contents.attribute) is None:
            return None
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            return self._contents.acquire(fd)
        finally:
            os.close(fd)


def _at_most(count: int, running: set[Future[None]]) -> set[Future[None]]:
    """Wait until no more than so many run; the first error of those that ended is raised."""
    while len(running) > count:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
    return running
