"""``laz cp``: tar streams between a container and this machine."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon


_SPOOL = 8 << 20


def copy_out(daemon: Daemon, container: str, path: str, target: str) -> None:
    """Copy a path of a container to ``target``; ``-`` writes the tar to standard output."""
    chunks, stat = daemon.get_archive(container, path)
    if target == "-":
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
        return
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL) as spool:
        for chunk in chunks:
            spool.write(chunk)
        spool.seek(0)
        with tarfile.open(fileobj=spool) as archive:
            _unpack(archive, target, str(stat["name"]))


def _unpack(archive: tarfile.TarFile, target: str, name: str) -> None:
    """Below a folder that exists under its own name, else under the name of ``target``."""
    into = target if os.path.isdir(target) else os.path.dirname(os.path.abspath(target))
    renamed = name if os.path.isdir(target) else os.path.basename(os.path.abspath(target))
    members = archive.getmembers()
    for member in members:
        if member.name == name or member.name.startswith(name + "/"):
            member.name = renamed + member.name[len(name) :]
    archive.extractall(into, members=members, filter="tar")


def copy_in(daemon: Daemon, source: str, container: str, path: str) -> None:
    """Copy a file or folder of this machine (``-``: a tar) into a container."""
    if source == "-":
        daemon.put_archive(container, path, sys.stdin.buffer)
        return
    base, name = _destination(daemon, container, path, os.path.basename(source.rstrip("/")))
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL) as spool:
        with tarfile.open(fileobj=spool, mode="w") as archive:
            archive.add(source, arcname="." if source.endswith("/.") else name)
        spool.seek(0)
        daemon.put_archive(container, base, io.BufferedReader(spool))


def _destination(daemon: Daemon, container: str, path: str, name: str) -> tuple[str, str]:
    """The folder to unpack in and the name to give, as ``cp`` decides them."""
    import docker.errors

    try:
        chunks, stat = daemon.get_archive(container, path, chunk_size=512)
        chunks.close()
    except docker.errors.NotFound:
        return os.path.dirname(path.rstrip("/")) or "/", os.path.basename(path.rstrip("/"))
    if int(stat["mode"]) & 1 << 31:
        return path, name
    return os.path.dirname(path) or "/", os.path.basename(path)
