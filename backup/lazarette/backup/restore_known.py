"""A snapshot that a restore's target is exactly like: what both have is neither fetched nor read.

Where that snapshot cannot be read any more (it was pruned), nothing is known, and the
restore compares.
"""

from __future__ import annotations

from collections.abc import Mapping

from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.tree import Part, TreeReader


class KnownTree:
    """What is in the target already.

    Args:
        tree: the snapshot; None when nothing is known.
    """

    def __init__(self, tree: TreeReader | None) -> None:
        self._tree = tree
        self.root = None if tree is None else tree.root

    def entries(self, directory: Entry | None) -> Mapping[bytes, Entry]:
        """The entries of a directory of it by name; none where it is no directory."""
        if self._tree is None or directory is None or directory.kind != Kind.DIRECTORY:
            return {}
        try:
            return {one.name: one for one in self._tree.listing(directory)}
        except RepositoryDamaged:
            return {}

    def missing(self, parts: list[Part], before: Entry) -> list[Part]:
        """Those parts of a file that its state before does not have at the same place."""
        if self._tree is None or before.kind != Kind.FILE:
            return parts
        try:
            there = set(self._tree.parts(before))
        except RepositoryDamaged:
            return parts
        return [part for part in parts if part not in there]
