"""Job processes: started, watched, found again after the daemon was killed.

A job is a process of its own session with a folder under the daemon's data root.  The
daemon needs nothing but that folder and the process id to follow it, so killing the
daemon neither ends a job nor loses its result.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazarette.backup.jobs.model import (
    PROGRESS_FILE,
    RESULT_FILE,
    Failure,
    Progress,
    Request,
    Result,
)
from lazarette.fuse import jsontext
from lazarette.storage.files import write_atomic
from lazarette.storage.process import spawn

_POLL_S = 0.05
_PROCESS_FILE = "process"
_MODULE = "lazarette.backup.jobs"


class _Process(msgspec.Struct):
    """A process told apart from a later one with the same number by its start time."""

    pid: int
    started: str


@dataclass(frozen=True)
class Job:
    """A job that was started, by this daemon or the one before."""

    id: str
    folder: Path
    pid: int
    started: str

    def alive(self) -> bool:
        """Whether its process still runs."""
        return _start_time(self.pid) == self.started


class JobRunner:
    """Starts and follows jobs.

    Args:
        root: the folder of their folders.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def start(self, job_id: str, request: Request) -> Job:
        """Start a job process; secrets go down its standard input."""
        folder = self._root / job_id
        folder.mkdir(mode=0o700)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            process = spawn(
                [sys.executable, "-m", _MODULE, str(folder)],
                env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8"},
                stdin=reader,
                stdout=log,
                stderr=log,
            )
        finally:
            os.close(reader)
            os.close(log)
        process.returncode = 0  # the watcher waits for it, by number, as for an adopted one
        started = _start_time(process.pid)
        known = _Process(process.pid, started)
        write_atomic(folder / _PROCESS_FILE, msgspec.json.encode(known))
        with os.fdopen(writer, "wb") as pipe, suppress(BrokenPipeError):
            pipe.write(msgspec.json.encode(request))
        return Job(job_id, folder, process.pid, started)

    async def run(
        self, request: Request, show: Callable[[Progress], None] = lambda progress: None
    ) -> Result:
        """Start a job, follow it to its end, and forget it."""
        job_id = secrets.token_hex(16)
        started = self.start(job_id, request)
        try:
            return await self.watch(started, show)
        finally:
            self.discard(job_id)

    def find(self, job_id: str) -> Job | None:
        """A job of an earlier daemon, running or ended; None when it never started."""
        folder = self._root / job_id
        try:
            known = jsontext.decode((folder / _PROCESS_FILE).read_bytes(), type=_Process)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return Job(job_id, folder, known.pid, known.started)

    async def watch(self, job: Job, show: Callable[[Progress], None]) -> Result:
        """Follow a job to its end.

        A job that ended without a result (killed, crashed) is a failed one.
        """
        seen = b""
        while True:
            alive = await asyncio.to_thread(self._reap_or_alive, job)
            with suppress(FileNotFoundError, msgspec.DecodeError):
                raw = (job.folder / PROGRESS_FILE).read_bytes()
                if raw != seen:
                    seen = raw
                    show(jsontext.decode(raw, type=Progress))
            if not alive:
                return self._result(job)
            await asyncio.sleep(_POLL_S)

    def cancel(self, job: Job) -> None:
        """Ask a job to stop at its next safe point."""
        if job.alive():
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)

    def sweep(self, known: Collection[str]) -> list[Job]:
        """Remove the folders of dead jobs that nobody will ask for; the living among them.

        Args:
            known: ids of jobs that somebody follows.
        """
        living = []
        for folder in self._root.iterdir():
            job = None if folder.name in known else self.find(folder.name)
            if job is not None and job.alive():
                living.append(job)
            elif folder.name not in known:
                self.discard(folder.name)
        return living

    def discard(self, job_id: str) -> None:
        """Remove the folder of a job whose result has been recorded."""
        shutil.rmtree(self._root / job_id, ignore_errors=True)

    @staticmethod
    def _reap_or_alive(job: Job) -> bool:
        with suppress(ChildProcessError):
            return os.waitpid(job.pid, os.WNOHANG)[0] == 0
        return job.alive()

    @staticmethod
    def _result(job: Job) -> Result:
        try:
            raw = (job.folder / RESULT_FILE).read_bytes()
            return jsontext.decode(raw, type=Result)
        except (FileNotFoundError, msgspec.DecodeError):
            said = b""
            with suppress(FileNotFoundError):
                said = (job.folder / "log").read_bytes()[-2000:]
            lines = said.decode(errors="replace").strip().splitlines()
            why = f": {lines[-1]}" if lines else ""
            return Result(
                "failed", failure=Failure(111, f"the job process ended without a result{why}")
            )


def _start_time(pid: int) -> str:
    """Field 22 of ``/proc/PID/stat`` (proc(5)), or empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
