"""Kernel settings of the calling thread's network namespace."""

from __future__ import annotations

from pathlib import Path

from lazarette.storage.errors import InternalError

_ROOT = Path("/proc/sys/net")


def read(name: str) -> str:
    """A setting under ``/proc/sys/net``, e.g. ``ipv4/ip_forward``; empty if unknown."""
    try:
        return (_ROOT / name).read_text().strip()
    except FileNotFoundError:
        return ""


def write(name: str, value: str, *, needed: bool = True) -> None:
    """Set it, if it is not so already.

    Raises:
        InternalError: it cannot be set and is needed.
    """
    if read(name) == value:
        return
    try:
        (_ROOT / name).write_text(value)
    except OSError as error:
        if needed:
            raise InternalError(
                f"set net/{name} to {value}: {error.strerror}",
                hint=f"set net.{name.replace('/', '.')}={value} on the host yourself",
            ) from error
