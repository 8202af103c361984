"""Running ahead of others for an instant."""

from __future__ import annotations

import os
import threading

import pytest

from lazarette.fuse.urgency import urgent


def _policy() -> int:
    return os.sched_getscheduler(threading.get_native_id()) & ~os.SCHED_RESET_ON_FORK


def test_this_thread_alone_comes_first_and_only_inside() -> None:
    before = _policy()
    others: list[int] = []
    other = threading.Thread(target=lambda: others.append(_policy()))
    with pytest.raises(KeyError), urgent():
        assert _policy() == os.SCHED_RR
        other.start()
        other.join()
        raise KeyError
    assert _policy() == before
    assert others == [before]


def test_it_can_be_nested() -> None:
    before = _policy()
    with urgent():
        with urgent():
            assert _policy() == os.SCHED_RR
        assert _policy() == os.SCHED_RR
    assert _policy() == before
