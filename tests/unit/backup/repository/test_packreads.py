from __future__ import annotations

from pathlib import Path

import msgspec

from lazarette.backup.repository.format import pack_name
from lazarette.backup.repository.packreads import MOST, PackReads
from lazarette.backup.stores.contract import BlobStore, ShortBlob, StoreCapabilities
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.wrapper import StoreWrapper

PACK = b"p" * 16
BLOCK = 60_000


class Far(StoreWrapper):
    """A store that counts what it is asked for; ``cut`` answers nothing longer than a block."""

    def __init__(self, inner: BlobStore, cut: bool = False) -> None:
        super().__init__(inner)
        self.asked: list[tuple[int, int]] = []
        self._cut = cut

    @property
    def capabilities(self) -> StoreCapabilities:
        return msgspec.structs.replace(self.inner.capabilities, distant=True)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        assert length is not None
        self.asked.append((offset, length))
        if self._cut and length > BLOCK:
            raise ShortBlob("cut")
        return super().get(name, offset, length)


def _pack(tmp_path: Path) -> tuple[LocalStore, bytes]:
    data = bytes(range(256)) * (12_000_000 // 256)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    store.put(pack_name(PACK), data)
    return store, data


def test_blocks_in_a_row_come_with_few_requests(tmp_path: Path) -> None:
    store, data = _pack(tmp_path)
    far = Far(store)
    reads = PackReads(far)
    for at in range(0, len(data) - BLOCK, BLOCK):
        assert reads.get(PACK, at, BLOCK, len(data)) == data[at : at + BLOCK]
    assert len(far.asked) < 10
    assert max(length for _, length in far.asked) <= MOST
    assert all(offset + length <= len(data) for offset, length in far.asked)


def test_blocks_here_and_there_are_read_alone(tmp_path: Path) -> None:
    store, data = _pack(tmp_path)
    far = Far(store)
    reads = PackReads(far)
    places = [9_000_000, 0, 3_000_000, 200_000, 7_000_000]
    for at in places:
        assert reads.get(PACK, at, BLOCK, len(data)) == data[at : at + BLOCK]
    assert far.asked == [(at, BLOCK) for at in places]


def test_a_cut_pack_gives_the_blocks_it_has(tmp_path: Path) -> None:
    store, data = _pack(tmp_path)
    reads = PackReads(Far(store, cut=True))
    for at in range(0, 10 * BLOCK, BLOCK):
        assert reads.get(PACK, at, BLOCK, len(data)) == data[at : at + BLOCK]
