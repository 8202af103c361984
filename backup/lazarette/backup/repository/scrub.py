"""Verifying stored bytes on a machine that has no key.

Every object carries checksums of its stored bytes (XXH3-64 over sealed objects and over
every block and the rest of a pack; the name of a key object is a hash of it).  They find
rot and truncation, not a forger: that takes the keys, and :mod:`check`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from lazarette.backup.repository.format import (
    CONDEMNED,
    CONFIG,
    ID_SIZE,
    INDEXES,
    LOST,
    OWNERS,
    PACKS,
    SNAPSHOTS,
    WrongRepository,
    verify_sealed,
)
from lazarette.backup.repository.packs import verify_pack
from lazarette.backup.stores.contract import BlobInfo, BlobNotFound, BlobStore
from lazarette.storage.errors import Cancelled, DamagedData

_KEYS = "keys/"


@dataclass
class ScrubReport:
    """What a scrub found.

    Attributes:
        objects: how many were read.
        bytes: their bytes.
        damaged: name of each damaged object and what is wrong.
    """

    objects: int = 0
    bytes: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every object is as it was written."""
        return not self.damaged


def run(
    store: BlobStore, threads: int = 2, cancelled: Callable[[], bool] = lambda: False
) -> ScrubReport:
    """Read every object and verify its checksums; needs no key.

    Raises:
        Cancelled: as asked.
        StoreUnavailable: the store does not answer.
    """
    report = ScrubReport()

    def one(info: BlobInfo) -> tuple[int, str]:
        if cancelled():
            raise Cancelled("scrub was cancelled")
        return _verify(store, info)

    listed = [info for info in store.list() if _checkable(info.name)]
    if not any(info.name == CONFIG for info in listed):
        raise WrongRepository(f"there is no repository at {store.url}")
    with ThreadPoolExecutor(threads, thread_name_prefix="scrub") as pool:
        for info, (size, fault) in zip(listed, pool.map(one, listed), strict=True):
            report.objects += 1
            report.bytes += size
            if fault:
                report.damaged.append((info.name, fault))
    return report


_SEALED = (PACKS, INDEXES, SNAPSHOTS, CONDEMNED, LOST, OWNERS, _KEYS)


def _checkable(name: str) -> bool:
    return name == CONFIG or name.startswith(_SEALED)


def _verify(store: BlobStore, info: BlobInfo) -> tuple[int, str]:
    try:
        data = store.get(info.name)
    except BlobNotFound:
        return 0, ""
    except DamagedData as bad:
        return 0, str(bad)
    try:
        if info.name.startswith(PACKS):
            bad_blocks = verify_pack(info.name, data)
            where = ", ".join(str(offset) for offset, _ in bad_blocks)
            return len(data), f"blocks at {where} fail their checksums" if where else ""
        if info.name.startswith(_KEYS):
            whole = blake3(data).hexdigest(ID_SIZE) == info.name.removeprefix(_KEYS)
            return len(data), "" if whole else "the key object is not what its name says"
        verify_sealed(info.name, data)
    except DamagedData as bad:
        return len(data), str(bad)
    return len(data), ""
