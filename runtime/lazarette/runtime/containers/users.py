"""User namespaces of runs: whose ids a container's users have on the host.

With a map a run gets a user namespace, and a network namespace that it owns, both made
before the runtime starts.  Its root and its volumes are mounted with their owners mapped;
what the host gives it by path (binds) is as it is, and not its own.  The map of a run is
noted in its bundle, so that a later daemon with other settings undoes the run as it was
made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.model import HostConfig
from lazarette.storage import mounts
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import IdMap, waiting

NAMESPACE = "userns"
_NOTE = "idmap.json"


@dataclass(frozen=True)
class Namespaces:
    """Where the namespaces of a run with a map are.

    Attributes:
        user: its user namespace.
        network: a new network namespace that it owns; gone unless it is bound.
    """

    user: Path
    network: Path


def check(host: HostConfig, idmap: IdMap | None) -> None:
    """Refuse what takes the host's ids from a container that is to be remapped.

    Args:
        host: what it asks for.
        idmap: the daemon's.

    Raises:
        InvalidArgument: the words are dockerd's.
    """
    if idmap is None or host.userns_mode == "host":
        return
    hint = "run it with --userns=host"
    if host.privileged:
        raise InvalidArgument(
            "privileged mode is incompatible with user namespaces.  You must run the "
            "container in the host namespace when running privileged mode",
            hint=hint,
        )
    for mode, said in (
        (host.network_mode, "host's network namespace"),
        (host.pid_mode, "host PID namespace"),
    ):
        if mode == "host":
            raise InvalidArgument(
                f"cannot share the {said} when user namespaces are enabled", hint=hint
            )


def begin(container: Container, idmap: IdMap | None) -> None:
    """Note the map of the run that begins.

    Args:
        container: whose bundle is made.
        idmap: the daemon's.

    Raises:
        InvalidArgument: the container is to be remapped and cannot be.
    """
    host = container.definition.host
    check(host, idmap)
    container.idmap = None if host.userns_mode == "host" else idmap
    if container.idmap is not None:
        (container.bundle / _NOTE).write_bytes(msgspec.json.encode(container.idmap))


def end(container: Container) -> None:
    """Forget the map of a run that is undone."""
    container.idmap = None


def noted(container: Container) -> IdMap | None:
    """The map of the run whose bundle is there."""
    try:
        return jsontext.decode((container.bundle / _NOTE).read_bytes(), type=IdMap)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def open_roots(roots: Path, idmap: IdMap) -> None:
    """Let remapped users, and nobody else, into the folder where they reach their roots.

    Raises:
        InvalidArgument: a folder above keeps them out.
    """
    uid, gid = idmap.root
    os.chown(roots, 0, gid)
    for folder in roots.parents:
        status = folder.stat()
        mode = status.st_mode
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        if not mode >> shift & 1:
            raise InvalidArgument(
                f"--userns-remap: {folder} keeps the remapped user {uid} out",
                hint=f"chmod o+x {folder}, or give the daemon another --exec-root",
            )


def show_root(rootfs: Path, place: Path, idmap: IdMap | None) -> Path:
    """Let remapped users reach a mounted root; others find nothing there.

    Args:
        rootfs: where it is mounted.
        place: where they reach it, below the folder of :func:`open_roots`.
        idmap: whom they are; None: they are the host's and reach it as it is.

    Returns:
        The path for them.
    """
    if idmap is None:
        return rootfs
    place.mkdir(exist_ok=True)
    mounts.bind(rootfs, place, recursive=False)
    return place


def hide_root(place: Path) -> None:
    """Undo :func:`show_root`; nothing happens if it is undone."""
    if place.exists():
        mounts.unmount(place, detach=True)
        place.rmdir()


@contextmanager
def fresh(idmap: IdMap) -> Iterator[Namespaces]:
    """A new user namespace and a network namespace that it owns, gone after the block.

    Raises:
        MissingFeature: the kernel makes none.
    """
    with waiting(["unshare", "--user", "--net"]) as pid:
        idmap.write(pid)
        yield Namespaces(Path(f"/proc/{pid}/ns/user"), Path(f"/proc/{pid}/ns/net"))


@contextmanager
def namespaces(container: Container, others: list[Container]) -> Iterator[Namespaces | None]:
    """The namespaces of a run, new ones or those of a container it shares others with.

    Args:
        container: noted as a run with a map, or without.
        others: running containers whose namespaces it joins.

    Raises:
        WrongState: their users are not its own.
        MissingFeature: the kernel makes none.
    """
    idmap = container.idmap
    if idmap is None:
        yield None
        return
    joined = [Path(f"/proc/{other.state.pid}/ns/user") for other in others]
    strange = any(other.idmap != idmap for other in others)
    if strange or len({os.readlink(path) for path in joined}) > 1:
        names = ", ".join(other.name for other in others)
        raise WrongState(
            f"cannot join the namespaces of {names}: other users of the host are root there",
            hint="give all of them the same --userns",
        )
    if joined:
        with waiting(["nsenter", f"--user={joined[0]}", "unshare", "--net"]) as pid:
            yield Namespaces(joined[0], Path(f"/proc/{pid}/ns/net"))
        return
    with fresh(idmap) as made:
        own = container.bundle / NAMESPACE
        own.touch()
        mounts.bind(made.user, own, recursive=False)
        yield Namespaces(own, made.network)
