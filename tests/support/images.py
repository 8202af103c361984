"""Small real images: busybox from Debian's busybox-static, made once on this machine.

Files are kept under the temporary folder between runs, under a lock, named by what they
are made of; tests only read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from lazarette.runtime.images.assembly import assemble
from lazarette.runtime.images.model import RunConfig

BUSYBOX = Path("/bin/busybox")
PATH_ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CREATED = "2026-01-02T03:04:05Z"
_FORMAT = 1


def tar_of(entries: Iterable[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of those entries, in that order."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tuple):
                entry[0].size = len(entry[1])
                tar.addfile(entry[0], io.BytesIO(entry[1]))
            else:
                tar.addfile(entry)
    return packed.getvalue()


def folder(name: str, mode: int = 0o755) -> tarfile.TarInfo:
    """A directory entry."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    return entry


def file(name: str, data: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    """A file entry."""
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    return entry, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A symbolic (or, by ``kind``, hard) link entry."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def busybox_rootfs() -> Path:
    """The root filesystem as a tar: ``/bin/busybox`` and a link for every applet."""
    return _cached("rootfs.tar", lambda target: target.write(_busybox_tar()))


def busybox_archive(*tags: str, cmd: Sequence[str] = ("sh",)) -> Path:
    """A Docker archive of the busybox image under those names."""
    tags = tags or ("busybox:latest",)
    name = hashlib.sha256("\0".join([*tags, "\0", *cmd]).encode()).hexdigest()[:16]

    def make(target: BinaryIO) -> None:
        config = RunConfig(env=[PATH_ENV], cmd=list(cmd))
        layers = [(busybox_rootfs(), "ADD rootfs.tar /")]
        assemble(target, layers, config=config, tags=tags, created=CREATED)

    return _cached(f"image-{name}.tar", make)


def _busybox_tar() -> bytes:
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, check=True, text=True)
    folders = ("bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var")
    entries: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = [folder(n) for n in folders]
    entries += [folder("tmp", 0o1777), folder("var/tmp", 0o1777), link("usr/sbin", "bin")]
    entries += [link("sbin", "bin"), file("bin/busybox", BUSYBOX.read_bytes(), 0o755)]
    for applet in applets.stdout.split():
        if applet != "busybox":
            entries.append(link(f"bin/{applet}", "busybox", tarfile.SYMTYPE))
    entries.append(link("usr/bin/env", "../../bin/busybox"))
    users = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
    users += "nobody:x:65534:65534:nobody:/home:/bin/false\n"
    entries.append(file("etc/passwd", users.encode()))
    entries.append(file("etc/group", b"root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n"))
    return tar_of(entries)


def _cached(name: str, make: Callable[[BinaryIO], object]) -> Path:
    status = BUSYBOX.stat()
    key = f"{_FORMAT}-{status.st_size}-{status.st_mtime_ns}"
    root = Path(tempfile.gettempdir()) / f"laz-test-images-{os.getuid()}-{key}"
    root.mkdir(exist_ok=True)
    done = root / name
    if not done.exists():
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                fresh = root / f"{name}.new"
                with fresh.open("wb") as target:
                    make(target)
                fresh.rename(done)
    return done
