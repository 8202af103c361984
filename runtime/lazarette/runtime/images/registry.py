"""A client of one repository in a registry: the distribution protocol, version 2.

Specification: https://github.com/opencontainers/distribution-spec (v1.1) and, for
tokens, https://distribution.github.io/distribution/spec/auth/token/.  Everything received
is checked against its digest by the caller of :meth:`Repository.blob`, and here for
manifests.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec
from yarl import URL

from lazarette.fuse import jsontext
from lazarette.runtime.images import model
from lazarette.runtime.images.blobs import Blob
from lazarette.runtime.images.credentials import Credentials
from lazarette.runtime.images.endpoints import Endpoint, RegistryConfig
from lazarette.runtime.images.errors import (
    DigestMismatch,
    LoginFailed,
    ManifestUnknown,
    NoCredentials,
    PullDenied,
    RegistryFault,
)
from lazarette.runtime.images.model import digest_of
from lazarette.runtime.images.reference import Reference
from lazarette.storage.errors import InvalidArgument

PIECE = 1 << 20
_MAX_MANIFEST = 8 << 20
_MAX_ERROR = 64 << 10
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=60)
_ACCEPTED = ", ".join((*model.MANIFESTS, *model.INDEXES))
_CHALLENGE = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class RemoteManifest:
    """A manifest or index as a registry has it.

    Attributes:
        data: its bytes, which are what the digest is of.
        media_type: what it is.
        digest: of ``data``.
    """

    data: bytes
    media_type: str
    digest: str


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    refresh_token: str = ""


class _Fault(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Faults(msgspec.Struct):
    errors: list[_Fault] = []


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


class Repository:
    """One repository, reached by one endpoint.

    Args:
        session: for its requests.
        config: how registries are reached.
        endpoint: where it is.
        path: of the repository, e.g. ``library/busybox``; empty for the registry itself.
        credentials: the login.
        actions: what a token is asked for, ``pull`` or ``pull,push``.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        config: RegistryConfig,
        endpoint: Endpoint,
        path: str,
        credentials: Credentials,
        actions: str = "pull",
    ) -> None:
        self.endpoint = endpoint
        self._session = session
        self._config = config
        self._path = path
        self._credentials = credentials
        self._actions = actions
        self._authorization = _bearer(credentials.registrytoken)
        self._login = asyncio.Lock()
        self.identity_token = ""

    # requests

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], AsyncIterator[bytes] | bytes] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, with a login when the registry asks for one.

        Raises:
            RegistryFault: the registry cannot be reached.
            LoginFailed: it refuses the login.
            NoCredentials: it wants one.
        """
        target = self._target(method, url)
        for attempt in (0, 1):
            sent = dict(headers or {})
            used = self._authorization
            if used and urlsplit(target).netloc == self.endpoint.host:
                sent["Authorization"] = used
            try:
                response = await self._session.request(
                    method,
                    URL(target, encoded=True),
                    headers=sent,
                    data=body() if body else None,
                    ssl=self._config.tls(self.endpoint),
                    proxy=self.endpoint.proxy,
                )
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as bad:
                raise _unreachable(method, target, bad) from bad
            async with response:
                if response.status != 401 or attempt:
                    yield response
                    return
                challenge = response.headers.get("WWW-Authenticate", "")
            async with self._login:
                if self._authorization == used:
                    self._authorization = await self._answer(challenge, target)

    def _target(self, method: str, url: str) -> str:
        """Where a request goes; ``url`` may be what a registry answered."""
        if not url:
            raise RegistryFault(f"registry {self.endpoint.host} does not say where to {method}")
        try:
            target = urljoin(self.endpoint.url + "/", url)
            named = urlsplit(target).hostname
        except ValueError as bad:
            raise RegistryFault(f'registry {self.endpoint.host} names "{url}": {bad}') from bad
        if not named or not target.startswith(("http://", "https://")):
            raise RegistryFault(f'registry {self.endpoint.host} names "{url}"')
        return target

    async def _answer(self, challenge: str, target: str) -> str:
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            if not self._credentials.username:
                raise NoCredentials("get", target)
            return _basic(self._credentials)
        if scheme.lower() == "bearer":
            return _bearer(await self._token(dict(_CHALLENGE.findall(rest))))
        raise LoginFailed(f'Get "{target}": unauthorized: authentication required')

    async def _token(self, asked: Mapping[str, str]) -> str:
        realm = asked.get("realm", "")
        if not realm.startswith(("https://", "http://")):
            raise RegistryFault(f'registry {self.endpoint.host} names no token server: "{realm}"')
        if realm.startswith("http://") and self.endpoint.url.startswith("https://"):
            raise RegistryFault(
                f"registry {self.endpoint.host} sends logins to {realm} without TLS",
                hint="name the registry insecure in the daemon's configuration if that is meant",
            )
        scope = f"repository:{self._path}:{self._actions}" if self._path else ""
        query = {"service": asked.get("service", ""), "scope": asked.get("scope", scope) or scope}
        query = {key: value for key, value in query.items() if value}
        if self._credentials.identitytoken:
            return await self._refresh(realm, query)
        headers = {"Authorization": _basic(self._credentials)} if self._credentials.username else {}
        if headers:
            query |= {"account": self._credentials.username, "offline_token": "true"}
            query["client_id"] = "docker"
        try:
            url = str(URL(realm).update_query(query))
        except ValueError as bad:
            raise RegistryFault(
                f'registry {self.endpoint.host} names no token server: "{realm}"'
            ) from bad
        return await self._ask_token("GET", url, headers, None)

    async def _refresh(self, realm: str, query: Mapping[str, str]) -> str:
        form = dict(query) | {
            "grant_type": "refresh_token",
            "refresh_token": self._credentials.identitytoken,
            "client_id": "docker",
        }
        return await self._ask_token("POST", realm, {}, form)

    async def _ask_token(
        self, method: str, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> str:
        try:
            response = await self._session.request(
                method,
                url,
                headers=dict(headers),
                data=form,
                ssl=self._config.tls(self.endpoint),
                proxy=self.endpoint.proxy,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as bad:
            raise _unreachable(method, url, bad) from bad
        async with response:
            raw = await response.content.read(_MAX_MANIFEST)
            if response.status in (400, 401, 403):
                raise LoginFailed(
                    f'{method.title()} "{url.partition("?")[0]}": '
                    "unauthorized: incorrect username or password"
                )
            if response.status != 200:
                raise RegistryFault(f"token server {url.partition('?')[0]} says {response.status}")
        try:
            answer = jsontext.decode(raw, type=_Token)
        except msgspec.MsgspecError as bad:
            raise RegistryFault(f"token server {url.partition('?')[0]} answers nonsense") from bad
        self.identity_token = answer.refresh_token or self.identity_token
        return answer.token or answer.access_token

    def _url(self, kind: str, what: str) -> str:
        return f"/v2/{self._path}/{kind}/{what}"

    # reading

    async def ping(self) -> None:
        """See that the registry is there and takes the login.

        Raises:
            LoginFailed: it does not.
            RegistryFault: it is not there.
        """
        async with self._request("GET", "/v2/") as response:
            if response.status == 401:
                raise LoginFailed(
                    f'Get "{self.endpoint.url}/v2/": unauthorized: authentication required'
                )
            if response.status != 200:
                raise await _fault(response)

    async def manifest(self, name: Reference) -> RemoteManifest:
        """The manifest or index of a tag or digest, verified.

        Raises:
            ManifestUnknown: there is none.
            PullDenied: the repository is not there, or needs a login.
            DigestMismatch: it is not what its digest says.
        """
        wanted = name.digest or name.tag
        async with self._request(
            "GET", self._url("manifests", wanted), headers={"Accept": _ACCEPTED}
        ) as response:
            if response.status == 404:
                raise await _missing(response, name)
            if response.status in (401, 403):
                raise PullDenied(name.familiar_name, (await _fault(response)).message)
            if response.status != 200:
                raise await _fault(response)
            data = await response.content.read(_MAX_MANIFEST + 1)
            while len(data) <= _MAX_MANIFEST and (more := await response.content.readany()):
                data += more
            if len(data) > _MAX_MANIFEST:
                raise RegistryFault(f"manifest of {name.familiar} has more than 8 MiB")
            digest = digest_of(data)
            told = name.digest or response.headers.get("Docker-Content-Digest", digest)
            if told.startswith("sha256:") and told != digest:
                raise DigestMismatch(f"manifest of {name.familiar} has digest {digest}, not {told}")
            return RemoteManifest(data, _media_type(data, response), digest)

    async def tags(self) -> list[str]:
        """All tags of the repository.

        Raises:
            PullDenied: it is not there, or needs a login.
        """
        found: list[str] = []
        url = self._url("tags", "list")
        while url:
            async with self._request("GET", url) as response:
                if response.status in (401, 403, 404):
                    raise PullDenied(self._path, (await _fault(response)).message)
                if response.status != 200:
                    raise await _fault(response)
                try:
                    page = jsontext.decode(await response.read(), type=_Tags)
                except msgspec.MsgspecError as bad:
                    raise RegistryFault(f"{self.endpoint.url}{url} answers nonsense") from bad
                found += page.tags or []
                try:
                    following = response.links.getone("next", None)
                except ValueError as bad:
                    raise RegistryFault(f"{self.endpoint.url}{url} links nowhere: {bad}") from bad
                url = str(following["url"]) if following else ""
        return found

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, _Pieces]]:
        """A blob's bytes.

        Args:
            digest: which one.
            start: first byte wanted.

        Yields:
            The first byte that comes (0 where the registry cannot begin later), and pieces.

        Raises:
            RegistryFault: it is not there, or the connection breaks.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        headers["Accept-Encoding"] = "identity"
        async with self._request("GET", self._url("blobs", digest), headers=headers) as response:
            if response.status not in (200, 206):
                raise await _fault(response)
            yield start if response.status == 206 else 0, _pieces(response)

    # writing

    async def has_blob(self, digest: str) -> bool:
        """Whether the repository has a blob."""
        async with self._request("HEAD", self._url("blobs", digest)) as response:
            if response.status == 200:
                return True
            if response.status == 404:
                return False
            raise await _fault(response)

    async def mount(self, digest: str, source: str) -> bool:
        """Take a blob over from another repository of the registry, if it allows that."""
        url = str(URL(self._url("blobs", "uploads/")).with_query({"mount": digest, "from": source}))
        async with self._request("POST", url) as response:
            if response.status == 201:
                return True
            if response.status != 202:
                raise await _fault(response)
            location = response.headers.get("Location", "")
        if location:
            async with self._request("DELETE", location):
                pass  # an upload begun instead; not wanted
        return False

    async def upload(self, file: Path, blob: Blob, sent: Callable[[int], None]) -> None:
        """Send a blob.

        Args:
            file: its bytes.
            blob: its digest and size.
            sent: told of the bytes sent so far.

        Raises:
            RegistryFault: the registry refuses it, or the connection breaks.
        """
        async with self._request("POST", self._url("blobs", "uploads/")) as response:
            if response.status != 202:
                raise await _fault(response)
            location = response.headers.get("Location", "")
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        async with self._request(
            "PATCH", location, headers=headers, body=lambda: _file_pieces(file, sent)
        ) as response:
            if response.status != 202:
                raise await _fault(response)
            location = response.headers.get("Location", location)
        joiner = "&" if "?" in location else "?"
        async with self._request("PUT", f"{location}{joiner}digest={blob.digest}") as response:
            if response.status != 201:
                raise await _fault(response)

    async def put_manifest(self, tag: str, data: bytes, media_type: str) -> str:
        """Publish a manifest under a tag or digest; its digest.

        Raises:
            RegistryFault: the registry refuses it.
        """
        headers = {"Content-Type": media_type}
        async with self._request(
            "PUT", self._url("manifests", tag), headers=headers, body=lambda: data
        ) as response:
            if response.status != 201:
                raise await _fault(response)
        return digest_of(data)


