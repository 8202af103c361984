"""Root filesystems made of Debian packages, where no registry can be reached.

``mmdebstrap`` fetches with the host's apt sources and writes a tar; no daemon, no chroot
left behind.  Results are cached by what they were made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lazarette.storage.clock import NANOSECONDS, Clock, SystemClock
from lazarette.storage.errors import MissingFeature
from lazarette.storage.process import CommandFailed, run

DEFAULT_CACHE = Path("/var/cache/lazarette/rootfs")
MAX_AGE = 7 * 24 * 3600
"""Seconds a cached root filesystem is used before security updates are looked for."""

_FORMAT = 2
_TIMEOUT = 1800.0
_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
_LEFT_OUT = ("doc", "man", "info", "locale", "lintian", "bug", "doc-base")


@dataclass(frozen=True)
class Rootfs:
    """What a root filesystem is made of.

    Attributes:
        packages: Debian packages beside the essential ones.
        suite: e.g. ``bookworm``; the host's if empty.
        before: shell commands run before the packages are configured; ``$1`` is the root.
        after: shell commands run at the end; ``$1`` is the root.
    """

    packages: tuple[str, ...] = ()
    suite: str = ""
    before: tuple[str, ...] = field(default=())
    after: tuple[str, ...] = field(default=())

    def key(self) -> str:
        """A name for the cache that differs with anything that matters."""
        parts = [_FORMAT, sorted(self.packages), self.suite, self.before, self.after]
        return hashlib.sha256(json.dumps([*parts, os.uname().machine]).encode()).hexdigest()[:32]


def host_suite(os_release: Path = Path("/etc/os-release")) -> str:
    """The code name of the Debian release this host runs.

    Raises:
        MissingFeature: it is not Debian, or does not say.
    """
    values: dict[str, str] = {}
    with suppress(FileNotFoundError):
        for line in os_release.read_text().splitlines():
            key, _, value = line.partition("=")
            values[key] = value.strip("\"'")
    suite = values.get("VERSION_CODENAME", "")
    if values.get("ID") != "debian" or not suite:
        raise MissingFeature(
            f"{os_release} names no Debian release", hint="name one, e.g. suite bookworm"
        )
    return suite


def build_rootfs(
    packages: Sequence[str],
    output: Path,
    *,
    suite: str = "",
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    cache: Path = DEFAULT_CACHE,
    max_age: int = MAX_AGE,
    clock: Clock | None = None,
) -> None:
    """Write a root filesystem of Debian packages as a tar.

    Args:
        packages: beside the essential ones.
        output: the tar; replaced only by a whole one.
        suite: Debian release; the host's if empty.
        before: shell commands run before packages are configured; ``$1`` is the root.
        after: shell commands run at the end; ``$1`` is the root.
        cache: folder of results.
        max_age: seconds a cached result is good for.
        clock: tells its age.

    Raises:
        MissingFeature: mmdebstrap is not installed, or the host is not Debian.
        CommandFailed: packages could not be fetched or installed.
    """
    wanted = Rootfs(tuple(packages), suite or host_suite(), tuple(before), tuple(after))
    made = cached_rootfs(wanted, cache=cache, max_age=max_age, clock=clock)
    _copy(made, output)


def cached_rootfs(
    wanted: Rootfs,
    *,
    cache: Path = DEFAULT_CACHE,
    max_age: int = MAX_AGE,
    clock: Clock | None = None,
) -> Path:
    """The tar of a root filesystem in the cache, made if it is not there or too old.

    Where it cannot be made again (no network), an old one is better than none.

    Raises:
        MissingFeature: mmdebstrap is not installed, or the host is not Debian.
        CommandFailed: packages could not be fetched or installed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    tar = cache / f"{wanted.key()}.tar"
    with (cache / f"{wanted.key()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now_ns = (clock or SystemClock()).now_ns()
        if not tar.exists():
            _make(wanted, tar)
        elif now_ns - tar.stat().st_mtime_ns > max_age * NANOSECONDS:
            with suppress(CommandFailed, MissingFeature):
                _make(wanted, tar)
    return tar


def _make(wanted: Rootfs, tar: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tar.parent, prefix="making-") as folder:
        fresh = Path(folder) / "rootfs.tar"
        run(_command(wanted, fresh), timeout=_TIMEOUT)
        with fresh.open("rb") as whole:
            os.fsync(whole.fileno())
        os.rename(fresh, tar)


def _command(wanted: Rootfs, target: Path) -> list[str]:
    sources = [path for path in _SOURCES if Path(path).exists() and Path(path).stat().st_size]
    command = [
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=essential",
        "--quiet",
        "--aptopt=Acquire::Languages none",
        "--aptopt=APT::Install-Recommends false",
        "--dpkgopt=force-unsafe-io",
        "--dpkgopt=force-confold",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT),
        *(f"--include={name}" for name in wanted.packages),
        *(f"--essential-hook={hook}" for hook in wanted.before),
        *(f"--customize-hook={hook}" for hook in wanted.after),
        wanted.suite or host_suite(),
        str(target),
    ]
    return [*command, *sources[:1]] if wanted.suite in ("", _suite_or_none()) else command


def _suite_or_none() -> str | None:
    try:
        return host_suite()
    except MissingFeature:
        return None


def _copy(source: Path, target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with source.open("rb") as reader, os.fdopen(handle, "wb") as writer:
            left = source.stat().st_size
            while left:
                left -= os.sendfile(writer.fileno(), reader.fileno(), None, left)
            os.fsync(writer.fileno())
        os.chmod(name, 0o644)
        os.rename(name, target)
    except BaseException:
        os.unlink(name)
        raise
