"""Answers of the REST API that clients hold on to, as dockerd 26.1 gives them.

Most were found by running the compat half of Podman's REST suite against both.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.support.daemon import Daemon

from .conftest import Host

JSON = {"Content-Type": "application/json"}
Answer = tuple[int, object]


def ask(
    daemon: Daemon, method: str, path: str, body: object = None, version: str = "1.44"
) -> Answer:
    """One call; status and what it says, read as JSON where it is."""
    connection = http.client.HTTPConnection("d", timeout=120)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(daemon.socket))
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, f"/v{version}{path}", sent, JSON)
        answer = connection.getresponse()
        text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text
    finally:
        connection.close()


def create(host: Host, body: dict[str, object]) -> tuple[str, dict[str, object]]:
    """A container that is removed after the test: its id and how it is shown."""
    status, made = ask(host.daemon, "POST", "/containers/create", {"Image": "busybox", **body})
    assert status == 201, made
    assert isinstance(made, dict)
    host.made.append(str(made["Id"]))
    return str(made["Id"]), host.inspect(str(made["Id"]))


def test_values_that_mean_nothing_are_taken(host: Host) -> None:
    _, shown = create(host, {"HostConfig": {"NanoCpus": 500_000, "MemorySwappiness": -1}})
    limits = shown["HostConfig"]
    assert isinstance(limits, dict)
    assert (limits["NanoCpus"], limits["MemorySwappiness"]) == (500_000, None)
    create(host, {"Healthcheck": {"Test": ["true"]}})


def test_another_platform_is_no_image(host: Host) -> None:
    body = {"Image": "busybox"}
    status, said = ask(host.daemon, "POST", "/containers/create?platform=linux/arm64", body)
    assert status == 404
    assert isinstance(said, dict)
    assert "was found but does not match the specified platform" in said["message"]


def test_what_a_missing_container_is_not(host: Host) -> None:
    """A 404 at create means a missing image: clients would pull it."""
    body = {"Image": "busybox", "HostConfig": {"VolumesFrom": ["nosuch"]}}
    status, said = ask(host.daemon, "POST", "/containers/create", body)
    assert status == 400
    assert isinstance(said, dict)
    assert said["message"] == "No such container: nosuch"


def test_a_network_joined_again_before_the_start(host: Host) -> None:
    name, network = host.name(), host.name()
    host.out("network", "create", network)
    try:
        host.out("create", "--name", name, "busybox", "sleep", "1000")
        for _ in range(2):
            assert (
                ask(host.daemon, "POST", f"/networks/{network}/connect", {"Container": name})[0]
                == 200
            )
        host.out("start", name)
        assert (
            ask(host.daemon, "POST", f"/networks/{network}/connect", {"Container": name})[0] == 403
        )
    finally:
        host.out("rm", "-f", name)
        host.out("network", "rm", network)


def test_device_requests_fail_at_the_start(host: Host) -> None:
    asked = [{"Driver": "", "Count": -1, "Capabilities": [["gpu", "compute"]]}]
    container, shown = create(host, {"HostConfig": {"DeviceRequests": asked}})
    limits = shown["HostConfig"]
    assert isinstance(limits, dict)
    assert limits["DeviceRequests"][0]["Capabilities"] == [["gpu", "compute"]]
    status, said = ask(host.daemon, "POST", f"/containers/{container}/start")
    assert status == 500
    assert isinstance(said, dict)
    assert said["message"] == (
        'could not select device driver "" with capabilities: [[gpu compute]]'
    )


def test_a_volume_of_a_stopped_container_does_not_dangle(host: Host) -> None:
    name, volume = host.name(), host.name()
    host.out("run", "--name", name, "-v", f"{volume}:/data", "busybox", "true")
    for dangling, there in (("true", False), ("false", True)):
        filters = quote(json.dumps({"dangling": [dangling]}))
        _, found = ask(host.daemon, "GET", f"/volumes?filters={filters}")
        assert isinstance(found, dict)
        assert (volume in [one["Name"] for one in found["Volumes"]]) is there
    host.out("rm", name)
    host.out("volume", "rm", volume)


def test_a_filter_for_names_leaves_other_names_out(host: Host) -> None:
    host.out("tag", "busybox", "rest-one")
    filters = quote(json.dumps({"reference": ["rest-one"]}))
    _, found = ask(host.daemon, "GET", f"/images/json?filters={filters}")
    host.out("rmi", "rest-one")
    assert isinstance(found, list)
    assert [one["RepoTags"] for one in found] == [["rest-one:latest"]]
    filters = quote(json.dumps({"label": ["nosuch"]}))
    assert ask(host.daemon, "GET", f"/images/json?filters={filters}") == (200, [])


def test_an_import_of_nothing_is_an_empty_image(host: Host) -> None:
    status, _ = ask(host.daemon, "POST", "/images/create?fromSrc=-&repo=rest-empty")
    assert status == 200
    status, shown = ask(host.daemon, "GET", "/images/rest-empty/json")
    host.out("rmi", "rest-empty")
    assert status == 200
    assert isinstance(shown, dict)
    assert shown["Size"] == 0


@pytest.mark.parametrize(("version", "shown"), [("1.43", True), ("1.44", False)])
def test_virtual_sizes_went(host: Host, version: str, shown: bool) -> None:
    for path in ("/images/json", "/system/df"):
        _, found = ask(host.daemon, "GET", path, version=version)
        images = found["Images"] if isinstance(found, dict) else found
        assert isinstance(images, list)
        assert ("VirtualSize" in images[0]) is shown


def test_top_with_what_ps_refuses(host: Host) -> None:
    name = host.start("busybox", "sleep", "1000")
    assert ask(host.daemon, "GET", f"/containers/{name}/top?ps_args=--invalid")[0] == 500


def test_an_image_of_another_platform_is_not_removed(host: Host) -> None:
    host.out("tag", "busybox", "rest-platform")
    wanted = quote(json.dumps({"os": "linux", "architecture": "arm64"}))
    path = f"/images/rest-platform?platforms={wanted}"
    assert ask(host.daemon, "DELETE", path, version="1.50")[0] == 404
    own = quote(
        json.dumps(
            {"os": "linux", "architecture": host.out("version", "-f", "{{.Server.Arch}}").strip()}
        )
    )
    status, said = ask(
        host.daemon, "DELETE", f"/images/rest-platform?platforms={own}", version="1.50"
    )
    assert (status, said) == (200, [{"Untagged": "rest-platform:latest"}])


@pytest.mark.parametrize(
    ("version", "made"), [("1.46", ["create", "commit"]), ("1.45", ["commit"])]
)
def test_events_of_a_new_image(host: Host, version: str, made: list[str]) -> None:
    name = host.name()
    host.out("create", "--name", name, "busybox")
    image = host.out("commit", name).strip()
    filters = quote(json.dumps({"image": [image]}))
    path = f"/events?since=1&until={int(time.time()) + 1}&filters={filters}"
    _, said = ask(host.daemon, "GET", path, version=version)
    host.out("rmi", image)
    text = said if isinstance(said, str) else json.dumps(said)
    actions = [json.loads(line)["Action"] for line in text.splitlines()]
    assert actions == made


def test_a_device_that_its_vendor_describes(host: Host) -> None:
    folder = Path("/etc/cdi")
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    file = folder / f"lazarette-rest-{os.getpid()}.json"
    node = {"path": "/dev/vendor0", "hostPath": "/dev/zero"}
    edits = {"env": ["VENDOR=here"], "deviceNodes": [node]}
    kind = f"rest{os.getpid()}.example/zero"
    devices = [{"name": "one", "containerEdits": edits}]
    file.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": devices}))
    try:
        script = "head -c 3 /dev/vendor0 | wc -c; echo $VENDOR"
        asked = [{"Driver": "cdi", "DeviceIDs": [f"{kind}=one"]}]
        body = {"Cmd": ["sh", "-c", script], "HostConfig": {"DeviceRequests": asked}}
        container, _ = create(host, body)
        assert host.out("start", "-a", container) == "3\nhere\n"
    finally:
        file.unlink()
        if made and not any(folder.iterdir()):
            folder.rmdir()
    status, said = ask(host.daemon, "POST", f"/containers/{container}/start")
    assert status == 400
    assert isinstance(said, dict)
    assert "unresolvable CDI devices" in said["message"]


def test_logs_right_after_the_start(host: Host) -> None:
    container, _ = create(host, {"Cmd": ["echo", "first words"]})
    assert ask(host.daemon, "POST", f"/containers/{container}/start")[0] == 204
    _, said = ask(host.daemon, "GET", f"/containers/{container}/logs?stdout=1")
    assert "first words" in str(said) or host.state(container)["Running"]
