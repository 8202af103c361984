"""The keys of a repository, and the secrets that open them.

A repository has *master* secrets of 32 random bytes.  Everything that encrypts or names
chunks uses subkeys of them, derived with BLAKE3's key derivation under a context string
of their own.  The masters are never stored bare: each *key object* ``keys/<id>`` holds
them encrypted (AES-256-GCM) under a key made from one *secret*: a passphrase (Argon2id),
a key file or a recovery kit (both random, so BLAKE3 does).  Any one secret opens the
repository; adding and removing secrets touches no data.

``<id>`` is the BLAKE3 hash (16 bytes, hex) of the key object, so a machine without any
secret can tell a damaged one from a whole one.

:func:`rotate` adds a new master: what is written afterwards is encrypted under subkeys
of the new one, what is there stays readable, and only the secrets given keep access.
The key of the chunk ids stays that of the first master: another one would end
deduplication against everything stored.

A *writer* is a host that adds to a repository and cannot read it.  Its key object holds,
instead of masters, only the key of the chunk ids, the key of the index (ids and places,
no content) and an X25519 public key.  Each pack of such a repository has a random data
key of its own, sealed to that public key (:meth:`MasterKeys.seal_pack_key`); only a
holder of the masters can open it.  That it cannot delete either is the store's to
enforce (credentials without delete, or object lock).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lazarette.backup.repository.secret import (
    KEY_BYTES,
    KIND_NAMES,
    DamagedKey,
    KeyFile,
    KitSecret,
    Passphrase,
    PassphraseCost,
    Secret,
    derive,
    wrap_key,
)
from lazarette.backup.stores.contract import BlobInfo, BlobNotFound, BlobStore
from lazarette.storage.clock import Clock, SystemClock
from lazarette.storage.errors import (
    Conflict,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unsupported,
)

__all__ = [
    "CannotRead",
    "DamagedKey",
    "KeyFile",
    "KeyInfo",
    "KitSecret",
    "LastKey",
    "MasterKeys",
    "NoKeys",
    "Passphrase",
    "PassphraseCost",
    "Secret",
    "WrongKey",
    "add",
    "create",
    "listing",
    "remove",
    "rotate",
    "unlock",
]

PREFIX = "keys/"
_LARGEST_OBJECT = 64 << 10


class WrongKey(Unauthenticated):
    """The secret opens none of the repository's keys."""

    number = 211
    exit_code = 40


class NoKeys(NotFound):
    """There is no key object: no repository here, or its keys were deleted."""

    number = 212
    exit_code = 42


class LastKey(Conflict):
    """Removing this key would leave nothing that opens the repository."""

    number = 214


class CannotRead(Unauthenticated):
    """The operation needs a reading key and this host has a writer's."""

    number = 216
    exit_code = 43


class _Sealed(msgspec.Struct, frozen=True):
    """A key object as stored (msgpack)."""

    version: int
    kind: Literal["passphrase", "file", "kit"]
    label: str
    created_ns: int
    salt: bytes
    nonce: bytes
    box: bytes
    cost: PassphraseCost | None = None
    writer: bool = False


class _Opened(msgspec.Struct, frozen=True):
    """What is in the box: masters of a reader, or the parts a writer gets."""

    repository: bytes
    masters: tuple[bytes, ...] = ()
    chunk_ids: bytes = b""
    index: bytes = b""
    public: bytes = b""


class KeyInfo(msgspec.Struct, frozen=True):
    """A key object as a list shows it."""

    id: str
    kind: str
    label: str
    created_ns: int
    writer: bool


