"""Options of volumes: text in, values out, every mistake named with what is valid."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lazarette.storage.errors import InvalidArgument

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def check_options(driver: str, options: Mapping[str, str], valid: tuple[str, ...]) -> None:
    """Refuse what the driver does not know (V10).

    Raises:
        InvalidArgument: with the list of valid options.
    """
    unknown = sorted(set(options) - set(valid))
    if unknown:
        listed = ", ".join(valid) or "none"
        raise InvalidArgument(
            f"creating a volume: the driver {driver} has no option {unknown[0]!r}",
            hint=f"valid options: {listed}",
        )


def parse_size(text: str) -> int:
    """Bytes from ``1048576``, ``512m``, ``10g``, ``1.5GiB``; powers of 1024 throughout.

    Raises:
        InvalidArgument: no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"{text!r} is no size", hint="write it as 512m or 10g")
    size = int(float(match[1]) * 1024 ** _POWERS[match[2].lower()])
    if size <= 0:
        raise InvalidArgument(f"{text!r} is no size", hint="a size is more than nothing")
    return size


def parse_flag(option: str, text: str) -> bool:
    """A yes or no.

    Raises:
        InvalidArgument: neither.
    """
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on", ""):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise InvalidArgument(f"option {option}: {text!r} is neither true nor false")


def parse_choice(option: str, text: str, choices: tuple[str, ...]) -> str:
    """One of several words.

    Raises:
        InvalidArgument: another one, with the list.
    """
    if text not in choices:
        raise InvalidArgument(
            f"option {option}: {text!r} is not known", hint=f"valid: {', '.join(choices)}"
        )
    return text
