"""Durations and sizes as people write them: ``90s``, ``15m``, ``1h30m``, ``7d``; ``10M``."""

from __future__ import annotations

import re

from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_PART = re.compile(r"(\d+)([smhdwy])")
_SIZE = re.compile(r"(\d+)([kmgt]?)(i?b)?(?:/s)?", re.IGNORECASE)
_LONGEST = 100 * 365 * 86_400


def parse_duration(text: str) -> int:
    """Nanoseconds.

    Raises:
        InvalidArgument: not a duration, zero, or longer than a century.
    """
    plain = "".join(text.lower().split())
    parts = _PART.findall(plain)
    if not parts or "".join(count + unit for count, unit in parts) != plain:
        raise InvalidArgument(f"not a duration: {text!r}", hint="write 90s, 15m, 1h30m or 7d")
    seconds = sum(int(count) * _UNITS[unit] for count, unit in parts)
    if not 0 < seconds <= _LONGEST:
        raise InvalidArgument(f"not a sensible duration: {text!r}")
    return seconds * NANOSECONDS


def format_duration(ns: int) -> str:
    """The shortest way :func:`parse_duration` reads back, e.g. ``1h30m``; whole seconds."""
    seconds = ns // NANOSECONDS
    text = ""
    for unit in "dhms":
        count, seconds = divmod(seconds, _UNITS[unit])
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_size(text: str) -> int:
    """Bytes; ``K``, ``M``, ``G`` and ``T`` are powers of 1,024.

    Raises:
        InvalidArgument: not a size, or zero.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or int(found.group(1)) == 0:
        raise InvalidArgument(f"not a size: {text!r}", hint="write 500K, 10M or 2G")
    return int(found.group(1)) << 10 * " kmgt".index((found.group(2) or " ").lower())
