"""What every decorator of a store begins from: all of the contract, passed on."""

from __future__ import annotations

from collections.abc import Iterator

from lazarette.backup.stores.contract import BlobInfo, BlobStore, Buffer, StoreCapabilities


class StoreWrapper:
    """A store that does what ``inner`` does; decorators override what they change."""

    def __init__(self, inner: BlobStore) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """See :attr:`BlobStore.url`."""
        return self.inner.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """See :attr:`BlobStore.capabilities`."""
        return self.inner.capabilities

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        return self.inner.put(name, data, if_absent=if_absent)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        return self.inner.replace(name, data, tag)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        return self.inner.get(name, offset, length)

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        return self.inner.stat(name)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`."""
        return self.inner.list(prefix)

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        self.inner.delete(name)

    def close(self) -> None:
        """See :meth:`BlobStore.close`."""
        self.inner.close()