class MasterKeys:
    """The subkeys of an unlocked repository; every key has 32 bytes.

    Attributes:
        repository_id: 16 random bytes that name the repository for ever.
        epoch: number of the newest master; what is written uses it.
        can_read: False on a writer's host.
    """

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        self.repository_id = opened.repository
        self.can_read = bool(opened.masters)
        self.epoch = max(len(opened.masters) - 1, 0)

    def __repr__(self) -> str:
        return f"MasterKeys({self.repository_id.hex()}, epoch {self.epoch})"

    @property
    def chunk_id_key(self) -> bytes:
        """Key of the keyed BLAKE3 hash that names chunks; the same in every epoch."""
        if not self.can_read:
            return self._opened.chunk_ids
        return derive("chunk ids", self._opened.masters[0])

    @property
    def index_key(self) -> bytes:
        """AES-256-GCM key of indexes (ids and places, no content); the same in every epoch."""
        if not self.can_read:
            return self._opened.index
        return derive("index", self._opened.masters[0])

    def data_key(self, epoch: int | None = None) -> bytes:
        """AES-256-GCM key of chunk data written in an epoch (None: the newest).

        Raises:
            CannotRead: on a writer's host, which seals a key for each pack instead.
        """
        return derive("chunk data", self._master(epoch))

    def metadata_key(self, epoch: int | None = None) -> bytes:
        """AES-256-GCM key of trees, snapshots and other metadata of an epoch.

        Raises:
            CannotRead: on a writer's host.
        """
        return derive("metadata", self._master(epoch))

    @property
    def public_key(self) -> bytes:
        """X25519 public key that pack keys are sealed to."""
        if not self.can_read:
            return self._opened.public
        return self._private().public_key().public_bytes_raw()

    def seal_pack_key(self) -> tuple[bytes, bytes]:
        """A new random data key and its envelope, which only a reader can open.

        Envelope: ephemeral X25519 public key (32 bytes), then the AES-256-GCM ciphertext
        and tag of the data key (48 bytes) under BLAKE3-derive(shared secret, ephemeral
        public key, recipient's public key) with a zero nonce: the key is used once.
        """
        key = os.urandom(KEY_BYTES)
        ephemeral = X25519PrivateKey.generate()
        sender = ephemeral.public_key().public_bytes_raw()
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(self.public_key))
        wrap = derive("envelope", shared + sender + self.public_key)
        return key, sender + AESGCM(wrap).encrypt(bytes(12), key, None)

    def open_pack_key(self, envelope: bytes) -> bytes:
        """The data key of an envelope.

        Raises:
            CannotRead: on a writer's host.
            DamagedKey: the envelope is not one of this repository.
        """
        private = self._private()
        try:
            sender, box = envelope[:KEY_BYTES], envelope[KEY_BYTES:]
            shared = private.exchange(X25519PublicKey.from_public_bytes(sender))
            wrap = derive("envelope", shared + sender + self.public_key)
            return AESGCM(wrap).decrypt(bytes(12), box, None)
        except (InvalidTag, ValueError) as bad:
            raise DamagedKey("a pack's key envelope cannot be opened") from bad

    def for_writer(self) -> MasterKeys:
        """The same repository as a writer's host sees it."""
        return MasterKeys(
            _Opened(
                repository=self.repository_id,
                chunk_ids=self.chunk_id_key,
                index=self.index_key,
                public=self.public_key,
            )
        )

    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive("envelope private", self._master(0)))

    def _master(self, epoch: int | None) -> bytes:
        if not self.can_read:
            raise CannotRead("this host's key can write to the repository but not read it")
        number = self.epoch if epoch is None else epoch
        if not 0 <= number <= self.epoch:
            raise DamagedKey(f"no key of epoch {number} in this repository")
        return self._opened.masters[number]


def create(
    store: BlobStore,
    secrets: Sequence[Secret],
    *,
    clock: Clock | None = None,
    cost: PassphraseCost | None = None,
) -> MasterKeys:
    """Make the keys of a new repository and store them once for each secret.

    Raises:
        InvalidArgument: no secret was given, or an empty one.
        Conflict: the store has keys already.
    """
    if not secrets:
        raise InvalidArgument("a repository needs at least one secret")
    if next(iter(store.list(PREFIX)), None) is not None:
        raise Conflict(f"{store.url} already holds a repository's keys")
    keys = MasterKeys(_Opened(os.urandom(16), (os.urandom(KEY_BYTES),)))
    for secret in secrets:
        add(store, keys, secret, clock=clock, cost=cost)
    return keys


def unlock(store: BlobStore, secret: Secret) -> MasterKeys:
    """Open the repository with one of its secrets.

    Raises:
        NoKeys: there is no key at all.
        WrongKey: the secret opens none of them.
        DamagedKey: it may be right, but key objects of its kind are damaged.
    """
    damaged = ""
    seen = False
    for info in store.list(PREFIX):
        seen = True
        try:
            sealed = _load(store, info)
        except BlobNotFound:
            continue
        except DamagedKey as bad:
            damaged = bad.message
            continue
        if sealed.kind != secret.kind:
            continue
        opened = _open(sealed, secret)
        if opened is not None:
            return MasterKeys(opened)
    if not seen:
        raise NoKeys(
            f"{store.url} holds no repository keys",
            hint="check the URL, or make a repository with laz repo init",
        )
    if damaged:
        raise DamagedKey(damaged, hint="try another secret: any one opens the repository")
    raise WrongKey(
        f"the {KIND_NAMES[secret.kind]} opens no key of {store.url}",
        hint="try another secret; laz repo key list shows which kinds there are",
    )


