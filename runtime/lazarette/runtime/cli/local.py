"""Work on a repository without a daemon: the job runs in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec

from lazarette.backup.jobs.access import init_repository, open_repository
from lazarette.backup.jobs.model import Job, Progress, Request, Result, StoreAccess
from lazarette.backup.jobs.run import execute
from lazarette.backup.repository.keys import KeyFile
from lazarette.backup.repository.kit import RecoveryKit
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.open import of_now
from lazarette.runtime.cli import output
from lazarette.runtime.cli.secrets import key_folder
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import EXIT_OK, EXIT_WARNINGS


def with_key(access: StoreAccess) -> StoreAccess:
    """``access`` with the key kept for its store, unless a secret was given."""
    if access.key:
        return access
    import os

    path = key_folder() / _file_name(access.url)
    if not path.exists():
        return access
    key = KeyFile.read(os.fspath(path)).secret.hex()
    return msgspec.structs.replace(access, key=key, key_kind="file")


def init(access: StoreAccess) -> RecoveryKit:
    """Make a repository; without a passphrase or key file a key is kept for it here."""
    fresh = None if access.key else KeyFile.generate()
    if fresh is not None:
        access = msgspec.structs.replace(access, key=fresh.secret.hex(), key_kind="file")
    repository, kit = init_repository(access, SystemClock())
    repository.close()
    if fresh is not None:
        folder = key_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh.write(str(folder / _file_name(access.url)))
    return kit


@contextmanager
def opened(access: StoreAccess) -> Iterator[Repository]:
    """An open repository."""
    repository = open_repository(with_key(access), SystemClock())
    try:
        yield repository
    finally:
        repository.close()


def perform(job: Job, access: StoreAccess, title: str, as_json: bool) -> Result:
    """Run a job here with a progress bar; Ctrl-C stops it at its next safe point.

    Raises:
        LazaretteError: it failed.
    """
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with output.Bar(title, quiet=as_json) as bar:

            def show(progress: Progress) -> None:
                bar.show({"done": progress.done, "total": progress.total})

            result = execute(Request(job, with_key(access)), show, stop.is_set)
    finally:
        signal.signal(signal.SIGINT, before)
    raise_failure(result)
    return result


def raise_failure(result: Result) -> None:
    """Raise what a job failed with."""
    if result.failure is not None:
        raise result.failure.error()


def finish(result: Result) -> int:
    """Print the warnings of a finished job; its exit code."""
    for warning in result.warnings:
        click.echo(f"warning: {output.printable(warning)}", err=True)
    return EXIT_WARNINGS if result.outcome == "warnings" else EXIT_OK


def _file_name(url: str) -> str:
    from hashlib import blake2b

    return blake2b(of_now(url).encode(), digest_size=16).hexdigest() + ".key"
