"""Calls of a source that does not answer."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from lazarette.fuse.content import with_retry


def _away() -> bytes:
    raise OSError(errno.EHOSTUNREACH, "away")


def test_a_source_is_asked_again_until_it_answers() -> None:
    answers = [b"here"]

    def ask() -> bytes:
        if len(asked) < 3:
            asked.append(b"")
            return _away()
        return answers.pop()

    asked: list[bytes] = []
    assert with_retry(60, ask, threading.Event()) == b"here"


def test_nobody_waits_for_a_source_once_the_mount_is_gone() -> None:
    """A server that is told to end must not stay for what a read was to be given."""
    stopping = threading.Event()
    threading.Timer(0.2, stopping.set).start()
    began = time.monotonic()
    with pytest.raises(OSError, match="does not answer") as failed:
        with_retry(3600, _away, stopping)
    assert failed.value.errno == errno.EIO
    assert time.monotonic() - began < 60
