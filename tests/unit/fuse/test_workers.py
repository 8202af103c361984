"""Workers run everything, as many tasks at a time as they may, and end with the last."""

from __future__ import annotations

import threading

import pytest

from lazarette.fuse.workers import Workers


def test_tasks_run_side_by_side_up_to_a_limit() -> None:
    workers = Workers(3, "test")
    meeting = threading.Barrier(4, timeout=20)
    running = threading.Semaphore(0)
    over = threading.Event()

    def task() -> None:
        running.release()
        meeting.wait()

    for _ in range(3):
        workers.submit(task)
    for _ in range(3):
        assert running.acquire(timeout=20)
    workers.submit(over.set)
    assert not over.wait(0.05), "a fourth waits for a thread"
    meeting.wait()
    assert over.wait(20)
    workers.shutdown()


def test_threads_are_used_again_and_everything_is_done_at_the_end() -> None:
    workers = Workers(8, "test")
    threads: set[str] = set()
    done: list[int] = []

    def task(number: int, last: threading.Event) -> None:
        threads.add(threading.current_thread().name)
        done.append(number)
        last.set()

    for number in range(50):
        last = threading.Event()
        workers.submit(task, number, last)
        assert last.wait(20)
    assert len(threads) <= 2, "one that was about to be free again may be missed"
    for number in range(50, 1000):
        workers.submit(task, number, last)
    workers.shutdown()
    assert sorted(done) == list(range(1000))


def test_what_a_task_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(1, "test")
    over = threading.Event()

    def fail() -> None:
        raise KeyError("a bug")

    workers.submit(fail)
    workers.submit(over.set)
    assert over.wait(20)
    workers.shutdown()
    assert "a bug" in caplog.text
