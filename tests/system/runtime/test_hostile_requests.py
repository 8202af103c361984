"""Bytes that no honest client sends: every route says what is wrong, none fails by itself."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator

import pytest
from tests.support.daemon import Daemon, running

# Each begins the value of every member that the route reads.
VALUES = {
    "text that is no UTF-8": b'"\xff"',
    "half a surrogate": b'"\\ud800"',
    "nested too deeply": b'{"a":' * 20_000,
    "cut off": b'"x',
    "a number out of range": b"1" + b"0" * 400,
}
WHOLE = (b"\xff\xfe\x00", b"[1, 2]", b'"x"', b"[" * 100_000)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all: what a test sends leaves nothing that another could see."""
    with running(tmp_path_factory.mktemp("hostile") / "d") as one:
        yield one


def bodies(members: list[str]) -> dict[str, bytes]:
    """Bad bodies for a route that reads those members."""
    found = {
        name: b"{" + b",".join(f'"{m}":'.encode() + value for m in members) + b"}"
        for name, value in VALUES.items()
        if members
    }
    return found | {f"no object: {one[:8]!r}": one for one in WHOLE}


class _Connection(http.client.HTTPConnection):
    def __init__(self, daemon: Daemon) -> None:
        super().__init__("d", timeout=30)
        self._path = str(daemon.socket)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(
    daemon: Daemon, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes]:
    connection = _Connection(daemon)
    try:
        connection.request(method, path, body or None, {"Content-Type": kind} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def operations(daemon: Daemon) -> list[tuple[str, str, list[str] | None]]:
    """Method, path and, where a JSON body is read, the names of its members."""
    told = json.loads(ask(daemon, "GET", "/lazarette/v1/openapi.json")[1])
    found: list[tuple[str, str, list[str] | None]] = []
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            members = None
            if body := content.get("application/json"):
                schema = told["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
                members = list(schema["properties"])
            found.append((method.upper(), re.sub(r"\{\w+\}", "nothing", path), members))
    return found


def refused(status: int, body: bytes) -> bool:
    """A 4xx or "not here" with a message that is JSON."""
    return (400 <= status < 500 or status in (501, 503)) and bool(json.loads(body)["message"])


def test_bodies(daemon: Daemon) -> None:
    """A body that is no JSON of the wanted form is the client's fault on every route."""
    failed, routes = [], 0
    for method, path, members in operations(daemon):
        if members is None:
            continue
        routes += 1
        for name, body in bodies(members).items():
            status, said = ask(daemon, method, path, body)
            if not refused(status, said):
                failed.append((method, path, name, status, said[:200]))
    assert failed == []
    assert routes > 25
    assert "Traceback" not in daemon.log


def test_long_bodies(daemon: Daemon) -> None:
    """One far longer than a server's usual bound is read; one without end is not."""
    words = ", ".join(f'"word{n}": "{"x" * 1000}"' for n in range(3000))
    status, said = ask(
        daemon, "POST", "/volumes/create", f'{{"Name": "long", "Labels": {{{words}}}}}'.encode()
    )
    assert status == 201, said[:200]
    assert refused(*ask(daemon, "POST", "/volumes/create", b" " * (17 << 20) + b"{}"))


def test_secrets_that_are_no_base64(daemon: Daemon) -> None:
    for text in ("\U00013af7", "é", "%", "YQ"):
        body = json.dumps({"secrets": {"a": text}}, ensure_ascii=False).encode()
        status, said = ask(daemon, "POST", "/lazarette/v1/builds/secrets", body)
        assert refused(status, said), text


def test_bodies_of_routes_without_one(daemon: Daemon) -> None:
    """A body where none belongs is the client's fault, or nobody looks at it."""
    failed = []
    for method, path, members in operations(daemon):
        if method not in ("POST", "PUT", "DELETE") or path == "/lazarette/v1/shutdown":
            continue
        if members is None:
            status, said = ask(daemon, method, path, b'{"name": "\xff"}')
            if status >= 500 and status not in (501, 503):
                failed.append((method, path, status, said[:200]))
    assert failed == []
    assert "Traceback" not in daemon.log


FILTERS = {
    "nested too deeply": "[" * 100_000,
    "half a surrogate as key": '{"\\ud800":["x"]}',
    "half a surrogate": '{"label":["\\ud800"]}',
    "no UTF-8": "%ff",
    "no UTF-8 inside": "{%ff}",
    "a stroke": "\\",
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_filters(daemon: Daemon, filters: str) -> None:
    query = "".join(c if c in "%\\" or c.isalnum() else f"%{ord(c):02x}" for c in filters)
    for path in ("containers/json", "images/json", "networks", "volumes", "events"):
        status, said = ask(daemon, "GET", f"/{path}?filters={query}")
        assert refused(status, said), (path, status, said)


def test_paths_and_headers_that_are_no_text(daemon: Daemon) -> None:
    """They come back in messages, which must still be JSON."""
    failed = []
    for method, path, _ in operations(daemon):
        if "nothing" not in path:
            continue
        for odd in ("%ff", "%00", "a%0ab", "%ed%a0%80"):
            status, said = ask(daemon, method, path.replace("nothing", odd))
            if status >= 500 and status not in (501, 503):
                failed.append((method, path, odd, status, said[:200]))
    assert failed == []
    status, said = ask(daemon, "POST", "/containers/create", b"{}", "text/\xff")
    assert refused(status, said)
    assert "Traceback" not in daemon.log
