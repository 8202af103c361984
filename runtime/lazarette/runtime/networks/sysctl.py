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


def forward(version: int) -> None:
    """Have the host route between its interfaces, as networks need.

    A host that forwards IPv6 stops listening to its router, unless told to go on: that is
    done for the interfaces that listen now.
    """
    if version == 4:
        write("ipv4/ip_forward", "1")
        return
    if read("ipv6/conf/all/forwarding") in ("1", ""):
        return
    for interface in (_ROOT / "ipv6/conf").iterdir():
        if read(f"ipv6/conf/{interface.name}/accept_ra") == "1":
            write(f"ipv6/conf/{interface.name}/accept_ra", "2", needed=False)
    write("ipv6/conf/all/forwarding", "1")
