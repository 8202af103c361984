"""Logins: what the API's headers carry, and what the command line keeps for the user.

``X-Registry-Auth`` is base64url of JSON, padded or not; clients also send ``null``, ``{}``
or nothing at all, and a value that cannot be read means "no login", never an error.
``~/.docker/config.json`` and its helpers are those of the docker command line
(https://github.com/docker/docker-credential-helpers).
"""

from __future__ import annotations

import base64
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime import gojson
from lazarette.storage.errors import InternalError
from lazarette.storage.process import run

_T = TypeVar("_T")

HUB_KEY = "https://index.docker.io/v1/"
_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_TOKEN_USER = "<token>"
_HELPER_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_NOT_FOUND = b"credentials not found"


class Credentials(msgspec.Struct, omit_defaults=True):
    """A login for one registry.

    Attributes:
        username: with ``password``, for basic authentication and token servers.
        password: its secret.
        auth: both as base64 of ``username:password``; older clients send only this.
        serveraddress: the registry, perhaps with a scheme.
        identitytoken: a refresh token for the token server, instead of a password.
        registrytoken: a bearer token for the registry itself.
    """

    username: str = ""
    password: str = ""
    auth: str = ""
    serveraddress: str = ""
    identitytoken: str = ""
    registrytoken: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, serveraddress={self.serveraddress!r})"

    def filled(self) -> Credentials:
        """The same, with user and password taken out of ``auth`` where they are missing."""
        if not self.auth or self.username:
            return self
        with suppress(ValueError):
            user, colon, password = base64.b64decode(self.auth).decode().partition(":")
            if colon:
                return msgspec.structs.replace(
                    self, username=user, password=password.rstrip("\0"), auth=""
                )
        return self

    def __bool__(self) -> bool:
        return bool(self.username or self.identitytoken or self.registrytoken)


def from_header(value: str) -> Credentials:
    """``X-Registry-Auth`` as credentials; empty ones where it cannot be read."""
    with suppress(ValueError, msgspec.MsgspecError):
        found = jsontext.decode(_unpacked(value))
        return gojson.convert({} if found is None else found, Credentials).filled()
    return Credentials()


def from_config_header(value: str) -> dict[str, Credentials]:
    """``X-Registry-Config`` as credentials by registry; entries that cannot be read fall."""
    entries: dict[str, msgspec.Raw] = {}
    with suppress(ValueError, msgspec.MsgspecError):
        entries = jsontext.decode(_unpacked(value), type=dict[str, msgspec.Raw])
    found: dict[str, Credentials] = {}
    for server, raw in entries.items():
        with suppress(msgspec.MsgspecError):
            found[host_of(server)] = gojson.convert(jsontext.decode(raw), Credentials).filled()
    return found


def to_header(credentials: Credentials) -> str:
    """Credentials as ``X-Registry-Auth``."""
    return base64.urlsafe_b64encode(msgspec.json.encode(credentials)).decode()


def host_of(server: str) -> str:
    """``https://reg.io/v1/`` as ``reg.io``; every name of the hub as ``docker.io``."""
    host = re.sub(r"^https?://", "", server).partition("/")[0]
    return "docker.io" if host in _HUB_HOSTS or not host else host


def _unpacked(value: str) -> bytes:
    text = value.strip().rstrip("=").replace("+", "-").replace("/", "_")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class _Entry(msgspec.Struct, omit_defaults=True):
    auth: str = ""
    identitytoken: str = ""
    registrytoken: str = ""
    username: str = ""
    password: str = ""


class _Config(msgspec.Struct, omit_defaults=True, rename="camel"):
    """The parts of ``config.json`` that say where logins are."""

    auths: dict[str, _Entry] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}


