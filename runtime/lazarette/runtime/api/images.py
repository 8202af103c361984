"""Image operations of the Engine API: list, inspect, create, load, save, tag, remove."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import msgspec
from aiohttp import web

from lazarette.fuse import jsontext
from lazarette.runtime.api.http import Call, Route, empty, json_response, stream
from lazarette.runtime.api.transfer import BodyReader, BodyWriter
from lazarette.runtime.images import archive, commit, listing, reference, save
from lazarette.runtime.images.errors import BadArchive
from lazarette.runtime.images.model import Platform, RunConfig, parse_platform
from lazarette.runtime.images.progress import Message, Sink, failure
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.registries import Registries
from lazarette.runtime.images.registry import download
from lazarette.runtime.images.removal import Removed, Remover
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.errors import InvalidArgument, LazaretteError, Unsupported


@dataclass(frozen=True)
class CommitRequest:
    """What ``POST /commit`` asks for; the engine holds the container.

    Attributes:
        container: its id or name.
        config: container defaults that replace the container's own, or None.
        changes: Dockerfile instructions.
        comment: for the history.
        author: of the image.
        pause: freeze the container meanwhile.
    """

    container: str
    config: RunConfig | None
    changes: tuple[str, ...]
    comment: str
    author: str
    pause: bool


class Committer(Protocol):
    """Makes images of containers; the engine's part of ``POST /commit``."""

    async def __call__(self, request: CommitRequest) -> str:
        """The new image's id."""
        ...


