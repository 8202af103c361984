"""Small files written so that a crash leaves the old content or the new, never a mixture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazarette.storage.mounts import AnyPath


def write_atomic(path: AnyPath, data: bytes, mode: int = 0o600) -> None:
    """Replace a file's content: temporary file, fsync, rename, fsync of the folder."""
    encoded = os.fsencode(path)
    folder = os.path.dirname(encoded) or b"."
    temporary = os.path.join(folder, b".tmp-" + os.urandom(8).hex().encode())
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.rename(temporary, encoded)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(folder)


def sync_folder(path: AnyPath) -> None:
    """Make renames and creations in a folder durable."""
    descriptor = os.open(os.fsencode(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
