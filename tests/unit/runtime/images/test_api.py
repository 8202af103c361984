"""The image routes by HTTP: statuses, texts, streams and version gates."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, web
from tests.support.images import busybox_archive, busybox_rootfs

from lazarette.runtime.api import distribution, images
from lazarette.runtime.api.http import Api
from lazarette.runtime.images.endpoints import RegistryConfig
from lazarette.runtime.images.registries import Registries
from lazarette.runtime.images.store import ImageStore


class Client:
    """Sends requests to the routes; answers are ``(status, body)``."""

    def __init__(self, session: ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    async def __call__(
        self, method: str, path: str, data: object = None, **headers: str
    ) -> tuple[int, Any]:
        if isinstance(data, bytes):
            data = io.BytesIO(data)
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        async with self.session.request(
            method, self.base + path, data=data, headers=sent
        ) as response:
            raw = await response.read()
        if response.content_type != "application/json":
            return response.status, raw
        lines = [json.loads(line) for line in raw.splitlines()]
        streamed = "chunked" in response.headers.get("Transfer-Encoding", "")
        return response.status, lines if streamed else lines[0]


@pytest.fixture
async def api(store: ImageStore) -> AsyncIterator[Client]:
    unreachable = RegistryConfig(hub="http://127.0.0.1:1")
    registries = Registries(store, unreachable)
    routes = [*images.routes(store, registry=registries), *distribution.routes(registries)]
    runner = web.ServerRunner(web.Server(Api(routes)))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with ClientSession() as session:
        yield Client(session, f"http://127.0.0.1:{port}")
    await runner.cleanup()


@pytest.fixture
async def busybox(api: Client) -> str:
    """The id of a loaded busybox."""
    status, said = await api("POST", "/images/load", busybox_archive().read_bytes())
    assert (status, said) == (200, [{"stream": "Loaded image: busybox:latest\n"}])
    return str((await api("GET", "/images/busybox/json"))[1]["Id"])


async def test_load_tells_progress_unless_quiet(api: Client) -> None:
    _, said = await api("POST", "/images/load?quiet=0", busybox_archive().read_bytes())
    assert said[0]["status"] == "Loading layer" and said[0]["progressDetail"]["total"] > 0
    assert said[-1] == {"stream": "Loaded image: busybox:latest\n"}


async def test_a_bad_archive_is_told_in_band(api: Client) -> None:
    for body in (b"", b"nonsense", busybox_archive().read_bytes()[:100_000]):
        status, said = await api("POST", "/images/load", body)
        assert status == 200
        assert said[-1]["error"] == said[-1]["errorDetail"]["message"]


async def test_a_client_that_goes_away_leaves_nothing(api: Client, store: ImageStore) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield busybox_archive().read_bytes()[:300_000]
        await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await api("POST", "/images/load", half())
    async with asyncio.timeout(90):
        while list(store.blobs.ingest.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert store.all() == [] and store.layers.driver.keys() == []


async def test_names_with_slashes_and_ports(api: Client, busybox: str) -> None:
    status, _ = await api("POST", f"/images/{busybox}/tag?repo=reg.io:5000/a/b&tag=c")
    assert status == 201
    status, found = await api("GET", "/v1.44/images/reg.io:5000/a/b:c/json")
    assert (status, found["RepoTags"]) == (200, ["busybox:latest", "reg.io:5000/a/b:c"])
    status, found = await api("GET", "/images/reg.io:5000/a/b:c/history")
    assert status == 200 and found[0]["Id"] == busybox
    status, found = await api("DELETE", "/images/reg.io:5000/a/b:c")
    assert (status, found) == (200, [{"Untagged": "reg.io:5000/a/b:c"}])


async def test_manifests(api: Client, busybox: str) -> None:
    """Told from 1.47 in lists and from 1.48 of one; what an archive holds has that digest."""
    told = (await api("GET", "/v1.48/images/busybox/json?manifests=1"))[1]
    (one,) = told["Manifests"]
    assert one["Kind"] == "image" and one["Available"] is True
    assert one["ID"] == one["Descriptor"]["digest"] == told["Descriptor"]["digest"]
    assert one["ImageData"]["Platform"]["os"] == "linux" and one["ImageData"]["Containers"] == []
    assert one["ImageData"]["Size"]["Unpacked"] == told["Size"]
    assert one["Size"]["Total"] == one["Size"]["Content"] + told["Size"]
    _, packed = await api("GET", "/images/busybox/get")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        kept = tar.extractfile("blobs/" + one["ID"].replace(":", "/"))
        assert kept is not None
        raw = kept.read()
    assert len(raw) == one["Descriptor"]["size"]
    assert json.loads(raw)["config"]["digest"] == busybox
    (listed,) = (await api("GET", "/v1.48/images/json?manifests=1"))[1]
    assert (listed["Manifests"], listed["Descriptor"]) == (told["Manifests"], told["Descriptor"])
    for path in (
        "/v1.46/images/json?manifests=1",
        "/images/json",
        "/v1.47/images/busybox/json?manifests=1",
        "/images/busybox/json",
    ):
        found = (await api("GET", path))[1]
        assert "Manifests" not in (found[0] if isinstance(found, list) else found), path
    assert "Descriptor" not in (await api("GET", "/v1.47/images/json?manifests=1"))[1][0]
    assert "Descriptor" not in (await api("GET", "/v1.47/images/busybox/json"))[1]


async def test_what_is_missing_or_malformed(api: Client, busybox: str) -> None:
    for method, path in (
        ("GET", "/images/absent/json"),
        ("GET", "/images/absent/history"),
        ("DELETE", "/images/absent"),
        ("GET", "/images/absent/get"),
        ("GET", "/images/get?names=busybox&names=absent"),
        ("POST", "/images/absent/tag?repo=a"),
    ):
        status, said = await api(method, path)
        assert (status, said["message"]) == (404, "No such image: absent:latest"), path
    for method, path in (
        ("GET", "/images/json?filters=nonsense"),
        ("GET", "/images/json?filters=%7B%22x%22:%5B%22y%22%5D%7D"),
        ("GET", "/images/UPPER/json"),
        ("POST", "/images/busybox/tag?repo=UPPER"),
        ("POST", "/images/busybox/tag?repo=a&tag=b:c"),
        ("POST", "/images/busybox/tag"),
        ("POST", "/images/create?fromImage=a@b"),
        ("POST", "/images/create?fromImage="),
        ("POST", "/images/create?fromImage=busybox&platform=a/b/c/d"),
        ("POST", "/images/create?fromSrc=file:///etc/passwd"),
        ("POST", "/images/prune?filters=%7B%22dangling%22:%5B%22x%22%5D%7D"),
        ("GET", "/images/busybox/json?manifests=1&platform=linux"),
    ):
        status, said = await api(method, path)
        assert status == 400 and said["message"], path


async def test_registries_out_of_reach_fail_before_the_first_byte(api: Client) -> None:
    for method, path in (
        ("POST", "/images/create?fromImage=absent&tag=latest"),
        ("GET", "/distribution/absent/json"),
    ):
        for auth in ("", "null", "e30", "%%%"):
            status, said = await api(method, path, X_Registry_Auth=auth)
            assert status == 500 and "/v2/" in said["message"], path
    status, said = await api("POST", "/images/absent/push?tag=x")
    assert status == 200
    assert said[-1]["error"] == "An image does not exist locally with the tag: absent"
    status, said = await api(
        "POST",
        "/auth",
        json.dumps({"username": "u", "serveraddress": "127.0.0.1:1"}),
        Content_Type="application/json",
    )
    assert status == 500


async def test_fields_come_and_go_with_the_version(api: Client, busybox: str) -> None:
    new = (await api("GET", "/v1.50/images/busybox/json"))[1]
    old = (await api("GET", "/v1.43/images/busybox/json"))[1]
    assert "VirtualSize" not in new and old["VirtualSize"] == old["Size"]
    assert "Hostname" not in new["Config"] and old["Config"]["Hostname"] == ""
    await api("POST", "/images/create?fromSrc=-", busybox_rootfs().read_bytes())
    query = "filters=%7B%22dangling%22:%7B%22true%22:true%7D%7D"
    (new,) = (await api("GET", f"/images/json?{query}"))[1]
    (old,) = (await api("GET", f"/v1.42/images/json?{query}"))[1]
    assert (new["RepoTags"], old["RepoTags"]) == ([], ["<none>:<none>"])
    assert (new["Containers"], new["SharedSize"]) == (-1, -1)


async def test_a_platform_that_does_not_fit(api: Client, busybox: str) -> None:
    status, said = await api("GET", "/images/busybox/json?platform=linux/s390x")
    assert status == 404
    assert "was found but does not match the specified platform" in said["message"]
    wanted = json.dumps({"os": "linux", "architecture": "amd64"})
    assert (await api("GET", f"/images/busybox/json?platform={wanted}"))[0] in (200, 404)


async def test_import_from_the_body_and_from_an_address(api: Client) -> None:
    status, said = await api(
        "POST",
        "/images/create?fromSrc=-&repo=mine&tag=1&message=hello&changes=CMD+top&changes=USER+x",
        busybox_rootfs().read_bytes(),
    )
    assert status == 200 and said[-1]["status"].startswith("sha256:")
    found = (await api("GET", "/images/mine:1/json"))[1]
    assert (found["Config"]["User"], found["Comment"]) == ("x", "hello")

    async def serve(_request: web.BaseRequest) -> web.Response:
        return web.Response(body=io.BytesIO(busybox_rootfs().read_bytes()))

    runner = web.ServerRunner(web.Server(serve))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/x.tar"
    status, said = await api("POST", f"/images/create?fromSrc={url}&repo=web")
    assert said[0]["status"] == f"Downloading from {url}"
    assert (await api("GET", "/images/web/json"))[1]["Comment"] == f"Imported from {url}"
    await runner.cleanup()


async def test_save_and_prune(api: Client, busybox: str) -> None:
    status, packed = await api("GET", f"/images/get?names=busybox&names={busybox}")
    assert status == 200 and packed[257:262] == b"ustar"
    query = "filters=%7B%22dangling%22:%7B%22false%22:true%7D%7D"
    assert (await api("POST", "/images/prune"))[1] == {"ImagesDeleted": None, "SpaceReclaimed": 0}
    status, said = await api("POST", f"/images/prune?{query}")
    assert {"Untagged": "busybox:latest"} in said["ImagesDeleted"]
    assert said["SpaceReclaimed"] > 0
    assert (await api("POST", "/images/load", packed))[0] == 200
