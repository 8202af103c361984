"""Hijacked connections byte by byte, as no client library lets them be seen."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

import pytest
from tests.support.waiting import until

from .conftest import Host

UPGRADE = b"Connection: Upgrade\r\nUpgrade: tcp\r\n"


class Raw:
    """A connection to the daemon's socket."""

    def __init__(self, host: Host) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(host.daemon.socket))
        self.rest = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, method: str, path: str, body: object = None, head: bytes = b"",
             behind: bytes = b"") -> None:  # fmt: skip
        data = b"" if body is None else json.dumps(body).encode()
        kind = b"Content-Type: application/json\r\n" if data else b""
        self.socket.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(data)}\r\n".encode()
            + kind + head + b"\r\n" + data + behind
        )  # fmt: skip

    def head(self) -> str:
        while b"\r\n\r\n" not in self.rest:
            more = self.socket.recv(65536)
            assert more, self.rest
            self.rest += more
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        return head.decode()

    def until_end(self) -> bytes:
        while more := self.socket.recv(65536):
            self.rest += more
        return self.rest


def frames(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        stream, size = struct.unpack(">BxxxL", data[:8])
        found.append((stream, data[8 : 8 + size]))
        data = data[8 + size :]
    return found


def created(host: Host, *command: str, **config: object) -> str:
    name = host.name()
    with Raw(host) as raw:
        body = {"Image": "busybox", "Cmd": command, **config}
        raw.send("POST", f"/v1.50/containers/create?name={name}", body)
        assert " 201 " in raw.head().splitlines()[0]
    return name


def started(host: Host, name: str) -> None:
    host.out("start", name)


def test_upgrade_before_the_start_loses_nothing(host: Host) -> None:
    name = created(host, "sh", "-c", "echo first; echo second >&2")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/attach?stream=1&stdout=1&stderr=1",
                 head=UPGRADE)  # fmt: skip
        head = raw.head()
        assert head.splitlines()[0] == "HTTP/1.1 101 UPGRADED"
        assert "Content-Type: application/vnd.docker.multiplexed-stream" in head
        started(host, name)
        assert sorted(frames(raw.until_end())) == [(1, b"first\n"), (2, b"second\n")]


def test_old_clients_get_the_raw_type(host: Host) -> None:
    name = created(host, "true")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.41/containers/{name}/attach?stream=1&stdout=1", head=UPGRADE)
        assert "application/vnd.docker.raw-stream" in raw.head()
        started(host, name)
        raw.until_end()


def test_without_upgrade_it_is_plain_200(host: Host) -> None:
    name = created(host, "echo", "hi")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/attach?stream=1&stdout=1")
        head = raw.head()
        assert head.splitlines()[0] == "HTTP/1.1 200 OK"
        assert "Transfer-Encoding" not in head
        assert "Content-Length" not in head
        assert "raw-stream" in head
        started(host, name)
        assert frames(raw.until_end()) == [(1, b"hi\n")]


def test_bytes_right_behind_the_request_are_input(host: Host) -> None:
    name = created(host, "cat", OpenStdin=True, StdinOnce=True, AttachStdin=True)
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/attach?stream=1&stdin=1&stdout=1",
                 head=UPGRADE, behind=b"early ")  # fmt: skip
        raw.head()
        started(host, name)
        raw.socket.sendall(b"late")
        raw.socket.shutdown(socket.SHUT_WR)
        got = b"".join(data for _, data in frames(raw.until_end()))
        assert got == b"early late"


def test_exec_with_its_body_and_input_in_one_go(host: Host) -> None:
    name = host.start("busybox", "sleep", "1000")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/exec",
                 {"Cmd": ["cat"], "AttachStdin": True, "AttachStdout": True})  # fmt: skip
        raw.head()
        exec_id = json.loads(raw.rest)["Id"]
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/exec/{exec_id}/start", {"Detach": False, "Tty": False},
                 head=UPGRADE, behind=b"together")  # fmt: skip
        assert "101 UPGRADED" in raw.head()
        raw.socket.shutdown(socket.SHUT_WR)
        assert frames(raw.until_end()) == [(1, b"together")]
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/exec/{exec_id}/start", {}, head=UPGRADE)
        assert " 409 " in raw.head().splitlines()[0]


def exec_made(host: Host, name: str, *command: str) -> str:
    with Raw(host) as raw:
        body = {"Cmd": command, "AttachStdin": True, "AttachStdout": True}
        raw.send("POST", f"/v1.50/containers/{name}/exec", body)
        raw.head()
        return str(json.loads(raw.rest)["Id"])