def add(
    store: BlobStore,
    keys: MasterKeys,
    secret: Secret,
    *,
    label: str = "",
    clock: Clock | None = None,
    cost: PassphraseCost | None = None,
) -> KeyInfo:
    """Let one more secret open the repository (as far as ``keys`` does).

    Raises:
        InvalidArgument: the secret is empty.
    """
    spent = (cost or PassphraseCost()) if isinstance(secret, Passphrase) else None
    salt = os.urandom(16)
    try:
        wrap = wrap_key(secret, salt, spent)
    except UnsupportedAlgorithm:  # an OpenSSL older than 3.2 has no Argon2
        spent = PassphraseCost("scrypt", passes=1, lanes=1)
        wrap = wrap_key(secret, salt, spent)
    nonce = os.urandom(12)
    box = AESGCM(wrap).encrypt(nonce, msgspec.msgpack.encode(keys._opened), b"lazarette key 1")
    sealed = _Sealed(
        version=1,
        kind=secret.kind,
        label=label,
        created_ns=(clock or SystemClock()).now_ns(),
        salt=salt,
        nonce=nonce,
        box=box,
        cost=spent,
        writer=not keys.can_read,
    )
    data = msgspec.msgpack.encode(sealed)
    identity = _identity(data)
    store.put(PREFIX + identity, data)
    return _info(identity, sealed)


def remove(store: BlobStore, identity: str) -> None:
    """Take a secret's access away.

    Who has read the masters with it before keeps them: :func:`rotate` too if it leaked.

    Args:
        store: the repository's store.
        identity: the key's id, or an unambiguous beginning of it.

    Raises:
        NotFound: no such key.
        LastKey: no other key would open the repository for reading.
    """
    known = listing(store)
    matching = [info for info in known if info.id.startswith(identity)]
    if len(matching) != 1 or not identity:
        raise NotFound(f"{len(matching)} keys begin with {identity or 'nothing'}")
    if not any(not info.writer and info.id != matching[0].id for info in known):
        raise LastKey(
            f"key {matching[0].id} is the last one that opens {store.url}",
            hint="add another first: laz repo key add",
        )
    store.delete(PREFIX + matching[0].id)


def listing(store: BlobStore) -> list[KeyInfo]:
    """Every whole key object, the oldest first."""
    found = []
    for entry in store.list(PREFIX):
        try:
            found.append(_info(entry.name[len(PREFIX) :], _load(store, entry)))
        except (BlobNotFound, DamagedKey):
            continue
    return sorted(found, key=lambda info: (info.created_ns, info.id))


def rotate(
    store: BlobStore,
    keys: MasterKeys,
    secrets: Sequence[Secret],
    *,
    clock: Clock | None = None,
    cost: PassphraseCost | None = None,
) -> MasterKeys:
    """Begin a new epoch; only ``secrets`` open the repository afterwards.

    The new key objects are all stored before an old one is deleted: stopped half way, the
    repository opens with old and new ones.

    Raises:
        InvalidArgument: no secret was given.
        CannotRead: ``keys`` are a writer's.
    """
    if not secrets:
        raise InvalidArgument("a repository needs at least one secret")
    masters = tuple(keys._master(epoch) for epoch in range(keys.epoch + 1))
    fresh = MasterKeys(_Opened(keys.repository_id, (*masters, os.urandom(KEY_BYTES))))
    before = [entry.name for entry in store.list(PREFIX)]
    for secret in secrets:
        add(store, fresh, secret, clock=clock, cost=cost)
    for name in before:
        store.delete(name)
    return fresh


def _identity(data: bytes) -> str:
    return blake3(data).hexdigest(16)


def _info(identity: str, sealed: _Sealed) -> KeyInfo:
    return KeyInfo(identity, sealed.kind, sealed.label, sealed.created_ns, sealed.writer)


def _load(store: BlobStore, info: BlobInfo) -> _Sealed:
    name = info.name
    if info.size > _LARGEST_OBJECT:
        raise DamagedKey(f"key object {name} is far too large")
    data = store.get(name)
    if _identity(data) != name[len(PREFIX) :]:
        raise DamagedKey(f"key object {name} is damaged: its hash differs from its name")
    try:
        sealed = msgspec.msgpack.decode(data, type=_Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as bad:
        raise DamagedKey(f"key object {name} cannot be read: {bad}") from bad
    if sealed.version != 1:
        raise DamagedKey(
            f"key object {name} has version {sealed.version}, this program knows 1",
            hint="upgrade lazarette",
        )
    return sealed


def _open(sealed: _Sealed, secret: Secret) -> _Opened | None:
    """What is in the box, None when the secret does not fit."""
    try:
        wrap = wrap_key(secret, sealed.salt, sealed.cost)
        plain = AESGCM(wrap).decrypt(sealed.nonce, sealed.box, b"lazarette key 1")
        opened = msgspec.msgpack.decode(plain, type=_Opened)
    except InvalidTag:
        return None
    except UnsupportedAlgorithm as old:
        raise Unsupported(
            "this host's cryptography library cannot derive the passphrase's key",
            hint="install cryptography with OpenSSL 3.2 or later",
        ) from old
    except (ValueError, RecursionError, msgspec.MsgspecError) as bad:
        raise DamagedKey(f"a key object cannot be read: {bad}") from bad
    return opened
