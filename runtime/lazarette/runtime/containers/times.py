"""Instants as clients write them: unix seconds with a fraction, RFC 3339, or a Go duration."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_UNIX = re.compile(r"-?(\d+)(?:\.(\d{1,9}))?\d*")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9, "m": 60e9, "h": 3600e9}


def parse_instant(text: str, now_ns: int) -> int:
    """An instant, nanoseconds since the epoch; empty is 0.

    Raises:
        InvalidArgument: none of the three forms.
    """
    wanted = text.strip()
    if not wanted:
        return 0
    if match := _UNIX.fullmatch(wanted):
        value = int(match[1]) * NANOSECONDS + int((match[2] or "").ljust(9, "0"))
        return -value if wanted.startswith("-") else value
    if (duration := parse_duration(wanted)) is not None:
        return now_ns - duration
    try:
        moment = datetime.fromisoformat(wanted)
    except ValueError as bad:
        raise InvalidArgument(f'invalid time "{text}"') from bad
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = int(moment.timestamp())
    fraction = re.search(r"\.(\d{1,9})", wanted)
    return seconds * NANOSECONDS + (int(fraction[1].ljust(9, "0")) if fraction else 0)


def parse_duration(text: str) -> int | None:
    """``1h30m`` as nanoseconds; None when it is no duration."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return round(sum(float(number) * _UNITS[unit] for number, unit in parts))