def exec_ended(host: Host, exec_id: str) -> int:
    """The exit code of an exec session, waited for."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        with Raw(host) as raw:
            raw.send("GET", f"/v1.50/exec/{exec_id}/json", head=b"Connection: close\r\n")
            raw.head()
            found.update(json.loads(raw.until_end()))
        return not found["Running"]

    until(ended, "the exec session runs for ever")
    return int(found["ExitCode"])


@pytest.mark.parametrize("behind", [b"", b"input"])
def test_a_client_that_ends_its_side_at_once_gets_all_output(host: Host, behind: bytes) -> None:
    """The end of its input comes while the exec session is being made."""
    name = host.start("busybox", "sleep", "1000")
    exec_id = exec_made(host, name, "sh", "-c", "cat; echo done")
    with Raw(host) as raw:
        path = f"/v1.50/exec/{exec_id}/start"
        raw.send("POST", path, {"Detach": False, "Tty": False}, head=UPGRADE, behind=behind)
        raw.socket.shutdown(socket.SHUT_WR)
        assert "101 UPGRADED" in raw.head()
        got = b"".join(data for _, data in frames(raw.until_end()))
        assert got == behind + b"done\n"
    assert exec_ended(host, exec_id) == 0


def test_a_request_refused_after_the_clients_end_is_answered(host: Host) -> None:
    with Raw(host) as raw:
        raw.send("POST", "/v1.50/exec/0/start", {}, head=UPGRADE)
        raw.socket.shutdown(socket.SHUT_WR)
        assert " 404 " in raw.head().splitlines()[0]
        raw.until_end()


def test_an_exec_whose_client_leaves_at_once_ends(host: Host) -> None:
    name = host.start("busybox", "sleep", "1000")
    exec_id = exec_made(host, name, "sh", "-c", "echo nobody reads this; exit 7")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/exec/{exec_id}/start", {}, head=UPGRADE)
    assert exec_ended(host, exec_id) == 7


def test_a_request_in_pieces(host: Host) -> None:
    name = host.start("busybox", "sleep", "1000")
    with Raw(host) as raw:
        body = {"Cmd": ["echo", "whole"], "AttachStdout": True}
        raw.send("POST", f"/v1.50/containers/{name}/exec", body)
        raw.head()
        exec_id = json.loads(raw.rest)["Id"]
    data = b'{"Detach": false, "Tty": false}'
    head = f"POST /v1.50/exec/{exec_id}/start HTTP/1.1\r\nHost: d\r\n".encode() + UPGRADE
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with Raw(host) as raw:
        for piece in (head[:3], head[3:40], head[40:], data[:7], data[7:]):
            raw.socket.sendall(piece)
            time.sleep(0.05)
        assert "101 UPGRADED" in raw.head()
        assert frames(raw.until_end()) == [(1, b"whole\n")]


def test_detach_keys_leave_the_container_running(host: Host) -> None:
    name = created(host, "cat", OpenStdin=True, Tty=True, AttachStdin=True)
    started(host, name)
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/attach?stream=1&stdin=1&stdout=1"
                 "&detachKeys=ctrl-a,x", head=UPGRADE)  # fmt: skip
        raw.head()
        raw.socket.sendall(b"typed\n")
        time.sleep(0.2)
        raw.socket.sendall(b"\x01x")
        assert b"typed\r\n" in raw.until_end()
    assert host.state(name)["Running"]
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/attach?stream=1&detachKeys=nonsense")
        assert " 400 " in raw.head().splitlines()[0]


def test_wait_sends_its_head_at_once(host: Host) -> None:
    name = created(host, "sh", "-c", "exit 9")
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/wait?condition=next-exit")
        assert " 200 " in raw.head().splitlines()[0]
        started(host, name)
        while b"StatusCode" not in raw.rest:
            raw.rest += raw.socket.recv(1000)
        assert b'{"StatusCode":9}' in raw.rest
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/wait?condition=never")
        assert " 400 " in raw.head().splitlines()[0]


def test_an_exit_code_survives_its_container(host: Host) -> None:
    name = created(host, "sh", "-c", "exit 8", HostConfig={"AutoRemove": True})
    with Raw(host) as raw:
        raw.send("POST", f"/v1.50/containers/{name}/wait?condition=removed")
        raw.head()
        started(host, name)
        while b"StatusCode" not in raw.rest:
            raw.rest += raw.socket.recv(1000)
        assert b'{"StatusCode":8}' in raw.rest


def test_keep_alive_and_errors(host: Host) -> None:
    with Raw(host) as raw:
        for _ in range(2):
            raw.rest = b""
            raw.send("GET", "/v1.50/containers/nobody/json")
            head = raw.head()
            assert " 404 " in head.splitlines()[0]
            size = int(head.split("Content-Length: ")[1].split("\r\n")[0])
            while len(raw.rest) < size:
                raw.rest += raw.socket.recv(1000)
            assert json.loads(raw.rest)["message"] == "No such container: nobody"
        raw.rest = b""
        raw.send("HEAD", "/_ping")
        assert "Api-Version: 1.50" in raw.head()