async def progress_stream(
    call: Call, work: Callable[[Sink], Awaitable[None]], *, quiet: bool = False
) -> web.StreamResponse:
    """Answer with the messages of ``work``.

    An error before its first message is an HTTP error, later ones are told in-band.  The
    work is cancelled when the client goes away.

    Args:
        call: the request.
        work: does it, telling the sink, which may be called from any thread.
        quiet: send only the last word (``stream``, ``aux`` and errors).
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Message | None] = asyncio.Queue()

    def sink(message: Message) -> None:
        if not quiet or not message.status:
            loop.call_soon_threadsafe(queue.put_nowait, message)

    async def run() -> None:
        try:
            await work(sink)
        finally:
            loop.call_soon(queue.put_nowait, None)

    task = asyncio.create_task(run())
    try:
        first = await queue.get()
        if first is None:
            await task  # raises what went wrong, as an HTTP error
        response = await stream(call)
        message = first
        while message is not None:
            await response.write(msgspec.json.encode(message) + b"\r\n")
            message = await queue.get()
        try:
            await task
        except LazaretteError as error:
            told = failure(error.message, 401 if error.http_status == 401 else 0)
            await response.write(msgspec.json.encode(told) + b"\r\n")
        await response.write_eof()
        return response
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class ImageRoutes:
    """The handlers.

    Args:
        store: the images.
        registry: pull and push.
        committer: makes images of containers.
    """

    def __init__(
        self, store: ImageStore, registry: Registries | None, committer: Committer | None
    ) -> None:
        self._store = store
        self._remover = Remover(store)
        self._registry = registry
        self._committer = committer

    def routes(self) -> list[Route]:
        """All of them; those with a fixed path first."""
        return [
            Route("GET", "/images/json", self.summaries),
            Route("GET", "/images/search", self.search),
            Route("GET", "/images/get", self.save_many),
            Route("POST", "/images/create", self.create),
            Route("POST", "/images/load", self.load),
            Route("POST", "/images/prune", self.prune),
            Route("POST", "/commit", self.commit),
            Route("GET", "/images/{name:.*}/json", self.inspect),
            Route("GET", "/images/{name:.*}/history", self.history),
            Route("GET", "/images/{name:.*}/get", self.save_one),
            Route("POST", "/images/{name:.*}/push", self.push),
            Route("POST", "/images/{name:.*}/tag", self.tag),
            Route("DELETE", "/images/{name:.*}", self.remove),
        ]

    async def summaries(self, call: Call) -> web.StreamResponse:
        """``GET /images/json``."""
        filters = call.filters(listing.LIST_FILTERS)
        if old_filter := call.text("filter"):
            filters.setdefault("reference", []).append(old_filter)
        found = await asyncio.to_thread(
            listing.summaries,
            self._store,
            filters,
            everything=call.flag("all"),
            shared_size=call.flag("shared-size"),
            manifests=call.flag("manifests") and call.version >= (1, 47),
        )
        return json_response([_summary(one, call.version) for one in found])

    async def inspect(self, call: Call) -> web.StreamResponse:
        """``GET /images/{name}/json``."""
        manifests = call.flag("manifests") and call.version >= (1, 48)
        if manifests and call.text("platform") and call.version >= (1, 49):
            raise InvalidArgument("conflicting options: manifests and platform cannot both be set")
        found = await asyncio.to_thread(
            listing.inspect, self._store, call.path["name"], call.version, manifests=manifests
        )
        _check_platform(call, found)
        return json_response(found)

    async def history(self, call: Call) -> web.StreamResponse:
        """``GET /images/{name}/history``."""
        return json_response(
            await asyncio.to_thread(listing.history, self._store, call.path["name"])
        )

    async def tag(self, call: Call) -> web.StreamResponse:
        """``POST /images/{name}/tag``."""
        repository, tag = call.text("repo"), call.text("tag")
        name = target(repository, tag)
        if name is None:
            raise InvalidArgument("invalid reference format")

        def work() -> None:
            with self._store.working():
                self._store.tag(self._store.get(call.path["name"]).id, name)

        await asyncio.to_thread(work)
        return empty(201)

    async def remove(self, call: Call) -> web.StreamResponse:
        """``DELETE /images/{name}``."""
        if call.version >= (1, 50):
            image = await asyncio.to_thread(self._store.get, call.path["name"])
            for wanted in call.texts("platforms"):
                listing.require_platform(call.path["name"], image.config, read_platform(wanted))
        done = await asyncio.to_thread(
            self._remover.remove,
            call.path["name"],
            force=call.flag("force"),
            prune=not call.flag("noprune"),
        )
        return json_response(_removed(done))

    async def prune(self, call: Call) -> web.StreamResponse:
        """``POST /images/prune``."""
        filters = call.filters(listing.PRUNE_FILTERS)
        dangling = listing.truth(filters.pop("dangling", ["true"]))
        wanted = listing.conditions(self._store, filters)
        done, freed = await asyncio.to_thread(self._remover.prune, wanted, dangling=dangling)
        self._store.events.publish("image", "prune", "", {"reclaimed": str(freed)})
        return json_response({"ImagesDeleted": _removed(done) or None, "SpaceReclaimed": freed})

    async def load(self, call: Call) -> web.StreamResponse:
        """``POST /images/load``."""
        platform = platform_of(call)
        body = BodyReader(call.request.content)

        async def work(sink: Sink) -> None:
            await asyncio.to_thread(
                archive.load, self._store, body.stream, progress=sink, platform=platform
            )

        return await progress_stream(call, in_band(work), quiet=call.flag("quiet", True))

    async def save_one(self, call: Call) -> web.StreamResponse:
        """``GET /images/{name}/get``."""
        return await self._save(call, [call.path["name"]])

    async def save_many(self, call: Call) -> web.StreamResponse:
        """``GET /images/get``."""
        names = [name for value in call.texts("names") for name in value.split(",") if name]
        return await self._save(call, names)

    async def _save(self, call: Call, names: Sequence[str]) -> web.StreamResponse:
        await asyncio.to_thread(save.select, self._store, names)  # errors before the first byte
        response = await stream(call, "application/x-tar")
        writer = BodyWriter(response)

        def work() -> None:
            save.save(self._store, names, writer.stream)
            writer.flush()

        await asyncio.to_thread(work)
        await response.write_eof()
        return response

    async def create(self, call: Call) -> web.StreamResponse:
        """``POST /images/create``: pull, or import a root filesystem."""
        source = call.text("fromSrc")
        if source:
            return await self._import(call, source)
        name = pull_target(call.text("fromImage"), call.text("tag"))
        registry, platform = self._registry_or_error(), platform_of(call)
        auth = call.request.headers.get("X-Registry-Auth", "")

        async def work(sink: Sink) -> None:
            await registry.pull(name, auth=auth, platform=platform, progress=sink)

        return await progress_stream(call, work)

    async def _import(self, call: Call, source: str) -> web.StreamResponse:
        name = target(call.text("repo"), call.text("tag"))
        changes, platform = call.texts("changes"), platform_of(call)
        message = call.text("message") or f"Imported from {source}"

        def blocking(tar: BinaryIO) -> str:
            with self._store.working():
                image = commit.import_tar(
                    self._store, tar, changes=changes, message=message, platform=platform
                )
                if name is not None:
                    self._store.tag(image.id, name)
                return image.id

        async def work(sink: Sink) -> None:
            if source == "-":
                image_id = await asyncio.to_thread(
                    blocking, BodyReader(call.request.content).stream
                )
            else:
                async with download(source) as body:
                    sink(Message(status=f"Downloading from {source}"))
                    image_id = await asyncio.to_thread(blocking, BodyReader(body).stream)
            sink(Message(status=image_id))

        return await progress_stream(call, work)

    async def push(self, call: Call) -> web.StreamResponse:
        """``POST /images/{name}/push``."""
        name = reference.parse(call.path["name"])
        if tag := call.text("tag"):
            name = name.with_tag(tag)
        registry, platform = self._registry_or_error(), platform_of(call)
        auth = call.request.headers.get("X-Registry-Auth", "")

        async def work(sink: Sink) -> None:
            await registry.push(name, auth=auth, platform=platform, progress=sink)

        return await progress_stream(call, work)

    async def search(self, call: Call) -> web.StreamResponse:
        """``GET /images/search``."""
        limit = call.number("limit", 25) or 25
        found = await self._registry_or_error().search(
            call.text("term"), limit=limit, auth=call.request.headers.get("X-Registry-Auth", "")
        )
        return json_response(found)

    async def commit(self, call: Call) -> web.StreamResponse:
        """``POST /commit``."""
        if self._committer is None:
            raise Unsupported("this engine has no containers to commit")
        name = target(call.text("repo"), call.text("tag"))
        body = await call.json(dict[str, object])
        request = CommitRequest(
            container=call.text("container"),
            config=_config(body),
            changes=tuple(call.texts("changes")),
            comment=call.text("comment"),
            author=call.text("author"),
            pause=call.flag("pause", True),
        )
        async with self._store.adding():
            image_id = await self._committer(request)
            if name is not None:
                await asyncio.to_thread(self._store.tag, image_id, name)
        return json_response({"Id": image_id}, 201)

    def _registry_or_error(self) -> Registries:
        if self._registry is None:
            raise Unsupported("this engine reaches no registries")
        return self._registry


def routes(
    store: ImageStore,
    *,
    registry: Registries | None = None,
    committer: Committer | None = None,
) -> list[Route]:
    """The routes of the image group.

    Args:
        store: the images.
        registry: pull, push and search; they answer 501 without one.
        committer: ``POST /commit``; it answers 501 without one.
    """
    return ImageRoutes(store, registry, committer).routes()


def in_band(work: Callable[[Sink], Awaitable[None]]) -> Callable[[Sink], Awaitable[None]]:
    """Work whose errors are always told in the stream, never as an HTTP error (load)."""

    async def told(sink: Sink) -> None:
        try:
            await work(sink)
        except LazaretteError as error:
            sink(failure(error.message))

    return told


def target(repository: str, tag: str) -> Reference | None:
    """``repo`` and ``tag`` of a query as a name; None if there is no repository.

    Raises:
        InvalidReference: malformed.
    """
    if not repository:
        return None
    name = reference.parse(repository)
    if tag:
        return name.with_digest(tag) if reference.is_digest(tag) else name.with_tag(tag)
    return name.with_default_tag()


def pull_target(image: str, tag: str) -> Reference:
    """``fromImage`` and ``tag`` as what to pull; without a tag, all tags are meant.

    Raises:
        InvalidReference: malformed.
    """
    name = reference.parse(image)
    if not tag:
        return name
    return name.with_digest(tag) if reference.is_digest(tag) else name.with_tag(tag)


def platform_of(call: Call) -> Platform | None:
    """The ``platform`` query: ``os/arch``, or JSON since 1.48."""
    return read_platform(call.text("platform"))


def read_platform(text: str) -> Platform | None:
    """A platform as ``os/arch`` or as a JSON object; None for an empty text.

    Raises:
        InvalidArgument: neither.
    """
    try:
        if text.startswith("{"):
            return jsontext.decode(text, type=Platform).normalised()
        return parse_platform(text)
    except (msgspec.MsgspecError, BadArchive) as bad:
        raise InvalidArgument(f"invalid platform: {bad}") from bad


def _check_platform(call: Call, found: listing.Inspect) -> None:
    wanted = platform_of(call) if call.version >= (1, 49) else None
    if wanted is not None:
        name = reference.parse(call.path["name"]).with_default_tag().familiar
        listing.require_platform(name, found, wanted)


def _summary(one: listing.Summary, version: tuple[int, int]) -> Mapping[str, object]:
    shown: dict[str, object] = msgspec.to_builtins(one)
    if version < (1, 44):
        shown["VirtualSize"] = one.size
    if version < (1, 43) and not one.repo_tags and not one.repo_digests:
        shown["RepoTags"], shown["RepoDigests"] = ["<none>:<none>"], ["<none>@<none>"]
    if version < (1, 48):
        shown.pop("Descriptor", None)
    return shown


def _removed(done: Sequence[Removed]) -> Sequence[Mapping[str, str]]:
    return [{"Untagged": r.untagged} if r.untagged else {"Deleted": r.deleted} for r in done]


def _config(body: Mapping[str, object]) -> RunConfig | None:
    if not body:
        return None
    try:
        return commit.run_config(body)
    except msgspec.ValidationError as bad:
        raise InvalidArgument(f"invalid JSON: {bad}") from bad
