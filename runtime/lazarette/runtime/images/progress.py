"""Progress of long image work, in the form the Engine streams it.

Clients: the docker command line draws bars of ``progressDetail``, docker-py looks for
``status``, ``stream``, ``aux`` and ``error``.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class ProgressDetail(msgspec.Struct, omit_defaults=True):
    """How far: bytes done and to do; 0 where unknown."""

    current: int = 0
    total: int = 0


class ErrorDetail(msgspec.Struct, omit_defaults=True):
    """A failure told in-band."""

    message: str
    code: int = 0


class Message(msgspec.Struct, omit_defaults=True, rename="camel"):
    """One object of a progress stream."""

    stream: str = ""
    status: str = ""
    progress_detail: ProgressDetail | None = None
    progress: str = ""
    id: str = ""
    aux: dict[str, object] | None = None
    error_detail: ErrorDetail | None = None
    error: str = ""


Sink = Callable[[Message], None]
"""Takes messages; may be called from any thread; raises ``Cancelled`` to stop the work."""


def discard(_message: Message) -> None:
    """A sink that ignores everything."""


def failure(text: str, code: int = 0) -> Message:
    """The message that ends a stream with an error."""
    return Message(error_detail=ErrorDetail(text, code), error=text)


def moving(status: str, id_: str, current: int, total: int) -> Message:
    """A step of a bar."""
    return Message(
        status=status,
        id=id_,
        progress_detail=ProgressDetail(current, total),
        progress=bar(current, total),
    )


def bar(current: int, total: int) -> str:
    """The bar old clients print as it is: ``[=====>      ]  1.2MB/3.4MB``."""
    if total <= 0:
        return f"{size_text(current)}"
    filled = min(current * 50 // total, 50)
    head = "=" * filled + (">" if filled < 50 else "")
    return f"[{head:<51}] {size_text(current):>8}/{size_text(total)}"


def size_text(size: float) -> str:
    """``1.234MB``: four digits and a decimal unit."""
    units = ("B", "kB", "MB", "GB", "TB")
    step = 0
    while size >= 1000 and step + 1 < len(units):
        size /= 1000
        step += 1
    return f"{size:.4g}{units[step]}"
