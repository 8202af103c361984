"""Names of volumes, as Docker's (case A24)."""

from __future__ import annotations

import re
import secrets

from lazarette.storage.errors import InvalidArgument

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
MAX_LENGTH = 255


def check_name(name: str) -> str:
    """The name itself, when it is one.

    Raises:
        InvalidArgument: too short, too long or with other characters.
    """
    if len(name) == 1:
        raise InvalidArgument(
            f"create {name}: volume name is too short, names should be at least two "
            "alphanumeric characters"
        )
    if len(name) > MAX_LENGTH:
        raise InvalidArgument(f"volume name is too long, at most {MAX_LENGTH} characters")
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f'create {name}: "{name}" includes invalid characters for a local volume name, only '
            '"[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host '
            "directory, use absolute path"
        )
    return name


def anonymous_name() -> str:
    """A fresh 64-digit name for a volume that was given none."""
    return secrets.token_hex(32)