_Pieces = AsyncIterator[bytes]


def open_session() -> aiohttp.ClientSession:
    """A session for registries; the caller closes it."""
    return aiohttp.ClientSession(
        timeout=_TIMEOUT, headers={"User-Agent": "lazarette"}, auto_decompress=False
    )


@asynccontextmanager
async def download(url: str) -> AsyncIterator[aiohttp.StreamReader]:
    """A file from the web, as ``docker import URL`` takes it.

    Raises:
        InvalidArgument: not an address of the web.
        RegistryFault: it cannot be had.
    """
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(f"import from {url}: only http and https are known")
    endpoint = Endpoint("://".join(urlsplit(url)[:2]))
    async with open_session() as session:
        try:
            response = await session.get(url, proxy=endpoint.proxy)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as bad:
            raise _unreachable("get", url, bad) from bad
        async with response:
            if response.status != 200:
                raise RegistryFault(f"Got HTTP status code >= 400: {response.status}")
            yield response.content


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for piece in response.content.iter_chunked(PIECE):
            yield piece
    except (aiohttp.ClientError, TimeoutError, OSError) as bad:
        raise RegistryFault(f"download from {response.url.host} broke: {_reason(bad)}") from bad


async def _file_pieces(file: Path, sent: Callable[[int], None]) -> AsyncIterator[bytes]:
    done = 0
    with file.open("rb", buffering=0) as stream:
        while piece := await asyncio.to_thread(stream.read, PIECE):
            yield piece
            done += len(piece)
            sent(done)


