"""Images kept beside the volumes they serve, for the day no registry has them.

An image is stored once a repository, as the snapshot of a folder that holds its archive
(the form of ``docker save``, layers uncompressed, so that the chunks of shared layers are
stored once).  Its snapshots carry the name ``image:`` and the image's digest.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from pathlib import Path
from typing import Protocol

from lazarette.backup.jobs.model import BackupJob, Request, RestoreJob, Result
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.storage.errors import InternalError, NotFound

PREFIX = "image:"
_ARCHIVE = "image.tar"


class ImageArchives(Protocol):
    """Writes and reads image archives."""

    def save_archive(self, image_id: str, names: list[str], path: Path) -> None:
        """Write one image with its names; blocks."""
        ...

    def load_archive(self, path: Path) -> None:
        """Load what :meth:`save_archive` wrote; blocks."""
        ...


class ImageKeep:
    """Images in repositories.

    Args:
        archives: from and to the image store.
        repositories: where they are kept.
        jobs: starts the processes.
        scratch: folder for one archive at a time.
    """

    def __init__(
        self,
        archives: ImageArchives,
        repositories: RepositoryBook,
        jobs: JobRunner,
        scratch: Path,
    ) -> None:
        self._archives = archives
        self._repositories = repositories
        self._jobs = jobs
        self._scratch = scratch
        self._kept: set[tuple[str, str]] = set()
        self._lock = asyncio.Lock()

    async def keep(self, image_id: str, names: list[str], repository: str) -> None:
        """Store an image unless the repository has it.

        Raises:
            InternalError: the job failed.
        """
        known = self._repositories.get(repository)
        async with self._lock:
            if (known.id, image_id) in self._kept:
                return
            opened = await asyncio.to_thread(self._repositories.open, known.name)
            if not await asyncio.to_thread(opened.snapshots, PREFIX + image_id):
                await self._store(image_id, names, known.name)
            self._kept.add((known.id, image_id))

    async def bring(self, image_id: str, repository: str) -> None:
        """Load an image from a repository.

        Raises:
            NotFound: the repository does not have it.
        """
        opened = await asyncio.to_thread(self._repositories.open, repository)
        found = await asyncio.to_thread(opened.snapshots, PREFIX + image_id)
        if not found:
            raise NotFound(
                f"image {image_id} is neither here, nor in a registry, nor in the repository"
            )
        folder = self._folder()
        try:
            await self._job(RestoreJob(found[-1].id, str(folder)), repository)
            await asyncio.to_thread(self._archives.load_archive, folder / _ARCHIVE)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _store(self, image_id: str, names: list[str], repository: str) -> None:
        folder = self._folder()
        try:
            await asyncio.to_thread(self._archives.save_archive, image_id, names, folder / _ARCHIVE)
            job = BackupJob(
                str(folder), PREFIX + image_id, socket.gethostname(), consistency="crash"
            )
            await self._job(job, repository)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _job(self, job: BackupJob | RestoreJob, repository: str) -> Result:
        access = self._repositories.get(repository).access
        result = await self._jobs.run(Request(job, access, str(self._repositories.cache)))
        if result.failure is not None:
            raise InternalError(result.failure.message, hint=result.failure.hint)
        return result

    def _folder(self) -> Path:
        folder = self._scratch / secrets.token_hex(8)
        folder.mkdir(parents=True, mode=0o700)
        return folder
