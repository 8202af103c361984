"""A folder shown as it is: the union filesystem with one upper layer and nothing below.

For tests of the server and the protocol, and as the simplest example of a filesystem.
"""

from __future__ import annotations

from lazarette.fuse.union import UnionFilesystem, UnionOptions


class LoopbackFilesystem(UnionFilesystem):
    """Shows ``root``; ``work`` is an empty folder on the same filesystem."""

    def __init__(self, root: str, work: str) -> None:
        super().__init__(UnionOptions(upper=root, work=work))
