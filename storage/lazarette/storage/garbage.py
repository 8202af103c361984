"""How often a program looks for garbage that holds itself."""

from __future__ import annotations

import atexit
import gc

_MANY = 100_000


def collect_seldom() -> None:
    """For a program that ends soon; called before it loads its modules.

    With the interpreter's own setting it looks some eighty times through what they made, for a
    sixth of a short command's time, later at every few files, and twice before it ends.
    """
    gc.set_threshold(_MANY, 20, 50)
    atexit.register(gc.freeze)
