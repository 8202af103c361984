"""Running ahead of others for an instant."""

from __future__ import annotations

import os
import threading

import pytest

from lazarette.storage.urgency import urgent


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_this_thread_alone_comes_first_and_only_inside() -> None:
    before = _priority()
    others: list[int] = []
    other = threading.Thread(target=lambda: others.append(_priority()))
    with pytest.raises(KeyError), urgent():
        assert _priority() == -20
        raise KeyError
    assert _priority() == before
    other.start()
    other.join()
    assert others == [before]
