"""Linux capabilities: names, Docker's default set, and what this process may give.

Numbers and names are those of ``linux/capability.h``; the default set is the one the
Engine documents for containers that ask for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from lazarette.storage.errors import InvalidArgument

_NAMES_TEXT = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO
SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG
MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM
BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
NAMES = tuple(_NAMES_TEXT.split())

_DEFAULT_TEXT = """
CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
SYS_CHROOT KILL AUDIT_WRITE
"""
DEFAULT = frozenset(_DEFAULT_TEXT.split())


def bounding_set() -> frozenset[str]:
    """The capabilities this process can hand on, from ``CapBnd`` of ``/proc/self/status``."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapBnd:"):
                mask = int(line.split()[1], 16)
                return frozenset(n for bit, n in enumerate(NAMES) if mask >> bit & 1)
    return frozenset(NAMES)


def normalise(name: str, asked: str = "CapAdd") -> str:
    """``cap_net_admin`` as ``NET_ADMIN``; ``ALL`` stays.

    Args:
        name: as given.
        asked: the field that has it, for the error.

    Raises:
        InvalidArgument: no such capability.
    """
    plain = name.strip().upper().removeprefix("CAP_")
    if plain != "ALL" and plain not in NAMES:
        raise InvalidArgument(f'invalid {asked}: unknown capability: "CAP_{plain}"')
    return plain


def choose(
    add: Iterable[str], drop: Iterable[str], privileged: bool, bounding: frozenset[str]
) -> list[str]:
    """The capabilities of a container, as OCI names, sorted.

    A capability that is in both lists is dropped, unless ``ALL`` is dropped, where the
    additions are what remains (the Engine's rule).  What this process itself cannot give
    is left out silently: asking the runtime for it would make every create fail.
    """
    wanted = {normalise(name) for name in add}
    unwanted = {normalise(name, "CapDrop") for name in drop}
    if privileged:
        chosen = set(NAMES)
    elif "ALL" in wanted:
        chosen = set(NAMES) - unwanted
    elif "ALL" in unwanted:
        chosen = set(wanted)
    else:
        chosen = (set(DEFAULT) - unwanted) | (wanted - unwanted)
    return sorted(f"CAP_{name}" for name in chosen & bounding)
