"""Values whose printed form shows nothing of them."""

from __future__ import annotations

import msgspec


class Hidden(msgspec.Struct, frozen=True):
    """What holds a secret: tracebacks, logs and pretty printers show its kind alone."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []
