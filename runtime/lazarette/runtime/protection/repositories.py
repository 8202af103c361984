"""The repositories a daemon knows, with what opens them.

Each is a file of its own under the data root, readable by root alone: secrets are kept
neither in the state database nor in anything the API shows.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

import msgspec

from lazarette.backup.jobs.access import add_kit, init_repository, open_repository
from lazarette.backup.jobs.model import StoreAccess
from lazarette.backup.policy.model import Policy
from lazarette.backup.repository import keys
from lazarette.backup.repository.kit import RecoveryKit
from lazarette.backup.repository.repository import Repository
from lazarette.fuse import jsontext
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, NameTaken, NotFound
from lazarette.storage.files import write_atomic

DEFAULT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class RepositoryUnknown(NotFound):
    """The daemon knows no repository of that name."""

    number = 370
    exit_code = 50


class Registered(msgspec.Struct, frozen=True):
    """A repository the daemon can open.

    Attributes:
        name: how people call it here.
        id: its own, for ever (32 hexadecimal digits).
        access: store and secret.
    """

    name: str
    id: str
    access: StoreAccess


class RepositoryBook:
    """Known repositories.

    Args:
        root: folder of their files.
        cache: folder for local copies of indexes and directories.
        clock: time.
    """

    def __init__(self, root: Path, cache: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self.cache = cache
        self._open: dict[str, Repository] = {}
        self._lock = threading.Lock()
        for folder in (root, cache):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def init(self, name: str, access: StoreAccess) -> RecoveryKit:
        """Make a new repository and know it from now on; its recovery kit is shown once.

        Without a passphrase this host gets a random key of its own.

        Raises:
            NameTaken: the name is taken here.
            Conflict: the store holds a repository already.
        """
        name = self._free(name)
        access = access if access.key else _with_fresh_key(access)
        repository, kit = init_repository(access, self._clock)
        self._write(Registered(name, repository.keys.repository_id.hex(), access))
        repository.close()
        return kit

    def adopt(self, name: str, access: StoreAccess) -> Registered:
        """Know an existing repository; this host gets a key of its own in it.

        Raises:
            NameTaken: the name is taken here by another repository.
            Unauthenticated: credentials, secret or kit are wrong.
        """
        repository = open_repository(access, self._clock)
        try:
            identity = repository.keys.repository_id.hex()
            for known in self.list():
                if known.id == identity:
                    return known
            name = self._free(name)
            own = _with_fresh_key(access)
            host_key = keys.KeyFile(bytes.fromhex(own.key))
            keys.add(repository.store, repository.keys, host_key, label="host", clock=self._clock)
            registered = Registered(name, identity, own)
            self._write(registered)
            return registered
        finally:
            repository.close()

    def get(self, name: str = "") -> Registered:
        """One of them; the only one, or ``default``, when no name is given.

        Raises:
            RepositoryUnknown: none of that name.
        """
        if not name:
            known = self.list()
            if len(known) == 1:
                return known[0]
            name = DEFAULT
        try:
            raw = self._file(name).read_bytes()
        except FileNotFoundError:
            raise RepositoryUnknown(
                f"no repository {name} is known here", hint="make one with laz repo init URL"
            ) from None
        return jsontext.decode(raw, type=Registered)

    def list(self) -> list[Registered]:
        """All of them, by name."""
        return [
            jsontext.decode(path.read_bytes(), type=Registered)
            for path in sorted(self._root.glob("*.json"))
        ]

    def remove(self, name: str) -> None:
        """Forget a repository here; its bytes stay where they are."""
        known = self.get(name)
        self._file(known.name).unlink()
        with self._lock:
            stale = self._open.pop(known.name, None)
        if stale is not None:
            stale.close()

    def open(self, name: str = "") -> Repository:
        """An open repository, shared by callers in all threads; blocks."""
        known = self.get(name)
        with self._lock:
            if known.name not in self._open:
                self._open[known.name] = open_repository(known.access, self._clock, self.cache)
            return self._open[known.name]

    def new_kit(self, name: str) -> RecoveryKit:
        """A further recovery kit."""
        return add_kit(self.open(name), self.get(name).access.url, self._clock)

    def close(self) -> None:
        """Let go of all stores."""
        with self._lock:
            for repository in self._open.values():
                repository.close()
            self._open.clear()

    def _free(self, name: str) -> str:
        name = name or DEFAULT
        if self._file(name).exists():
            raise NameTaken(
                f"a repository {name} is known here already", hint="name this one with --name"
            )
        return name

    def file(self, name: str) -> Path:
        """The file that opens a repository, readable by root alone."""
        return self._file(self.get(name).name)

    def _file(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"{name} is no name for a repository")
        return self._root / f"{name}.json"

    def _write(self, registered: Registered) -> None:
        write_atomic(self._file(registered.name), msgspec.json.encode(registered))


def repository_of(book: RepositoryBook, policy: Policy) -> str:
    """The name of a policy's repository; a policy may give its URL.

    Raises:
        RepositoryUnknown: this daemon does not know it.
    """
    if policy.repository:
        return known_name(book, policy.repository, policy)
    return book.get().name


def known_name(book: RepositoryBook, wanted: str, policy: Policy) -> str:
    """The name of a repository that a policy names, by its URL too.

    Raises:
        RepositoryUnknown: this daemon does not know it.
    """
    for known in book.list():
        if wanted in (known.name, known.access.url):
            return known.name
    raise RepositoryUnknown(
        f"policy {policy.name} names the repository {wanted}, which is not known here",
        hint="laz repo add URL",
    )


def _with_fresh_key(access: StoreAccess) -> StoreAccess:
    fresh = keys.KeyFile.generate().secret.hex()
    return msgspec.structs.replace(access, key=fresh, key_kind="file")
