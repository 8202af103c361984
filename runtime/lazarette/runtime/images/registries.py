"""Registries as the API uses them: pull, push, log in, look up, search."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from lazarette.runtime.images import model
from lazarette.runtime.images.credentials import Credentials, from_header, host_of
from lazarette.runtime.images.download import Downloads
from lazarette.runtime.images.endpoints import RegistryConfig
from lazarette.runtime.images.errors import (
    ImageNotFound,
    LoginFailed,
    ManifestUnknown,
    NoCredentials,
    NoSuchTag,
    PullDenied,
    RegistryFault,
)
from lazarette.runtime.images.model import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    decode,
)
from lazarette.runtime.images.progress import Message, Sink
from lazarette.runtime.images.pull import Pull
from lazarette.runtime.images.push import Push
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.registry import Repository, open_session
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.errors import LazaretteError

_SEARCH_INDEX = "https://index.docker.io"
_MAX_ANSWER = 4 << 20


class Distribution(msgspec.Struct, rename="pascal"):
    """What a registry has under a name (``GET /distribution/NAME/json``)."""

    descriptor: Descriptor
    platforms: list[Platform]


class SearchResult(msgspec.Struct):
    """One line of ``docker search``."""

    name: str = ""
    description: str = ""
    star_count: int = 0
    is_official: bool = False
    is_automated: bool = False


class _SearchPage(msgspec.Struct):
    results: list[SearchResult] | None = None


class Registries:
    """All registries, behind one object.

    Args:
        store: images come from and go to it.
        config: how registries are reached.
    """

    def __init__(self, store: ImageStore, config: RegistryConfig | None = None) -> None:
        self._store = store
        self._config = config or RegistryConfig()
        self._downloads = Downloads(store.blobs, self._config.attempts)

    @asynccontextmanager
    async def _repository(
        self, name: Reference, credentials: Credentials, actions: str
    ) -> AsyncIterator[Repository]:
        """The repository by the first endpoint that answers and, of mirrors, has the name."""
        mirrors = actions == "pull"
        failure: LazaretteError | None = None
        async with open_session() as session:
            for endpoint in self._config.endpoints(name.domain, mirrors=mirrors):
                login = Credentials() if endpoint.mirror else credentials
                found = Repository(session, self._config, endpoint, name.path, login, actions)
                try:
                    await found.ping()
                    if endpoint.mirror and (name.tag or name.digest):
                        await found.manifest(name)
                except (LoginFailed, NoCredentials):
                    if endpoint.mirror:
                        continue
                    raise
                except (ManifestUnknown, PullDenied, RegistryFault) as fault:
                    failure = fault
                    continue
                yield found
                return
        raise failure or RegistryFault(f"no registry to reach for {name.familiar}")

    async def pull(
        self, name: Reference, *, auth: str, platform: Platform | None, progress: Sink
    ) -> None:
        """Fetch an image and tag it; all tags of the repository if the name has none.

        Args:
            name: what to pull.
            auth: ``X-Registry-Auth``.
            platform: which image of an index; this host's if None.
            progress: told of everything.

        Raises:
            LazaretteError: as :meth:`Pull.run`.
        """
        async with self._repository(name, from_header(auth), "pull") as source:
            names = [name]
            if not name.tag and not name.digest:
                names = [name.with_tag(tag) for tag in await source.tags()]
            for one in names:
                await Pull(
                    self._store,
                    self._downloads,
                    source,
                    one,
                    platform=platform,
                    progress=progress,
                    parallel=self._config.parallel,
                ).run()

    async def push(
        self, name: Reference, *, auth: str, platform: Platform | None, progress: Sink
    ) -> None:
        """Send an image; every tag of the repository if the name has none.

        Args:
            name: what to push.
            auth: ``X-Registry-Auth``.
            platform: the image must be for it, if given.
            progress: told of everything.

        Raises:
            NoSuchTag: there is no such image here.
            LazaretteError: as :meth:`Push.run`.
        """
        progress(Message(status=f"The push refers to repository [{name.name}]"))
        names = [name] if name.tag else self._tags_of(name)
        for one in names:
            image = self._store.find(str(one))
            if image is None:
                raise NoSuchTag(one.familiar_name)
            has = Platform(os=image.config.os, architecture=image.config.architecture)
            if platform is not None and not platform.accepts(has):
                raise ImageNotFound(f"{one.familiar} for {platform}")
        async with self._repository(name, from_header(auth), "pull,push") as target:
            for one in names:
                await Push(
                    self._store, target, one, progress=progress, parallel=self._config.parallel
                ).run()

    def _tags_of(self, name: Reference) -> list[Reference]:
        found = [
            other
            for image in self._store.all()
            for other in self._store.references(image.id)
            if other.name == name.name and other.tag
        ]
        if not found:
            raise NoSuchTag(name.familiar_name)
        return sorted(found, key=str)

    async def login(self, credentials: Credentials) -> str:
        """See whether a registry takes a login; an identity token, if it gives one.

        Raises:
            LoginFailed: it does not.
            RegistryFault: it cannot be reached.
        """
        domain = host_of(credentials.serveraddress)
        failure: RegistryFault | None = None
        async with open_session() as session:
            for endpoint in self._config.endpoints(domain, mirrors=False):
                registry = Repository(session, self._config, endpoint, "", credentials.filled())
                try:
                    await registry.ping()
                except NoCredentials as none:
                    raise LoginFailed(none.message) from none
                except RegistryFault as fault:
                    failure = fault
                    continue
                return registry.identity_token
        raise failure or RegistryFault(f"no registry to reach for {domain}")

    async def inspect(self, name: Reference, *, auth: str) -> Distribution:
        """What a registry has under a name, without pulling it.

        Raises:
            ManifestUnknown: nothing.
            PullDenied: no such repository, or it needs a login.
        """
        async with self._repository(name, from_header(auth), "pull") as source:
            top = await source.manifest(name)
            platforms: list[Platform] = []
            if top.media_type in model.INDEXES:
                offered = decode(top.data, Index, "image index").manifests
                platforms = [one.platform for one in offered if one.platform is not None]
            else:
                wanted = decode(top.data, Manifest, "image manifest").config
                async with self._store.adding():
                    await self._downloads.fetch(source, wanted, lambda _: None)
                    raw = self._store.blobs.read(wanted.digest)
                config = decode(raw, ImageConfig, "image configuration")
                platforms = [
                    Platform(os=config.os, architecture=config.architecture, variant=config.variant)
                ]
            found = Descriptor(media_type=top.media_type, digest=top.digest, size=len(top.data))
            return Distribution(found, platforms)

    async def search(self, term: str, *, limit: int, auth: str) -> list[SearchResult]:
        """Ask the index of the hub, or of the registry the term begins with.

        Raises:
            RegistryFault: it cannot be reached or has none.
        """
        first, slash, rest = term.partition("/")
        base, wanted = _SEARCH_INDEX, term
        if slash and ("." in first or ":" in first or first == "localhost"):
            base, wanted = self._config.endpoints(first)[-1].url, rest
        async with open_session() as session:
            try:
                async with session.get(
                    f"{base}/v1/search", params={"q": wanted, "n": str(limit)}
                ) as response:
                    raw = await response.content.read(_MAX_ANSWER)
                    status = response.status
            except (aiohttp.ClientError, TimeoutError, OSError) as bad:
                raise RegistryFault(f"search at {base} failed: {bad}") from bad
        if status != 200:
            raise RegistryFault(f"search at {base} failed: Unexpected status code {status}")
        return decode(raw, _SearchPage, "search result").results or []
