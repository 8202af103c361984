#!/usr/bin/env python3
"""Coverage-guided fuzzing of every parser of repository objects.

    parsers.py seeds FOLDER            one input a parser to begin with
    parsers.py [libFuzzer options] [FOLDER]

The suite runs it for a moment (``test_parsers.py``); longer by hand.

A parser may raise RepositoryDamaged, WrongRepository or another DamagedData; anything else is
a finding.  Objects are parsed both as they come (checks of checksums and tags) and after the
input was put where decrypted content would be (checks of structure).
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
import zstandard

with atheris.instrument_imports(include=["lazarette.backup"]):
    import msgspec
    from blake3 import blake3

    from lazarette.backup.repository import (
        entries,
        indexes,
        keys,
        lost,
        marks,
        packs,
        patches,
        snapshots,
    )
    from lazarette.backup.repository.format import (
        CONDEMNED,
        LOST,
        Crypt,
        WrongRepository,
        expand,
        pack_name,
        seal,
        verify_sealed,
    )
    from lazarette.backup.repository.index import Index
    from lazarette.backup.repository.keys import MasterKeys, _Opened
    from lazarette.backup.stores.contract import BlobInfo
    from lazarette.storage.errors import DamagedData, LazaretteError

CRYPT = Crypt(MasterKeys(_Opened(bytes(16), (bytes(32),))))
SEALED = {"index/" + "0" * 32: indexes.parse, "snapshots/" + "0" * 32: snapshots.parse}


class OneObject:
    """As much of a store as a reader of one object asks for."""

    url = "memory"

    def __init__(self, name: str, data: bytes) -> None:
        self._name, self._data = name, data

    def list(self, prefix: str = "") -> list[BlobInfo]:
        """The object, if it is asked for."""
        return [self.stat(self._name)] if self._name.startswith(prefix) else []

    def stat(self, name: str) -> BlobInfo:
        """Its size."""
        return BlobInfo(name, len(self._data), "", 0)

    def get(self, name: str) -> bytes:
        """Its bytes."""
        del name
        return self._data


def _sealed(data: bytes) -> None:
    for name, parse in SEALED.items():
        verify_sealed(name, data) if len(data) % 2 else parse(CRYPT, name, data)


def _index(data: bytes) -> None:
    name = "index/" + "0" * 32
    parsed = indexes.parse(CRYPT, name, seal(CRYPT, name, data, index=True))
    index = Index()
    index.add(parsed)
    for chunk in index.ids():
        assert index.find(chunk) is not None


def _snapshot(data: bytes) -> None:
    name = "snapshots/" + "0" * 32
    snapshots.parse(CRYPT, name, seal(CRYPT, name, data))


def _pack(data: bytes) -> None:
    packs.verify_pack("packs/00/00", data)


def _list(data: bytes) -> None:
    name = pack_name(bytes(16))
    packs.read_list(CRYPT, bytes(16), seal(CRYPT, name, data, index=True), len(data))


def _page(data: bytes) -> None:
    for entry in entries.decode_page(data, "page"):
        entry.page_ids()


def _patch(data: bytes) -> None:
    patch = patches.decode(data)
    patches.assemble(patch, lambda _: bytes(1 << 16))


def _frame(data: bytes) -> None:
    expand(data, 1 << 20, "frame")


def _mark(data: bytes) -> None:
    name = CONDEMNED + "0" * 32
    marks.load(OneObject(name, seal(CRYPT, name, data, index=True)), CRYPT)  # type: ignore[arg-type]


def _lost(data: bytes) -> None:
    name = LOST + "0" * 32
    lost.load(OneObject(name, seal(CRYPT, name, data, index=True)), CRYPT)  # type: ignore[arg-type]


def _key(data: bytes) -> None:
    store = OneObject(keys.PREFIX + blake3(data).hexdigest(16), data)
    keys.listing(store)  # type: ignore[arg-type]
    keys.unlock(store, keys.KeyFile(bytes(32)))  # type: ignore[arg-type]


PARSERS = [_sealed, _index, _snapshot, _pack, _list, _page, _patch, _frame, _mark, _lost, _key]


def one_input(data: bytes) -> None:
    """One run of the fuzzer: the first byte picks the parser."""
    if not data:
        return
    try:
        PARSERS[data[0] % len(PARSERS)](data[1:])
    except (DamagedData, WrongRepository, keys.WrongKey, keys.NoKeys):
        return
    except LazaretteError as other:
        raise AssertionError("a parser blames something else than the object") from other
    except msgspec.MsgspecError as leaked:
        raise AssertionError("a decoder's own error got through") from leaked


def seeds(folder: Path) -> None:
    """Write inputs that each parser takes."""
    builder = packs.PackBuilder(CRYPT, packs.DATA, 1)
    builder.add(b"c" * 16, b"content" * 100)
    builder.add(b"p" * 16, *patches.encode(8192, [(b"c" * 16, 3), (None, 0)], [bytes(8192)]))
    pack, record = builder.finish()
    entry = entries.Entry(b"name", 1, 0o644, 0, 0, 1, 1, 5, 700, b"c" * 16 + b"\xbc\2\0\0")
    payload, _ = patches.encode(8192, [(b"c" * 16, 3), (None, 0)], [bytes(8192)])
    encode = msgspec.msgpack.encode
    state = snapshots.SnapshotRecord("0" * 32, 1, 1, "host", "volume", entry)
    key = keys._Sealed(1, "file", "", 1, bytes(16), bytes(12), bytes(64))
    made = {
        _sealed: seal(CRYPT, "index/" + "0" * 32, encode([record]), index=True),
        _index: encode([record]),
        _snapshot: encode(state),
        _pack: pack,
        _list: encode(msgspec.structs.replace(record, pack=bytes(16))),
        _page: encode([entry]),
        _patch: payload,
        _frame: zstandard.ZstdCompressor().compress(bytes(1000)),
        _mark: encode(marks.Mark([record], ["0" * 32], ["token"], 1)),
        _lost: encode(bytes(32)),
        _key: encode(key),
    }
    for number, parser in enumerate(PARSERS):
        (folder / parser.__name__).write_bytes(bytes([number]) + made[parser])


if __name__ == "__main__":
    if sys.argv[1:2] == ["seeds"]:
        seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
