"""inotify for the event loop: wake whoever follows a folder when something in it changes.

Format of the events and flags: ``inotify(7)``.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.runtime.containers.errors import HostFault

_MODIFY, _MOVED_TO, _CREATE, _DELETE_SELF = 0x2, 0x80, 0x100, 0x400
_NONBLOCK, _CLOEXEC = 0x800, 0x80000
_HEADER = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class FolderWatch:
    """Watches folders for writes, new files and renames.

    Must be made inside the loop; :meth:`close` ends it.
    """

    def __init__(self) -> None:
        self._fd = int(_libc.inotify_init1(_NONBLOCK | _CLOEXEC))
        if self._fd < 0:
            number = ctypes.get_errno()
            raise HostFault(f"inotify_init1: {os.strerror(number)}")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._readable)
        self._events: dict[int, set[asyncio.Event]] = {}

    def close(self) -> None:
        """Stop watching everything."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def following(self, folder: Path) -> Iterator[asyncio.Event]:
        """An event that is set whenever something in the folder changes.

        Raises:
            HostFault: the kernel refuses another watch.
        """
        mask = _MODIFY | _MOVED_TO | _CREATE | _DELETE_SELF
        number = int(_libc.inotify_add_watch(self._fd, os.fsencode(folder), mask))
        if number < 0:
            reason = os.strerror(ctypes.get_errno())
            raise HostFault(f"watch {folder}: {reason}")
        event = asyncio.Event()
        self._events.setdefault(number, set()).add(event)
        try:
            yield event
        finally:
            waiting = self._events.get(number, set())
            waiting.discard(event)
            if not waiting:
                self._events.pop(number, None)
                if self._fd >= 0:
                    _libc.inotify_rm_watch(self._fd, number)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, _mask, _cookie, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size + length
            for event in self._events.get(number, ()):
                event.set()
