"""A store opened for reading: nothing of it can be changed by mistake."""

from __future__ import annotations

from lazarette.backup.stores.contract import Buffer, ReadOnlyStore
from lazarette.backup.stores.wrapper import StoreWrapper


class ReadingStore(StoreWrapper):
    """Refuses every change with :class:`ReadOnlyStore`."""

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """Refuse."""
        raise self._refusal("write", name)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """Refuse."""
        raise self._refusal("replace", name)

    def delete(self, name: str) -> None:
        """Refuse."""
        raise self._refusal("delete", name)

    def _refusal(self, operation: str, name: str) -> ReadOnlyStore:
        return ReadOnlyStore(f"cannot {operation} {name} in {self.url}: opened for reading only")
