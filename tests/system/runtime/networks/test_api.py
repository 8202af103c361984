"""The Engine's routes, over HTTP, as clients use them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from aiohttp import web
from tests.support.network_host import Container, NetworkHost

from lazarette.runtime.api.http import Api
from lazarette.runtime.api.networks import NetworkRoutes
from lazarette.runtime.networks.model import EndpointNotFound, EndpointRequest, Network
from lazarette.storage.errors import NotFound


class Containers:
    """Running containers by name, as the routes need them."""

    def __init__(self, host: NetworkHost) -> None:
        self.host = host
        self.known: dict[str, Container] = {}

    async def connect_network(self, container: str, request: EndpointRequest) -> None:
        id_ = self._find(container)
        await asyncio.to_thread(self.host.manager.connect, request.network, id_, request)

    async def disconnect_network(self, container: str, network: Network, force: bool) -> None:
        id_ = self._find(container)
        try:
            await asyncio.to_thread(self.host.manager.disconnect, network.id, id_)
        except EndpointNotFound:
            if not force:
                raise

    def _find(self, container: str) -> str:
        if container not in self.known:
            raise NotFound(f"No such container: {container}")
        return self.known[container].id


@pytest.fixture
def containers(host: NetworkHost) -> Iterator[Containers]:
    yield Containers(host)


@pytest.fixture
async def api(containers: Containers, tmp_path: object) -> AsyncIterator[aiohttp.ClientSession]:
    server = web.Server(Api(NetworkRoutes(containers.host.manager, containers).routes()))
    runner = web.ServerRunner(server)
    await runner.setup()
    path = f"{tmp_path}/api.sock"
    await web.UnixSite(runner, path).start()
    connector = aiohttp.UnixConnector(path)
    async with aiohttp.ClientSession("http://d", connector=connector) as session:
        yield session
    await runner.cleanup()


async def test_life_of_a_network(api: aiohttp.ClientSession, containers: Containers) -> None:
    body = {
        "Name": "net",
        "Driver": "bridge",
        "IPAM": {"Config": [{"Subnet": "10.66.0.0/24", "Gateway": "10.66.0.254"}]},
        "Labels": {"a": "b"},
        "Options": {"com.docker.network.driver.mtu": "1400"},
        "SomethingNew": 1,
    }
    async with api.post("/v1.44/networks/create", json=body) as response:
        assert response.status == 201
        made = await response.json()
        assert made["Warning"] == ""
    async with api.post("/networks/create", json=body) as response:
        assert response.status == 409
        assert (await response.json())["message"] == "network with name net already exists"
    containers.known["web"] = await asyncio.to_thread(containers.host.start, "web")
    connect = {
        "Container": "web",
        "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.66.0.9"}, "Aliases": ["www"]},
    }
    async with api.post("/networks/net/connect", json=connect) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with api.post("/networks/net/connect", json=connect) as response:
        assert response.status == 403
    async with api.get(f"/networks/{made['Id'][:12]}") as response:
        shown = await response.json()
    assert shown["IPAM"]["Config"] == [{"Subnet": "10.66.0.0/24", "Gateway": "10.66.0.254"}]
    assert shown["Labels"] == {"a": "b"} and shown["Scope"] == "local"
    assert shown["Created"].endswith("Z")
    member = shown["Containers"][containers.known["web"].id]
    assert member["IPv4Address"] == "10.66.0.9/24" and member["IPv6Address"] == ""
    async with api.delete("/networks/net") as response:
        assert response.status == 403
    off = {"Container": "web", "Force": False}
    async with api.post("/networks/net/disconnect", json=off) as response:
        assert response.status == 200
    async with api.post("/networks/net/disconnect", json=off) as response:
        assert response.status == 404
    async with api.delete("/networks/net") as response:
        assert response.status == 204
    async with api.get("/networks/net") as response:
        assert response.status == 404


async def test_filters(api: aiohttp.ClientSession) -> None:
    for name, labels in (("one", {"x": "1"}), ("two", {"x": "2"})):
        async with api.post("/networks/create", json={"Name": name, "Labels": labels}) as response:
            assert response.status == 201

    async def names(filters: object) -> list[str]:
        async with api.get("/networks", params={"filters": json.dumps(filters)}) as response:
            assert response.status == 200, await response.text()
            return sorted(network["Name"] for network in await response.json())

    assert await names({}) == ["bridge", "host", "none", "one", "two"]
    assert await names({"label": ["x=1"]}) == ["one"]
    assert await names({"label": {"x": True}}) == ["one", "two"]
    assert await names({"name": ["on"]}) == ["none", "one"]
    assert await names({"driver": ["host"]}) == ["host"]
    assert await names({"type": ["custom"]}) == ["one", "two"]
    assert await names({"type": ["builtin"], "driver": ["null"]}) == ["none"]
    assert await names({"dangling": ["true"]}) == ["one", "two"]
    async with api.get("/networks", params={"filters": '{"nope": ["x"]}'}) as response:
        assert response.status == 400
    prune = {"filters": json.dumps({"label!": ["x=1"]})}
    async with api.post("/networks/prune", params=prune) as response:
        assert await response.json() == {"NetworksDeleted": ["two"]}
    async with api.post("/networks/prune", params=prune) as response:
        assert await response.json() == {"NetworksDeleted": None}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"Name": "x", "Driver": "nope"}, 404),
        ({"Name": "x", "Driver": "host"}, 403),
        ({"Name": "bridge"}, 403),
        ({"Name": ""}, 400),
        ({"Name": "x", "IPAM": {"Config": [{"Subnet": "nonsense"}]}}, 400),
        ({"Name": "x", "IPAM": {"Config": [{"Subnet": "10.0.0.0/24", "Gateway": "1.1.1.1"}]}}, 400),
        ({"Name": "x", "IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}]}}, 403),
    ],
)
async def test_refusals(api: aiohttp.ClientSession, body: object, status: int) -> None:
    async with api.post("/networks/create", json=body) as response:
        assert response.status == status
        assert (await response.json())["message"]