def _media_type(data: bytes, response: aiohttp.ClientResponse) -> str:
    """What a manifest says it is; else what the header says; old OCI ones say nothing."""
    read = model.decode(data, model.Kind, "manifest")
    if read.media_type:
        return read.media_type
    if response.content_type in (*model.MANIFESTS, *model.INDEXES):
        return response.content_type
    return model.OCI_INDEX if read.manifests is not None else model.OCI_MANIFEST


async def _faults(response: aiohttp.ClientResponse) -> list[_Fault]:
    raw = await response.content.read(_MAX_ERROR)
    try:
        return jsontext.decode(raw, type=_Faults).errors
    except msgspec.MsgspecError:
        return []


async def _fault(response: aiohttp.ClientResponse) -> RegistryFault | LoginFailed:
    told = "; ".join(
        f"{fault.code.lower().replace('_', ' ')}: {fault.message}".removesuffix(": ")
        for fault in await _faults(response)
    )
    if response.status in (401, 403):
        return LoginFailed(told or "authentication required")
    said = told or f"received unexpected HTTP status: {response.status} {response.reason}"
    return RegistryFault(said)


async def _missing(
    response: aiohttp.ClientResponse, name: Reference
) -> ManifestUnknown | PullDenied:
    codes = {fault.code for fault in await _faults(response)}
    if "NAME_UNKNOWN" in codes:
        return PullDenied(name.familiar_name)
    return ManifestUnknown(name.familiar)


def _unreachable(method: str, url: str, bad: Exception) -> RegistryFault:
    return RegistryFault(f'{method.title()} "{url.partition("?")[0]}": {_reason(bad)}')


def _reason(bad: Exception) -> str:
    if isinstance(bad, aiohttp.ClientConnectorError):
        return _os_reason(bad)
    if isinstance(bad, TimeoutError):
        return "timed out"
    return str(bad) or type(bad).__name__


def _os_reason(bad: aiohttp.ClientConnectorError) -> str:
    """The kernel's word; asyncio's for it names the call and the address instead."""
    cause = bad.os_error
    if isinstance(cause, ConnectionRefusedError | TimeoutError) and cause.errno:
        return f"dial tcp {bad.host}:{bad.port}: connect: {os.strerror(cause.errno).lower()}"
    return str(cause.strerror or cause).lower()


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _bearer(token: str) -> str:
    return f"Bearer {token}" if token else ""
