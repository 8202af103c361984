"""What the real registry never does: a server that breaks, lies and forgets on purpose."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from tests.support.images import file, tar_of

from lazarette.runtime.images import model
from lazarette.runtime.images.credentials import Credentials, to_header
from lazarette.runtime.images.endpoints import Endpoint, RegistryConfig
from lazarette.runtime.images.errors import BadArchive, DigestMismatch, LoginFailed, RegistryFault
from lazarette.runtime.images.model import Descriptor, Manifest, digest_of, encode
from lazarette.runtime.images.progress import Message
from lazarette.runtime.images.reference import parse
from lazarette.runtime.images.registries import Registries
from lazarette.runtime.images.registry import Repository, open_session
from lazarette.runtime.images.store import ImageStore

LAYER = tar_of([file("random", b"".join(b"%d" % (n * n * n) for n in range(300_000)))])
PACKED = gzip.compress(LAYER)
CONFIG = json.dumps({
    "architecture": model.host().architecture, "os": "linux",
    "rootfs": {"type": "layers", "diff_ids": [digest_of(LAYER)]},
}).encode()  # fmt: skip


@dataclass
class Server:
    """A registry of one image, ``x:1``.

    Attributes:
        cut: bytes of the layer after which the connection breaks; 0 never.
        cuts: how often it does so.
        ranges: whether it honours ranges.
        serves: what it sends for the layer.
        token: the bearer token it wants; empty for none.
        asked: the ranges asked for, and the token requests.
    """

    cut: int = 0
    cuts: int = 0
    ranges: bool = True
    serves: bytes = PACKED
    token: str = ""
    asked: list[str] = field(default_factory=list)
    host: str = ""

    @property
    def name(self) -> str:
        return f"{self.host}/x:1"

    def manifest(self) -> bytes:
        return encode(
            Manifest(
                media_type=model.OCI_MANIFEST,
                config=Descriptor(
                    media_type=model.OCI_CONFIG, digest=digest_of(CONFIG), size=len(CONFIG)
                ),
                layers=[
                    Descriptor(
                        media_type=model.OCI_LAYER_GZIP, digest=digest_of(PACKED), size=len(PACKED)
                    )
                ],
            )
        )

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return self.give_token(request)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            challenge = f'Bearer realm="http://{self.host}/token",service="tests"'
            if request.path != "/v2/":
                challenge += ',scope="repository:x:pull"'
            return web.json_response({}, status=401, headers={"WWW-Authenticate": challenge})
        if request.path == "/v2/":
            return web.json_response({})
        if "/manifests/" in request.path:
            return web.Response(body=self.manifest(), content_type=model.OCI_MANIFEST)
        if request.path.endswith(digest_of(CONFIG)):
            return web.Response(body=CONFIG)
        return await self.layer(request)

    def give_token(self, request: web.Request) -> web.Response:
        self.asked.append(request.query.get("scope", ""))
        login = Credentials(username="u", password="p")
        if request.headers.get("Authorization", "") != "Basic dTpw" and login:
            return web.json_response({"details": "incorrect"}, status=401)
        return web.json_response({"token": self.token, "refresh_token": "again"})

    async def layer(self, request: web.Request) -> web.StreamResponse:
        wanted = request.headers.get("Range", "")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        body = self.serves[start:]
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(body)
        await response.prepare(request)
        if self.cuts and self.cut < len(self.serves):
            self.cuts -= 1
            await response.write(body[: max(self.cut - start, 0)])
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(body)
        return response


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.host = f"{host}:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def pull(store: ImageStore, server: Server, auth: str = "") -> list[Message]:
    said: list[Message] = []
    registries = Registries(store, RegistryConfig(attempts=3))
    await registries.pull(parse(server.name), auth=auth, platform=None, progress=said.append)
    return said


async def test_a_broken_layer_goes_on_where_it_broke(store: ImageStore) -> None:
    async with serving(Server(cut=len(PACKED) // 2, cuts=1)) as server:
        await pull(store, server)
        first, second = server.asked
        assert first == "" and int(second.removeprefix("bytes=").rstrip("-")) > 0
    assert store.get(server.name).size > 0


async def test_a_server_without_ranges_begins_again(store: ImageStore) -> None:
    async with serving(Server(cut=len(PACKED) // 2, cuts=1, ranges=False)) as server:
        await pull(store, server)
        assert len(server.asked) == 2
    assert store.get(server.name).size > 0


async def test_a_dead_server_is_given_up_and_the_rest_fetched_after_a_restart(
    make_store: Callable[..., ImageStore], tmp_path: Path
) -> None:
    async with serving(Server(cut=len(PACKED) // 2, cuts=1000)) as server:
        store = make_store()
        with pytest.raises(RegistryFault, match="broke"):
            await pull(store, server)
        assert store.all() == [] and store.layers.driver.keys() == []
        (partial,) = store.blobs.partial.iterdir()
        assert 0 < partial.stat().st_size < len(PACKED)
        server.cuts = 0
        server.asked.clear()
        kept = partial.stat().st_size
        again = make_store()
        await pull(again, server)
        assert server.asked == [f"bytes={kept}-"]
        assert list(again.blobs.partial.iterdir()) == []


async def test_a_damaged_partial_download_is_fetched_anew(store: ImageStore) -> None:
    async with serving(Server()) as server:
        partial = store.blobs.partial / digest_of(PACKED).removeprefix("sha256:")
        partial.write_bytes(bytes(5000))  # what a power cut leaves
        await pull(store, server)
        assert server.asked == ["bytes=5000-", ""]


@pytest.mark.parametrize("lie", ["flipped", "longer", "shorter"])
async def test_a_layer_other_than_announced_is_never_visible(store: ImageStore, lie: str) -> None:
    served = {
        "flipped": PACKED[:100] + bytes([PACKED[100] ^ 1]) + PACKED[101:],
        "longer": PACKED + b"more",
        "shorter": PACKED[:-10],
    }[lie]
    async with serving(Server(serves=served)) as server:
        with pytest.raises((DigestMismatch, RegistryFault)):
            await pull(store, server)
    assert store.all() == [] and store.layers.driver.keys() == []
    assert [one.name for one in (store.blobs.path(digest_of(PACKED)).parent).iterdir()] == []


async def test_tokens_by_password_and_by_identity(store: ImageStore) -> None:
    async with serving(Server(token="secret-token")) as server:
        with pytest.raises(LoginFailed):
            await pull(store, server)
        server.asked.clear()
        await pull(store, server, to_header(Credentials(auth="dTpw")))
        assert "repository:x:pull" in server.asked
        await pull(store, server, to_header(Credentials(registrytoken="secret-token")))
        registries = Registries(store)
        login = Credentials(username="u", password="p", serveraddress=server.host)
        assert await registries.login(login) == "again"


async def test_a_manifest_that_is_none_is_refused(store: ImageStore) -> None:
    class Odd(Server):
        def manifest(self) -> bytes:
            return (
                b'{"schemaVersion": 1, "mediaType": "application/vnd.oci.image.manifest.v1+json"}'
            )

    async with serving(Odd()) as server:
        with pytest.raises(BadArchive, match="image manifest cannot be read"):
            await pull(store, server)


@pytest.mark.parametrize(
    "realm", ["", "token", "/token", "file:///etc/passwd", "http://", "http://[", "http://a:b:c/"]
)
async def test_a_token_server_at_no_address_is_refused(store: ImageStore, realm: str) -> None:
    class Odd(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            challenge = f'Bearer realm="{realm}",service="tests"'
            return web.json_response({}, status=401, headers={"WWW-Authenticate": challenge})

    async with serving(Odd()) as server:
        with pytest.raises(RegistryFault):
            await pull(store, server)


@pytest.mark.parametrize("location", ["", "file:///etc/passwd", "http://", "http://[", "//"])
async def test_an_upload_to_no_address_is_refused(store: ImageStore, location: str) -> None:
    class Odd(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if request.method == "HEAD":
                return web.Response(status=404)
            if request.method == "POST":
                return web.Response(status=202, headers={"Location": location})
            return await super().answer(request)

    async with serving(Odd()) as server:
        await pull(store, server)
        with pytest.raises(RegistryFault):
            await Registries(store, RegistryConfig(attempts=1)).push(
                parse(server.name), auth="", platform=None, progress=lambda _: None
            )


async def test_tags_that_are_no_text_are_refused() -> None:
    class Odd(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if request.path.endswith("/tags/list"):
                return web.Response(body=b'{"tags": ["\xff"]}')
            return await super().answer(request)

    async with serving(Odd()) as server, open_session() as session:
        endpoint = Endpoint(f"http://{server.host}")
        repository = Repository(session, RegistryConfig(), endpoint, "x", Credentials())
        with pytest.raises(RegistryFault, match="nonsense"):
            await repository.tags()
