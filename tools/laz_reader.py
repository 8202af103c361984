#!/usr/bin/env python3
"""A small independent reader of Lazarette repositories, written from docs/repository-format.md.

It shares no code with the engine: when this file and that document are all that is left, the
data can still be had.  It reads a repository in a folder; it needs a key file or a
passphrase, and the packages blake3, cryptography and zstandard.

    laz_reader.py FOLDER [--key-file FILE] list
    laz_reader.py FOLDER [--key-file FILE] restore SNAPSHOT TARGET

Without a key file the passphrase is taken from LAZ_PASSPHRASE.
"""

from __future__ import annotations

import argparse
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

CONTEXT = "lazarette 2026 repository v1 "
FILE, DIRECTORY, SYMLINK, FIFO, SOCKET, CHARACTER, BLOCK = range(1, 8)


def msgpack(data: bytes) -> Any:
    """One msgpack value (the kinds the format uses)."""
    value, end = _value(data, 0)
    if end != len(data):
        raise ValueError("bytes after a msgpack value")
    return value


def _value(data: bytes, at: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind <= 0x7F:
        return kind, at
    if kind >= 0xE0:
        return kind - 256, at
    if kind <= 0x8F:
        return _map(data, at, kind & 15)
    if kind <= 0x9F:
        return _array(data, at, kind & 15)
    if kind <= 0xBF:
        return _bytes(data, at, kind & 31, True)
    if kind in (0xC0, 0xC2, 0xC3):
        return (None, at) if kind == 0xC0 else (kind == 0xC3, at)
    if kind in (0xCA, 0xCB):
        size = 4 if kind == 0xCA else 8
        return struct.unpack(">f" if size == 4 else ">d", data[at : at + size])[0], at + size
    if 0xCC <= kind <= 0xD3:
        size = 1 << (kind & 3)
        signed = kind >= 0xD0
        return int.from_bytes(data[at : at + size], "big", signed=signed), at + size
    lengths = {
        0xC4: (1, "b"), 0xC5: (2, "b"), 0xC6: (4, "b"), 0xD9: (1, "s"), 0xDA: (2, "s"),
        0xDB: (4, "s"), 0xDC: (2, "a"), 0xDD: (4, "a"), 0xDE: (2, "m"), 0xDF: (4, "m"),
    }  # fmt: skip
    if kind not in lengths:
        raise ValueError(f"msgpack kind {kind:#x} is not used by the format")
    size, what = lengths[kind]
    count = int.from_bytes(data[at : at + size], "big")
    at += size
    if what in "bs":
        return _bytes(data, at, count, what == "s")
    return _array(data, at, count) if what == "a" else _map(data, at, count)


def _bytes(data: bytes, at: int, length: int, text: bool) -> tuple[Any, int]:
    piece = data[at : at + length]
    return (piece.decode() if text else piece), at + length


def _array(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        value, at = _value(data, at)
        found.append(value)
    return found, at


def _map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    found = {}
    for _ in range(count):
        key, at = _value(data, at)
        found[key], at = _value(data, at)
    return found, at


def derive(purpose: str, material: bytes) -> bytes:
    """BLAKE3's key derivation."""
    return blake3(material, derive_key_context=CONTEXT + purpose).digest()


class Reader:
    """One repository.

    Args:
        folder: where it is.
        key_file: a key file; None takes the passphrase from the environment.
    """

    def __init__(self, folder: Path, key_file: Path | None) -> None:
        self.folder = folder
        self._masters = self._unlock(key_file)
        first = self._masters[0]
        self.chunk_id_key = derive("chunk ids", first)
        self.index_key = derive("index", first)
        self._private = X25519PrivateKey.from_private_bytes(derive("envelope private", first))
        self._blocks: dict[tuple[bytes, int], bytes] = {}
        self.config = msgpack(self.unseal("config"))
        if self.config["version"] not in (1, 2):
            raise SystemExit(f"format version {self.config['version']} is not known here")
        self._chunks: dict[bytes, tuple[bytes, bytes, int, int, int, int, int, int]] = {}
        for path in sorted((folder / "index").iterdir()):
            for record in msgpack(self.unseal(f"index/{path.name}")):
                self._take(record)

    def _unlock(self, key_file: Path | None) -> list[bytes]:
        for path in sorted((self.folder / "keys").iterdir()):
            found = msgpack(path.read_bytes())
            wrap = self._wrap_key(found, key_file)
            if wrap is None:
                continue
            try:
                box = AESGCM(wrap).decrypt(found["nonce"], found["box"], b"lazarette key 1")
            except InvalidTag:
                continue
            masters: list[bytes] = msgpack(box)["masters"]
            if masters:
                return masters
        raise SystemExit("the secret opens none of the keys")

    @staticmethod
    def _wrap_key(found: dict[str, Any], key_file: Path | None) -> bytes | None:
        if key_file is not None:
            if found["kind"] != "file":
                return None
            secret = bytes.fromhex(key_file.read_text().split()[1])
            return derive("box file", found["salt"] + secret)
        if found["kind"] != "passphrase":
            return None
        text = os.environ["LAZ_PASSPHRASE"].encode()
        cost = found["cost"]
        if cost["name"] == "argon2id":
            memory = max(cost["memory_kib"], 8 * cost["lanes"])
            argon = Argon2id(
                salt=found["salt"],
                length=32,
                iterations=cost["passes"],
                lanes=cost["lanes"],
                memory_cost=memory,
            )
            return argon.derive(text)
        n = 1 << max(cost["memory_kib"].bit_length() - 1, 1)
        return Scrypt(salt=found["salt"], length=32, n=n, r=8, p=cost["passes"]).derive(text)

    def _object_key(self, field: bytes, purpose: str) -> bytes:
        if len(field) == 80:
            sender, box = field[:32], field[32:]
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(sender))
            public = self._private.public_key().public_bytes_raw()
            wrap = derive("envelope", shared + sender + public)
            return AESGCM(wrap).decrypt(bytes(12), box, None)
        return derive(purpose, self._masters[int.from_bytes(field, "little")])

    @staticmethod
    def _subkey(key: bytes, purpose: bytes, salt: bytes) -> AESGCM:
        return AESGCM(blake3(b"lazarette/" + purpose + b"\0" + salt, key=key).digest())

    def unseal(self, name: str) -> bytes:
        """Plain content of a sealed object."""
        data = (self.folder / name).read_bytes()
        if data[:8] != b"LAZSEAL\x01":
            raise SystemExit(f"{name} is no sealed object of version 1")
        salt, length = data[8:24], data[24]
        head = data[: 25 + length]
        key = self._object_key(head[25:], "metadata") if length else self.index_key
        body = data[len(head) : -8]
        packed = self._subkey(key, b"sealed", salt).decrypt(bytes(12), body, head + name.encode())
        return zstandard.ZstdDecompressor().decompress(packed)

    def _take(self, record: list[Any]) -> None:
        pack, kind, field, _, blocks, chunks, _, _ = record
        rows = struct.iter_unpack("<16sI", chunks)
        for offset, stored, plain, count in struct.iter_unpack("<IIII", blocks):
            start = 0
            for _ in range(count):
                chunk, length = next(rows)
                size = length & 0x3FFFFFFF
                place = (pack, field, kind, offset, stored, plain, start, length)
                if chunk not in self._chunks or self._chunks[chunk][7] & 0x80000000:
                    self._chunks[chunk] = place
                start += size

    def _payload(self, chunk: bytes) -> tuple[bytes, bool]:
        """What is stored of a chunk, and whether that is a patch."""
        pack, field, kind, offset, stored, plain, start, length = self._chunks[chunk]
        block = self._blocks.get((pack, offset))
        if block is None:
            name = pack.hex()
            with open(self.folder / "packs" / name[:2] / name, "rb") as file:
                file.seek(offset)
                sealed = file.read(stored)
            key = self._object_key(field, "metadata" if kind == 1 else "chunk data")
            cipher = self._subkey(key, b"pack", pack)
            block = cipher.decrypt(offset.to_bytes(12, "little"), sealed, None)
            if len(block) != plain:
                block = zstandard.ZstdDecompressor().decompress(block)
            if len(self._blocks) > 64:
                self._blocks.clear()
            self._blocks[(pack, offset)] = block
        return block[start : start + (length & 0x3FFFFFFF)], bool(length >> 31)

    def chunk(self, chunk: bytes) -> bytes:
        """Bytes of a chunk, checked against its id."""
        data, patch = self._payload(chunk)
        if patch:
            data = self._assemble(data)
        paged = bool(self._chunks[chunk][7] & 0x40000000)
        if (self._paged_id(data) if paged else self._hash(data, self.chunk_id_key)) != chunk:
            raise SystemExit(f"chunk {chunk.hex()} is damaged")
        return data

    @staticmethod
    def _hash(data: bytes, key: bytes) -> bytes:
        return blake3(data, key=key).digest(16)

    def _paged_id(self, data: bytes) -> bytes:
        page_key, paged_key = (
            blake3(b"lazarette/" + what, key=self.chunk_id_key).digest()
            for what in (b"page", b"paged")
        )
        pages = (data[at : at + 8192] for at in range(0, len(data), 8192))
        return self._hash(b"".join(self._hash(page, page_key) for page in pages), paged_key)

    def _assemble(self, payload: bytes) -> bytes:
        size, _, sources, pages = struct.unpack_from("<IIHH", payload)
        rows_at = 12 + 16 * sources
        data_at = rows_at + 4 * pages
        held = []
        for at in range(12, rows_at, 16):
            data, patch = self._payload(payload[at : at + 16])
            held.append(self._new_pages(data) if patch else data)
        parts = []
        for source, page in struct.iter_unpack("<HH", payload[rows_at:data_at]):
            data = payload[data_at:] if source == 0xFFFF else held[source]
            parts.append(data[page * size : (page + 1) * size])
        return b"".join(parts)

    @staticmethod
    def _new_pages(payload: bytes) -> bytes:
        _, _, sources, pages = struct.unpack_from("<IIHH", payload)
        return payload[12 + 16 * sources + 4 * pages :]

    def snapshots(self) -> list[dict[str, Any]]:
        """All snapshots, oldest first."""
        names = [f"snapshots/{path.name}" for path in (self.folder / "snapshots").iterdir()]
        return sorted((msgpack(self.unseal(n)) for n in names), key=lambda one: one["time_ns"])

    def listing(self, directory: list[Any]) -> Iterator[list[Any]]:
        """Entries of a directory."""
        pages = directory[9]
        for at in range(0, len(pages), 16):
            yield from msgpack(self.chunk(pages[at : at + 16]))

    def parts(self, content: bytes, depth: int) -> Iterator[tuple[bytes, int]]:
        """Chunk and length of each part of a file; the zero chunk is a hole."""
        if depth == 0:
            yield from struct.iter_unpack("<16sI", content)
            return
        for page, _ in struct.iter_unpack("<16sQ", content):
            yield from self.parts(self.chunk(page), depth - 1)


class Restore:
    """Writes a snapshot into a new folder."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._links: dict[tuple[int, int], bytes] = {}

    def directory(self, entry: list[Any], path: bytes) -> None:
        """A directory with all beneath it; its metadata last."""
        os.makedirs(path, exist_ok=True)
        for child in self._reader.listing(entry):
            name = child[0]
            if name in (b".", b"..") or b"/" in name:
                raise SystemExit(f"impossible name {name!r}")
            below = path + b"/" + name
            if child[1] == DIRECTORY:
                self.directory(child, below)
            else:
                self._inode(child, below)
        self._metadata(entry, path)

    def _inode(self, entry: list[Any], path: bytes) -> None:
        extra = entry[11] or {}
        if extra.get("links", 1) > 1:
            key = (extra.get("filesystem", 0), entry[7])
            first = self._links.setdefault(key, path)
            if first != path:
                os.link(first, path, follow_symlinks=False)
                return
        kind = entry[1]
        if kind == FILE:
            self._file(entry, path)
        elif kind == SYMLINK:
            os.symlink(entry[9], path)
        else:
            formats = {FIFO: stat.S_IFIFO, SOCKET: stat.S_IFSOCK}
            formats |= {CHARACTER: stat.S_IFCHR, BLOCK: stat.S_IFBLK}
            os.mknod(path, formats[kind] | 0o600, extra.get("device", 0))
        self._metadata(entry, path)

    def _file(self, entry: list[Any], path: bytes) -> None:
        with open(path, "xb") as file:
            for chunk, length in self._reader.parts(entry[9], entry[10]):
                if chunk == bytes(16):
                    file.seek(length, os.SEEK_CUR)
                else:
                    file.write(self._reader.chunk(chunk))
            file.truncate(entry[8])

    @staticmethod
    def _metadata(entry: list[Any], path: bytes) -> None:
        extra = entry[11] or {}
        os.chown(path, entry[3], entry[4], follow_symlinks=False)
        if entry[1] != SYMLINK:
            os.chmod(path, entry[2])
        for name, value in extra.get("xattrs", {}).items():
            os.setxattr(path, name, value, follow_symlinks=False)
        mtime = entry[5]
        if extra.get("mtime"):
            mtime = extra["mtime"][0] * 10**9 + extra["mtime"][1]
        os.utime(path, ns=(mtime, mtime), follow_symlinks=False)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key-file", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    restore = commands.add_parser("restore")
    restore.add_argument("snapshot")
    restore.add_argument("target", type=Path)
    options = parser.parse_args()
    reader = Reader(options.folder, options.key_file)
    if options.command == "list":
        for one in reader.snapshots():
            sys.stdout.write(f"{one['id']} {one['time_ns']} {one['host']} {one['volume']}\n")
        return
    (chosen,) = [one for one in reader.snapshots() if one["id"].startswith(options.snapshot)]
    Restore(reader).directory(chosen["root"], os.fsencode(options.target))


if __name__ == "__main__":
    main()
