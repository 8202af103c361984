"""One thread is always left to read, and there are no more of them than that takes."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from lazarette.fuse.readers import Readers

REST = threading.Event()


class Requests:
    """Blocks as many readers as it has requests, each until it is let go."""

    def __init__(self, most: int) -> None:
        self.queue: SimpleQueue[threading.Event | None] = SimpleQueue()
        self.threads: set[int] = set()
        self.begun: SimpleQueue[bool] = SimpleQueue()
        self.ended: SimpleQueue[str] = SimpleQueue()
        self.readers = Readers(most, self.read)
        self.main = threading.Thread(target=self.readers.run)
        self.main.start()

    def read(self) -> None:
        self.threads.add(threading.get_ident())
        while (request := self.queue.get()) is not None:
            if request is REST:
                self.readers.rest()
                continue
            mine = self.readers.enter()
            self.begun.put(mine)
            if mine:
                request.wait(20)
                self.readers.leave()
                self.ended.put(threading.current_thread().name)
        self.queue.put(None)

    def ask(self) -> tuple[threading.Event, bool]:
        """A request, and whether its reader did it itself."""
        request = threading.Event()
        self.queue.put(request)
        return request, self.begun.get(timeout=20)

    def stop(self) -> None:
        self.queue.put(None)
        self.main.join(20)
        assert not self.main.is_alive()


def test_the_last_one_free_never_blocks() -> None:
    requests = Requests(3)
    first, second = requests.ask(), requests.ask()
    assert first[1] and second[1]
    assert [requests.ask()[1] for _ in range(5)] == [False] * 5, "two block, the third must not"
    first[0].set()
    requests.ended.get(timeout=20)
    third = requests.ask()
    assert third[1]
    for request, _ in (second, third):
        request.set()
    requests.stop()


def test_requests_in_turns_need_two_threads() -> None:
    requests = Requests(8)
    names = set()
    for _ in range(100):
        request, mine = requests.ask()
        assert mine
        request.set()
        names.add(requests.ended.get(timeout=20))
    requests.stop()
    assert len(names) <= 2


def test_those_not_needed_rest_until_they_are() -> None:
    requests = Requests(8)
    blocked = [requests.ask()[0] for _ in range(3)]
    for request in blocked:
        request.set()
        requests.ended.get(timeout=20)
    for _ in range(20):  # whoever reads: those that rest read no more, the main one never rests
        requests.queue.put(REST)
    request, mine = requests.ask()
    assert mine
    others = [requests.ask() for _ in range(2)]
    assert all(mine for _, mine in others), "those that rested read again"
    assert len(requests.threads) == 4
    for each in (request, *(request for request, _ in others)):
        each.set()
    for _ in range(20):
        requests.queue.put(REST)
    requests.stop()


def test_a_thread_that_the_system_refuses_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(4)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not requests.ask()[1]
    request, mine = requests.ask()
    assert mine
    request.set()
    requests.stop()


def test_a_thread_that_fails_is_not_counted_on(caplog: pytest.LogCaptureFixture) -> None:
    fail = threading.Event()
    over = threading.Event()
    entered: list[bool] = []

    def work() -> None:
        if threading.current_thread().name == "fuse-reader":
            fail.wait(20)
            raise KeyError("a bug")
        entered.append(readers.enter())
        readers.leave()
        fail.set()
        over.wait(20)
        entered.append(readers.enter())

    readers = Readers(2, work)
    main = threading.Thread(target=readers.run)
    main.start()
    for _ in range(2000):
        if "a bug" in caplog.text:
            break
        threading.Event().wait(0.01)
    over.set()
    main.join(20)
    assert entered == [True, False]
