"""Which part of a snapshot is restored."""

from __future__ import annotations

import msgspec


class Selection(msgspec.Struct, frozen=True):
    """Which paths are restored: all, or those given with what is beneath and above them."""

    paths: tuple[bytes, ...] = ()

    def whole(self, path: bytes) -> bool:
        """Whether all at and beneath ``path`` is wanted."""
        return not self.paths or any(
            path == one or path.startswith(one + b"/") for one in self.paths
        )

    def wanted(self, path: bytes) -> bool:
        """Whether ``path`` is wanted itself or leads to something that is."""
        return self.whole(path) or any(one.startswith(path + b"/") for one in self.paths)
