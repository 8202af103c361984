#!/usr/bin/env python3
"""Coverage-guided fuzzing of every parser of repository objects; not part of the test suite.

    pip install atheris; fuzz_repository.py [libFuzzer options]

A parser may raise RepositoryDamaged, WrongRepository or another DamagedData; anything else is
a finding.  Objects are parsed both as they come (checks of checksums and tags) and after the
input was put where decrypted content would be (checks of structure).
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lazarette.backup"]):
    import msgspec

    from lazarette.backup.repository import entries, indexes, packs, patches, snapshots
    from lazarette.backup.repository.format import (
        Crypt,
        WrongRepository,
        expand,
        seal,
        verify_sealed,
    )
    from lazarette.backup.repository.index import Index
    from lazarette.backup.repository.keys import MasterKeys, _Opened
    from lazarette.storage.errors import DamagedData

CRYPT = Crypt(MasterKeys(_Opened(bytes(16), (bytes(32),))))
SEALED = {"index/" + "0" * 32: indexes.parse, "snapshots/" + "0" * 32: snapshots.parse}


def _sealed(data: bytes) -> None:
    for name, parse in SEALED.items():
        verify_sealed(name, data) if len(data) % 2 else parse(CRYPT, name, data)


def _inside(data: bytes) -> None:
    name, parse = list(SEALED.items())[len(data) % 2]
    parsed = parse(CRYPT, name, seal(CRYPT, name, data, index=True))
    if isinstance(parsed, list):
        Index().add(parsed)


def _pack(data: bytes) -> None:
    packs.verify_pack("packs/00/00", data)


def _page(data: bytes) -> None:
    for entry in entries.decode_page(data, "page"):
        entry.page_ids()


def _patch(data: bytes) -> None:
    patch = patches.decode(data)
    patches.assemble(patch, lambda _: bytes(1 << 16))


def _frame(data: bytes) -> None:
    expand(data, 1 << 20, "frame")


PARSERS = [_sealed, _inside, _pack, _page, _patch, _frame]


def one_input(data: bytes) -> None:
    """One run of the fuzzer: the first byte picks the parser."""
    if not data:
        return
    try:
        PARSERS[data[0] % len(PARSERS)](data[1:])
    except (DamagedData, WrongRepository):
        return
    except msgspec.MsgspecError as leaked:
        raise AssertionError("a decoder's own error got through") from leaked


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
