"""What a decoder raises for bytes that are none of its format's."""

from __future__ import annotations

import msgspec

MALFORMED: tuple[type[Exception], ...] = (
    msgspec.MsgspecError,
    UnicodeDecodeError,
    RecursionError,
)
"""msgspec lets text that is no UTF-8 out as the codec's own error, and depth as the stack's."""