class _HelperAnswer(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


class DockerConfig:
    """The user's ``config.json``, read and written with everything else in it kept.

    Args:
        folder: ``$DOCKER_CONFIG`` or ``~/.docker`` when None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        chosen = folder or Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
        self._path = chosen / "config.json"

    def get(self, server: str) -> Credentials:
        """The login for a registry; empty if there is none.

        Raises:
            InternalError: the file is broken or a helper fails.
        """
        config = self._read(_Config)
        key = _key(server)
        helper = config.cred_helpers.get(host_of(server)) or config.creds_store
        if helper:
            return _ask_helper(helper, key)
        for name, entry in config.auths.items():
            if host_of(name) == host_of(server):
                found = Credentials(
                    username=entry.username,
                    password=entry.password,
                    auth=entry.auth,
                    serveraddress=key,
                    identitytoken=entry.identitytoken,
                    registrytoken=entry.registrytoken,
                )
                return found.filled()
        return Credentials()

    def store(self, server: str, credentials: Credentials) -> None:
        """Keep a login: in the helper if one is configured, else in the file.

        Raises:
            InternalError: the file is broken or a helper fails.
        """
        config = self._read(_Config)
        key = _key(server)
        helper = config.cred_helpers.get(host_of(server)) or config.creds_store
        if helper:
            _tell_helper(helper, key, credentials)
            self._change(key, {})
        elif credentials.identitytoken:
            auth = _basic(credentials.username, "")
            self._change(key, {"auth": auth, "identitytoken": credentials.identitytoken})
        else:
            self._change(key, {"auth": _basic(credentials.username, credentials.password)})

    def erase(self, server: str) -> bool:
        """Forget a login; whether there was one.

        Raises:
            InternalError: the file is broken or a helper fails.
        """
        config = self._read(_Config)
        key = _key(server)
        helper = config.cred_helpers.get(host_of(server)) or config.creds_store
        known = any(host_of(name) == host_of(server) for name in config.auths)
        if helper:
            _run_helper(helper, "erase", key.encode())
        if known:
            self._change(key, None)
        return known or bool(helper)

    def _read(self, kind: type[_T]) -> _T:
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            raw = b"{}"
        try:
            return jsontext.decode(raw.strip() or b"{}", type=kind)
        except msgspec.MsgspecError as bad:
            raise InternalError(
                f"login file {self._path} cannot be read: {bad}", hint="repair or remove it"
            ) from bad

    def _change(self, key: str, entry: dict[str, str] | None) -> None:
        whole = self._read(dict[str, object])
        auths = whole.get("auths")
        kept = dict(auths) if isinstance(auths, dict) else {}
        for name in [name for name in kept if host_of(str(name)) == host_of(key)]:
            del kept[name]
        if entry is not None:
            kept[key] = entry
        whole["auths"] = kept
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{os.getpid()}.new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(whole), indent=4))
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, self._path)


def _key(server: str) -> str:
    host = host_of(server)
    return HUB_KEY if host == "docker.io" else host


def _basic(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def _run_helper(helper: str, verb: str, said: bytes) -> bytes:
    if not _HELPER_NAME.fullmatch(helper):
        raise InternalError(f'credential helper "{helper}" has no usable name')
    done = run([f"docker-credential-{helper}", verb], stdin=said, check=False)
    if done.code == 0:
        return done.stdout
    if _NOT_FOUND in done.stdout + done.stderr:
        return b""
    raise InternalError(
        f"credential helper {helper} failed to {verb}: "
        f"{(done.stdout or done.stderr).decode(errors='replace').strip()}"
    )


def _ask_helper(helper: str, key: str) -> Credentials:
    said = _run_helper(helper, "get", key.encode())
    if not said:
        return Credentials()
    try:
        answer = jsontext.decode(said, type=_HelperAnswer)
    except msgspec.MsgspecError as bad:
        raise InternalError(f"credential helper {helper} answers nonsense: {bad}") from bad
    if answer.username == _TOKEN_USER:
        return Credentials(serveraddress=key, identitytoken=answer.secret)
    return Credentials(username=answer.username, password=answer.secret, serveraddress=key)


def _tell_helper(helper: str, key: str, credentials: Credentials) -> None:
    token = bool(credentials.identitytoken)
    said = {
        "ServerURL": key,
        "Username": _TOKEN_USER if token else credentials.username,
        "Secret": credentials.identitytoken if token else credentials.password,
    }
    _run_helper(helper, "store", msgspec.json.encode(said))
