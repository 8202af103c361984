"""Named steps of operations that must survive a kill between any two of them.

Code that writes ahead calls :func:`reached` after each step that is on the disk.  In
production nothing listens and the call costs a dictionary look-up; fault tests listen in
a child process and kill it at the step under test, so every name used here is a test.
"""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[str], None] | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Call ``listener`` with the name of each step reached; None stops that."""
    global _listener
    _listener = listener


def reached(step: str) -> None:
    """Tell the listener, if any, that a step is done."""
    if _listener is not None:
        _listener(step)
