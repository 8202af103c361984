"""Does a backup look as if its source had gone? (case A36)

An unmounted disk, a failed device or a wrong path shows an empty folder, and a tool that
believes it replaces good backups by empty ones.  A backup is *suspicious* when it holds far
less than the good ones before it.  It is stored, a warning is given, and it does not count:
retention keeps the good ones, and a person decides (``laz snapshot approve``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_COMPARED = 5


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a backup holds: entries of every kind, and bytes of content."""

    entries: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as a sudden drop.

    Attributes:
        drop: the part of entries or bytes that may be missing, 0 to 1.
        few_entries: below so many earlier entries a drop proves nothing.
        few_bytes: the same for bytes.
    """

    drop: float = 0.5
    few_entries: int = 10
    few_bytes: int = 1 << 20


def suspicions(
    earlier: Sequence[Extent], now: Extent, thresholds: Thresholds | None = None
) -> list[str]:
    """Why a backup is suspicious; nothing when it is not.

    Args:
        earlier: the good backups before it, the newest first; the median of five is compared,
            so that one odd backup neither hides a drop nor makes one.
        now: the backup in question.
        thresholds: what counts.
    """
    if not earlier:
        return []
    limits = thresholds or Thresholds()
    entries = median(extent.entries for extent in earlier[:_COMPARED])
    size = median(extent.bytes for extent in earlier[:_COMPARED])
    if now.entries <= 1 and entries > 1:
        return [f"the volume is empty; before, it had {entries:.0f} entries"]
    found = []
    if entries >= limits.few_entries and now.entries < entries * (1 - limits.drop):
        found.append(f"{now.entries} entries instead of about {entries:.0f}")
    if size >= limits.few_bytes and now.bytes < size * (1 - limits.drop):
        found.append(f"{now.bytes} bytes instead of about {size:.0f}")
    return found
