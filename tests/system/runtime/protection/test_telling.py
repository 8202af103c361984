"""A volume that suddenly holds far less, and who hears of it."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until


class Listener:
    """Hears messages and pings."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.heard.append(self.path)
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.heard.append(json.loads(body)["title"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def at(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def wait(self, text: str) -> None:
        until(lambda: any(text in one for one in self.heard), f"nobody said {text}")

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "host")
    made.start()
    try:
        made.laz("load", "-q", "-i", str(busybox_archive()))
        made.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
        yield made
    finally:
        made.end()


def backup(daemon: Daemon) -> dict[str, object]:
    done = daemon.laz("backup", "run", "data", "--json", check=False)
    return cast(list[dict[str, object]], json.loads(done.stdout))[0]


def metrics(daemon: Daemon) -> str:
    return subprocess.run(
        ["curl", "-s", "--unix-socket", str(daemon.socket), "http://d/lazarette/v1/metrics"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout


@pytest.mark.slow
def test_a_sudden_loss_is_suspicious_until_somebody_approves(
    daemon: Daemon, listener: Listener
) -> None:
    """A36: stored, warned of, told, and not counted."""
    labels = {
        "lazarette.backup": "@yearly",
        "lazarette.notify": f"json://{listener.at}/notify",
        "lazarette.ping.start": f"http://{listener.at}/start",
        "lazarette.ping.success": f"http://{listener.at}/success",
    }
    options = [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
    daemon.laz("volume", "create", *options, "data")
    fill = "for i in $(seq 50); do echo $i > /data/$i; done"
    daemon.laz("run", "--rm", "-v", "data:/data", "busybox", "sh", "-c", fill)
    assert backup(daemon)["outcome"] == "ok"
    listener.wait("/start")
    listener.wait("/success")
    good = metrics(daemon)
    assert 'lazarette_last_backup_ok{policy="data",volume="data"} 1.0' in good
    lose = "cd /data && rm -r [1-4]*"
    daemon.laz("run", "--rm", "-v", "data:/data", "busybox", "sh", "-c", lose)
    done = backup(daemon)
    assert done["outcome"] == "warnings"
    assert "suspicious" in str(done["result"])
    listener.wait("data on")
    assert 'lazarette_last_backup_ok{policy="data",volume="data"} 0.0' in metrics(daemon)
    assert cast(dict[str, int], daemon.json("backup", "approve", "data"))["approved"] == 1
    assert 'lazarette_last_backup_ok{policy="data",volume="data"} 1.0' in metrics(daemon)
