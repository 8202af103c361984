"""A proxy, on loopback by default, that sits before an HTTP server and does what networks do."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


@dataclass
class Rule:
    """What happens to which requests.

    Kinds: ``reply`` (answer without the server), ``reset_request`` and ``reset_response``
    (connection reset after ``after`` bytes of the body), ``truncate`` (the response's body
    ends early, in good order), ``flip`` (one bit of the response's body), ``hang`` (no
    answer), ``lost_reply`` (the server answers, the client never hears), ``delay``.
    """

    kind: str
    match: bytes = b""
    skip: int = 0
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    retry_after: int = 0
    after: int = 0
    seconds: float = 30.0
    fired: int = 0


class FaultProxy:
    """Use as a context manager; ``endpoint`` is its URL."""

    def __init__(
        self, upstream: str, *, max_parallel: int = 1000, address: str = "127.0.0.1"
    ) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._max_parallel = max_parallel
        self._listener = socket.create_server((address, 0), backlog=128)
        self._lock = threading.Lock()
        self._inside = 0
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._back = threading.Event()
        self._back.set()
        self._silent = False
        self.requests: list[str] = []
        self.refused = 0

    @property
    def endpoint(self) -> str:
        address, port = self._listener.getsockname()[:2]
        return f"http://{address}:{port}"

    def plan(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def leave(self, *, silent: bool = False) -> None:
        """Be away: connections are reset, or, if ``silent``, get no answer."""
        self._silent = silent
        self._back.clear()
        if not silent:
            self._break_all()

    def come_back(self) -> None:
        """Be there again; whoever waited must ask anew."""
        self._back.set()

    def _break_all(self) -> None:
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FaultProxy:
        self._spawn(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._back.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break_all()
        for thread in list(self._threads):
            thread.join(10)
        if kind is None:
            idle = [rule for rule in self._rules if rule.fired == 0]
            assert not idle, f"never fired: {idle}"

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(lambda client=client: self._connection(client))  # type: ignore[misc]

    def _connection(self, client: socket.socket) -> None:
        if not (self._back.is_set() or self._silent):
            _reset(client)
            return
        try:
            server = socket.create_connection(self._upstream)
        except OSError:
            client.close()
            return
        with self._lock:
            self._open |= {client, server}
        try:
            pair = _Pair(client, server)
            while self._request(pair):
                pass
        except (OSError, EOFError):
            pass
        finally:
            with self._lock:
                self._open -= {client, server}
            client.close()
            server.close()

    def _request(self, pair: _Pair) -> bool:
        """Pass one request and its answer; False when the connection is over."""
        head = pair.from_client.head()
        if not self._back.is_set():
            self._back.wait()
            return False
        rule = self._due(head)
        try:
            return self._pass(pair, head, rule)
        finally:
            with self._lock:
                self._inside -= 1

    def _due(self, head: bytes) -> Rule | None:
        with self._lock:
            self._inside += 1
            self.requests.append(head.split(b"\r\n", 1)[0].decode("latin1"))
            if self._inside > self._max_parallel:
                self.refused += 1
                return Rule("reply")
            for rule in self._rules:
                if rule.match not in head:
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                elif rule.fired < rule.times:
                    rule.fired += 1
                    return rule
        return None

    def _pass(self, pair: _Pair, head: bytes, rule: Rule | None) -> bool:
        kind = rule.kind if rule else ""
        found = _LENGTH.search(head)
        length = int(found.group(1)) if found else 0
        expects = b"100-continue" in head.lower()
        if rule is not None and kind == "reply":
            if expects:
                pair.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            pair.from_client.skip(length)
            pair.client.sendall(_reply(rule, head.startswith(b"HEAD")))
            return True
        pair.server.sendall(head)
        if expects:
            answer = pair.from_server.head()
            if not answer.startswith(b"HTTP/1.1 100"):
                return self._answer(pair, answer, head, None)
            pair.client.sendall(answer)
        if rule is not None and kind == "reset_request":
            pair.from_client.pass_on(pair.server, min(rule.after, length))
            _reset(pair.client)
            return False
        pair.from_client.pass_on(pair.server, length)
        if rule is not None and kind == "hang":
            self._stopped.wait(rule.seconds)
            return False
        return self._answer(pair, pair.from_server.head(), head, rule)

    def _answer(self, pair: _Pair, answer: bytes, head: bytes, rule: Rule | None) -> bool:
        kind = rule.kind if rule else ""
        if kind == "lost_reply":
            _reset(pair.client)
            return False
        if rule is not None and kind == "delay":
            self._stopped.wait(rule.seconds)
        found = _LENGTH.search(answer)
        status = int(answer.split(b" ", 2)[1])
        bodyless = head.startswith(b"HEAD") or status in (204, 304)
        pair.client.sendall(answer)
        if bodyless:
            return True
        length = None if found is None else int(found.group(1))
        if rule is not None and kind in ("reset_response", "truncate"):
            # Where there is no length the first chunk is longer than any rule's cut.
            pair.from_server.pass_on(
                pair.client, rule.after if length is None else min(rule.after, length)
            )
            if kind == "reset_response":
                time.sleep(0.02)
                _reset(pair.client)
            return False
        if length is None:
            return pair.pass_chunks()
        if rule is not None and kind == "flip":
            body = bytearray(pair.from_server.exactly(length))
            body[rule.after] ^= 1
            pair.client.sendall(body)
            return True
        pair.from_server.pass_on(pair.client, length)
        return True


class _Reader:
    """Bytes of a socket, with what was read too far."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._kept = b""

    def head(self) -> bytes:
        while _END not in self._kept:
            self._kept += self._more()
        head, self._kept = self._kept.split(_END, 1)
        return head + _END

    def line(self) -> bytes:
        while b"\r\n" not in self._kept:
            self._kept += self._more()
        line, self._kept = self._kept.split(b"\r\n", 1)
        return line + b"\r\n"

    def exactly(self, count: int) -> bytes:
        while len(self._kept) < count:
            self._kept += self._more()
        data, self._kept = self._kept[:count], self._kept[count:]
        return data

    def skip(self, count: int) -> None:
        self._stream(count, lambda _: None)

    def pass_on(self, target: socket.socket, count: int) -> None:
        self._stream(count, target.sendall)

    def _stream(self, count: int, take: Callable[[bytes], None]) -> None:
        while count > 0:
            if not self._kept:
                self._kept = self._more()
            part, self._kept = self._kept[:count], self._kept[count:]
            take(part)
            count -= len(part)

    def _more(self) -> bytes:
        data = self._source.recv(1 << 18)
        if not data:
            raise EOFError
        return data


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.from_client = _Reader(client)
        self.from_server = _Reader(server)

    def pass_chunks(self) -> bool:
        """A body in chunked transfer coding."""
        while True:
            size = self.from_server.line()
            self.client.sendall(size)
            count = int(size.split(b";")[0], 16)
            if count == 0:
                self.client.sendall(self.from_server.line())
                return True
            self.from_server.pass_on(self.client, count + 2)


def _reply(rule: Rule, bodyless: bool) -> bytes:
    body = f"<Error><Code>{rule.code}</Code><Message>injected</Message></Error>".encode()
    wait = f"Retry-After: {rule.retry_after}\r\n" if rule.retry_after else ""
    head = (
        f"HTTP/1.1 {rule.status} Injected\r\n{wait}Content-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    return head if bodyless else head + body


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
