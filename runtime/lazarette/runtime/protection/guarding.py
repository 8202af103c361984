"""The daemon's side of its guardian: started before anything is held, replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lazarette.runtime.containers import pidfd
from lazarette.runtime.protection import guardian
from lazarette.storage.errors import LazaretteError
from lazarette.storage.process import spawn

log = logging.getLogger(__name__)

_AGAIN_S = 1.0


class Guarding:
    """Keeps one guardian alive as long as this daemon lives; see :mod:`.guardian`.

    Args:
        database: the daemon's.
        command: releases what is held and ends.
        log_file: where the guardian and the command write; a new one replaces a large one.
    """

    def __init__(self, database: Path, command: Sequence[str], log_file: Path) -> None:
        self._database = database
        self._command = list(command)
        self._log_file = log_file
        self._pid = 0
        self._unwatch: Callable[[], None] | None = None
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start a guardian; in a running loop."""
        own = os.getpid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        out = os.open(self._log_file, flags, 0o600)
        try:
            process = spawn(
                [
                    *(sys.executable, "-I", "-S", guardian.__file__),
                    *(str(own), str(pidfd.start_time(own)), str(self._database)),
                    *self._command,
                ],
                env=dict(os.environ),
                stdout=out,
                stderr=out,
            )
        finally:
            os.close(out)
        process.returncode = 0  # it is waited for by number
        self._pid = process.pid
        self._unwatch = pidfd.on_exit(process.pid, self._ended)

    def stop(self) -> None:
        """Do not replace it any more; it ends by itself after this daemon, its work done."""
        if self._again is not None:
            self._again.cancel()
        if self._unwatch is not None:
            self._unwatch()

    def _ended(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        log.warning("the guardian was ended; starting another one")
        self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self._start_again)

    def _start_again(self) -> None:
        try:
            self.start()
        except (LazaretteError, OSError) as failed:
            log.error("the guardian does not start: %s", failed)
            self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self._start_again)
