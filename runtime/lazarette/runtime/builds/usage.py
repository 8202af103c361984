"""What the build cache holds, for ``system df``, and pruning it by age and size."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lazarette.runtime.builds.builder import Builder
from lazarette.runtime.builds.cache import Record
from lazarette.runtime.builds.cachemounts import CacheFolder
from lazarette.runtime.builds.durations import parse_duration
from lazarette.runtime.images.model import time_ns
from lazarette.storage.clock import NANOSECONDS, Clock, rfc3339
from lazarette.storage.errors import InUse, InvalidArgument

FILTERS = (
    "until",
    "unused-for",
    "id",
    "parent",
    "type",
    "description",
    "inuse",
    "shared",
    "private",
)
_KINDS = {"layer": "regular", "metadata": "frontend", "alias": "internal"}
_MOUNT = "exec.cachemount"


@dataclass(frozen=True)
class Entry:
    """One thing of the cache.

    Attributes:
        id: shown to people.
        parent: id of what it was made on; empty for none.
        type: ``regular``, ``frontend``, ``internal`` or ``exec.cachemount``.
        description: what made it.
        shared: an image has its layers too.
        size: bytes; 0 where they belong to an image.
        created_ns: when it was made.
        used_ns: when it was last used.
        uses: how often.
        source: the record or folder itself.
    """

    id: str
    parent: str
    type: str
    description: str
    shared: bool
    size: int
    created_ns: int
    used_ns: int
    uses: int
    source: Record | CacheFolder

    def shown(self) -> dict[str, object]:
        """As ``GET /system/df`` lists it."""
        return {
            "ID": self.id,
            "Parents": [self.parent] if self.parent else None,
            "Type": self.type,
            "Description": self.description,
            "InUse": False,
            "Shared": self.shared,
            "Size": self.size,
            "CreatedAt": rfc3339(self.created_ns),
            "LastUsedAt": rfc3339(self.used_ns) if self.used_ns else None,
            "UsageCount": self.uses,
        }


@dataclass(frozen=True)
class PruneRequest:
    """What may go.

    Attributes:
        all: also what images hold.
        keep_bytes: stop when no more than this stays; 0 for no such limit.
        filters: as the Engine names them.
    """

    all: bool = False
    keep_bytes: int = 0
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """What went: ids and bytes."""

    ids: tuple[str, ...]
    bytes: int


class CacheUsage:
    """The cache of a builder as people see it.

    Args:
        builder: whose cache.
        clock: for ages.
    """

    def __init__(self, builder: Builder, clock: Clock) -> None:
        self._builder = builder
        self._clock = clock

    def entries(self) -> list[Entry]:
        """Everything, the last used first."""
        chains = {chain for image in self._builder.images.all() for chain in image.chain}
        found = [_of_record(record, chains) for record in self._builder.cache.records()]
        found += [_of_folder(folder) for folder in self._builder.mounts.all()]
        return sorted(found, key=lambda entry: -entry.used_ns)

    def shown(self) -> list[dict[str, object]]:
        """Entries for ``system df``; internal ones are left out."""
        return [entry.shown() for entry in self.entries() if entry.type != "internal"]

    def prune(self, request: PruneRequest) -> Pruned:
        """Remove what the request allows, the longest unused first.

        Raises:
            InvalidArgument: a filter that cannot be.
        """
        entries = self.entries()
        keep = _Filter(request.filters, self._clock.now_ns())
        total = sum(entry.size for entry in entries)
        gone: list[Entry] = []
        for entry in reversed(entries):
            if request.keep_bytes and total <= request.keep_bytes:
                break
            if not keep.chooses(entry) or (entry.shared and not request.all):
                continue
            if self._remove(entry):
                gone.append(entry)
                total -= entry.size
        self._builder.images.collect()
        shown = [entry for entry in gone if entry.type != "internal"]
        return Pruned(tuple(entry.id for entry in shown), sum(entry.size for entry in gone))

    def _remove(self, entry: Entry) -> bool:
        if isinstance(entry.source, Record):
            self._builder.cache.remove([entry.source.key])
            return True
        try:
            self._builder.mounts.remove(entry.source)
        except InUse:
            return False
        return True

    def free_bytes(self) -> int:
        """Bytes free where the layers are."""
        return shutil.disk_usage(self._builder.root).free


class _Filter:
    """The filters of a prune, read once."""

    def __init__(self, given: Mapping[str, Sequence[str]], now_ns: int) -> None:
        self._given = dict(given)
        self._before: int | None = None
        ages = [*self._given.get("until", ()), *self._given.get("unused-for", ())]
        if len(ages) > 1:
            raise InvalidArgument("filters expect only one value of until and unused-for")
        if ages:
            self._before = _moment(ages[0], now_ns)

    def chooses(self, entry: Entry) -> bool:
        if self._before is not None and max(entry.used_ns, entry.created_ns) >= self._before:
            return False
        values = {
            "id": entry.id,
            "parent": entry.parent,
            "type": entry.type,
            "description": entry.description,
        }
        for name, value in values.items():
            wanted = self._given.get(name, ())
            if wanted and not any(_matches(name, value, one) for one in wanted):
                return False
        if "inuse" in self._given:
            return False
        if "shared" in self._given and not entry.shared:
            return False
        return not ("private" in self._given and entry.shared)


def _matches(name: str, value: str, wanted: str) -> bool:
    if name == "description":
        return wanted in value or fnmatch.fnmatchcase(value, wanted)
    return value.startswith(wanted) if name in ("id", "parent") else value == wanted


def _moment(text: str, now_ns: int) -> int:
    """A duration ago, a Unix time or an RFC 3339 time, in nanoseconds."""
    try:
        return now_ns - parse_duration(text)
    except ValueError:
        pass
    if text.isdecimal():
        return int(text) * NANOSECONDS
    moment = time_ns(text)
    if not moment:
        raise InvalidArgument(f'invalid value for until: "{text}"')
    return moment


def _of_record(record: Record, chains: Collection[str]) -> Entry:
    shared = record.chain in chains
    return Entry(
        record.short_id,
        record.parent[:25] if not record.parent.startswith(("sha256:", "scratch")) else "",
        _KINDS.get(record.kind, record.kind),
        record.description,
        shared,
        record.size,
        record.created_ns,
        record.used_ns,
        record.uses,
        record,
    )


def _of_folder(folder: CacheFolder) -> Entry:
    return Entry(
        folder.folder.name[:25],
        "",
        _MOUNT,
        f"cache mount {folder.id}",
        False,
        folder.size,
        folder.created_ns,
        folder.used_ns,
        1,
        folder,
    )
