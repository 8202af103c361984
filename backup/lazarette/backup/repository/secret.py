"""What opens a repository: a passphrase, a key file, a recovery kit, and the keys made of them."""

from __future__ import annotations

import os
from typing import Literal

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from lazarette.backup.hidden import Hidden
from lazarette.storage.errors import Conflict, DamagedData, InvalidArgument, NotFound

KEY_BYTES = 32
_KEY_FILE_HEAD = b"lazarette-key-file-1 "
_CONTEXT = "lazarette 2026 repository v1 "


class DamagedKey(DamagedData):
    """A key object is not what was written."""

    number = 215


class Passphrase(Hidden, frozen=True):
    """A secret a person remembers."""

    text: str
    kind: Literal["passphrase"] = "passphrase"


class KeyFile(Hidden, frozen=True):
    """A secret in a file: 32 random bytes."""

    secret: bytes
    kind: Literal["file"] = "file"

    @classmethod
    def generate(cls) -> KeyFile:
        """A new one."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def read(cls, path: str) -> KeyFile:
        """Read what :meth:`write` wrote.

        Raises:
            NotFound: no such file.
            InvalidArgument: the file is not a key file.
        """
        try:
            with open(path, "rb") as file:
                head, _, text = file.read(4096).partition(b" ")
        except FileNotFoundError as gone:
            raise NotFound(f"key file {path} does not exist") from gone
        try:
            secret = bytes.fromhex(text.decode("ascii"))
        except (UnicodeDecodeError, ValueError):
            secret = b""
        if head + b" " != _KEY_FILE_HEAD or len(secret) != KEY_BYTES:
            raise InvalidArgument(f"{path} is not a lazarette key file")
        return cls(secret)

    def write(self, path: str) -> None:
        """Write a new file that only its owner may read; never over an existing one.

        Raises:
            Conflict: the file exists.
        """
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as there:
            raise Conflict(f"key file {path} exists") from there
        with os.fdopen(file, "wb") as out:
            out.write(_KEY_FILE_HEAD + self.secret.hex().encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())


class KitSecret(Hidden, frozen=True):
    """The secret of a recovery kit: 20 random bytes (see :mod:`.kit`)."""

    secret: bytes
    kind: Literal["kit"] = "kit"


Secret = Passphrase | KeyFile | KitSecret


class PassphraseCost(msgspec.Struct, frozen=True):
    """What guessing one passphrase costs.

    Attributes:
        name: ``argon2id`` (RFC 9106) or ``scrypt`` (RFC 7914), where the former is missing.
        memory_kib: memory of one guess, KiB.
        passes: Argon2id's iterations, or scrypt's p.
        lanes: Argon2id's lanes; 1 for scrypt.
    """

    name: Literal["argon2id", "scrypt"] = "argon2id"
    memory_kib: int = 64 << 10
    passes: int = 3
    lanes: int = 4


_MOST_MEMORY_KIB = 2 << 20
_MOST_PASSES = 64


KIND_NAMES = {"passphrase": "passphrase", "file": "key file", "kit": "recovery kit"}


def derive(purpose: str, material: bytes) -> bytes:
    """A key for a purpose, from secret material."""
    return blake3(material, derive_key_context=_CONTEXT + purpose).digest(KEY_BYTES)


def wrap_key(secret: Secret, salt: bytes, cost: PassphraseCost | None) -> bytes:
    """The key that encrypts a box."""
    if not isinstance(secret, Passphrase):
        if len(secret.secret) < 16:
            raise InvalidArgument(f"the {KIND_NAMES[secret.kind]} is too short")
        return derive("box " + secret.kind, salt + secret.secret)
    if not secret.text:
        raise InvalidArgument("the passphrase is empty")
    if cost is None:
        raise DamagedKey("a passphrase's key object says nothing about its derivation")
    if not (
        8 <= cost.memory_kib <= _MOST_MEMORY_KIB
        and 1 <= cost.passes <= _MOST_PASSES
        and 1 <= cost.lanes <= _MOST_PASSES
    ):
        raise DamagedKey("a passphrase's key object asks for an absurd derivation")
    text = secret.text.encode()
    if cost.name == "argon2id":
        memory = max(cost.memory_kib, 8 * cost.lanes)
        argon = Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=cost.passes,
            lanes=cost.lanes,
            memory_cost=memory,
        )
        return argon.derive(text)
    blocks = 1 << max(cost.memory_kib.bit_length() - 1, 1)
    return Scrypt(salt=salt, length=KEY_BYTES, n=blocks, r=8, p=cost.passes).derive(text)
