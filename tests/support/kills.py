"""Killing a process at a named step of the code it runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from lazarette.storage import steps


def killed_at(step: str, work: Callable[[], None]) -> bool:
    """Run work in a forked child that is killed when it reaches the step the first time.

    Returns:
        Whether the step was reached; work that ends without it did not pass there.

    Raises:
        AssertionError: the work failed by itself.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            steps.listen(
                lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == step else None
            )
            work()
            code = 0
        except BaseException as failed:  # noqa: BLE001 - a child must not return into pytest
            print(f"child: {failed!r}", file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def steps_of(work: Callable[[], None]) -> list[str]:
    """Names of the steps that work reaches, in order, each once."""
    found: list[str] = []
    steps.listen(lambda name: found.append(name) if name not in found else None)
    try:
        work()
    finally:
        steps.listen(None)
    return found
