"""Where every layer driver keeps its layers: one folder and one small record a layer.

Layout below a driver's folder::

    layers/KEY/layer.json   the record; a folder without one is not there
    layers/KEY/…            what the driver keeps of it
    staging/…  trash/…      half made and half removed; emptied by ``recover``
    mounts/KEY              where it is mounted
    mounts/KEY@MAP          the same with its owners mapped

A layer appears and disappears by one rename of its folder.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.storage import files, mounts, steps, syscalls
from lazarette.storage.errors import (
    Conflict,
    DamagedData,
    InUse,
    InvalidArgument,
    NameTaken,
    NotFound,
)
from lazarette.storage.idmaps import IdMap

_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")


class LayerRecord(msgspec.Struct, frozen=True):
    """What is known of a layer.

    Attributes:
        parent: key of the layer below.
        committed: it never changes again.
        size: unpacked bytes, of an applied layer.
        diff_id: SHA-256 of the tar it was made of.
    """

    parent: str | None = None
    committed: bool = False
    size: int = 0
    diff_id: str = ""


class Shelf:
    """The layers of one driver.

    Args:
        root: the driver's folder.
        destroy: deletes a folder with what the driver put into it.
    """

    def __init__(self, root: Path, destroy: Callable[[Path], None]) -> None:
        self.lock = threading.RLock()
        self._destroy = destroy
        self._layers = root / "layers"
        self._staging = root / "staging"
        self._trash = root / "trash"
        self._mounts = root / "mounts"
        for folder in (self._layers, self._staging, self._trash, self._mounts):
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        self._records: dict[str, LayerRecord] = {}
        self._counts: dict[str, int] = {}
        for key in os.listdir(self._layers):
            self._records[key] = self._read(key)

    def _read(self, key: str) -> LayerRecord:
        path = self._layers / key / "layer.json"
        try:
            return jsontext.decode(path.read_bytes(), type=LayerRecord)
        except msgspec.MsgspecError as bad:
            raise DamagedData(f"record {path} is damaged: {bad}") from bad

    def recover(self) -> None:
        """Delete leftovers; find what is mounted from before."""
        for folder in (self._staging, self._trash):
            for entry in os.listdir(folder):
                self._destroy(folder / entry)
        with self.lock:
            for key in os.listdir(self._mounts):
                if mounts.is_mount_point(self._mounts / key):
                    self._counts.setdefault(key, 1)
                else:
                    os.rmdir(self._mounts / key)

    # ---- records

    def keys(self) -> list[str]:
        """All keys, sorted."""
        with self.lock:
            return sorted(self._records)

    def exists(self, key: str) -> bool:
        """Whether there is such a layer."""
        return key in self._records

    def record(self, key: str) -> LayerRecord:
        """The record of a layer.

        Raises:
            NotFound: there is none.
        """
        try:
            return self._records[key]
        except KeyError:
            raise NotFound(f"no such layer: {key}") from None

    def folder(self, key: str) -> Path:
        """The folder of a layer."""
        return self._layers / key

    def chain(self, key: str | None) -> list[str]:
        """A layer and all below it, topmost first."""
        found: list[str] = []
        while key is not None:
            found.append(key)
            key = self.record(key).parent
        return found

    def admit(self, key: str, parent: str | None, *, committed: bool) -> bool:
        """Whether a layer is to be made: False when it is there already as asked for.

        Raises:
            InvalidArgument: a bad key.
            NotFound: no such parent.
            Conflict: the parent is not committed.
            NameTaken: another layer has the key.
        """
        if not _KEY.fullmatch(key):
            raise InvalidArgument(f"{key!r} is no key of a layer", hint="use [a-z0-9][a-z0-9_.-]*")
        if key in self._records:
            known = self._records[key]
            if known.parent == parent and known.committed == committed:
                return False
            raise NameTaken(f"making the layer {key}: it exists already")
        if parent is not None and not self.record(parent).committed:
            raise Conflict(f"making the layer {key}: its parent {parent} is not committed")
        return True

    # ---- appearing and disappearing

    def stage(self) -> Path:
        """A fresh folder in which to build a layer."""
        staged = self._staging / secrets.token_hex(8)
        staged.mkdir(mode=0o711)
        return staged

    def appear(self, staged: Path, key: str, record: LayerRecord) -> None:
        """Show a built layer under its key."""
        files.write_atomic(staged / "layer.json", msgspec.json.encode(record))
        steps.reached("layer.staged")
        with self.lock:
            syscalls.renameat2(
                syscalls.AT_FDCWD,
                os.fsencode(staged),
                syscalls.AT_FDCWD,
                os.fsencode(self._layers / key),
                syscalls.RENAME_NOREPLACE,
            )
            self._records[key] = record
        files.sync_folder(self._layers)

    def drop(self, staged: Path) -> None:
        """Delete a layer that could not be built."""
        self._destroy(staged)

    def commit(self, key: str) -> bool:
        """Mark an active layer committed; False when it was.

        Raises:
            InUse: it is mounted.
        """
        with self.lock:
            record = self.record(key)
            if record.committed:
                return False
            if self.mounted(key):
                raise InUse(f"committing the layer {key}: it is mounted", hint="unmount it first")
            committed = msgspec.structs.replace(record, committed=True)
            files.write_atomic(self.folder(key) / "layer.json", msgspec.json.encode(committed))
            self._records[key] = committed
            return True

    def commit_as(self, key: str, new_key: str, size: int, diff_id: str) -> None:
        """Mark an active layer committed and give it another key.

        Raises:
            InUse: it is mounted.
            NameTaken: the new key is taken.
        """
        with self.lock:
            record = self.record(key)
            if self.mounted(key):
                raise InUse(f"committing the layer {key}: it is mounted", hint="unmount it first")
            if new_key in self._records:
                raise NameTaken(f"committing the layer {key}: {new_key} exists already")
            committed = LayerRecord(record.parent, True, size, diff_id)
            files.write_atomic(self.folder(key) / "layer.json", msgspec.json.encode(committed))
            os.rename(self.folder(key), self.folder(new_key))
            del self._records[key]
            self._records[new_key] = committed
        files.sync_folder(self._layers)

    def remove(self, key: str) -> None:
        """Delete a layer; nothing happens if it is not there.

        Raises:
            InUse: it is mounted or has children.
        """
        with self.lock:
            if key not in self._records:
                return
            children = [k for k, known in self._records.items() if known.parent == key]
            if children:
                raise InUse(f"removing the layer {key}: {min(children)} is built on it")
            if self.mounted(key):
                raise InUse(f"removing the layer {key}: it is mounted", hint="unmount it first")
            trash = self._trash / secrets.token_hex(8)
            os.rename(self.folder(key), trash)
            del self._records[key]
        steps.reached("layer.trashed")
        self._destroy(trash)

    # ---- mounts

    def mounted(self, key: str) -> bool:
        """Whether a layer is mounted, with its owners mapped or not."""
        return bool(self._ways(key))

    def _ways(self, key: str) -> list[str]:
        """The names it is mounted under."""
        return [name for name in self._counts if name.partition("@")[0] == key]

    def target(self, key: str) -> Path:
        """Where a layer is mounted when it is."""
        return self._mounts / key

    def mount(self, key: str, attach: Callable[[Path], None], idmap: IdMap | None = None) -> Path:
        """Count a mount; the first one attaches.

        Raises:
            InUse: it is active, and mounted with other owners.
        """
        with self.lock:
            name = key if idmap is None else f"{key}@{idmap.label}"
            if not self.record(key).committed and set(self._ways(key)) - {name}:
                raise InUse(f"mounting the layer {key}: it is mounted with other owners")
            target = self._mounts / name
            count = self._counts.get(name, 0)
            if count == 0:
                target.mkdir(exist_ok=True)
                if not mounts.is_mount_point(target):
                    attach(target)
            self._counts[name] = count + 1
            return target

    def unmount(self, key: str, idmap: IdMap | None = None) -> None:
        """Give back a mount; the last one detaches.

        An active layer is mounted in one way at a time and needs no map to be found.
        """
        with self.lock:
            name = key if idmap is None else f"{key}@{idmap.label}"
            if key in self._records and not self._records[key].committed:
                name = next(iter(self._ways(key)), name)
            count = self._counts.get(name, 0)
            if count > 1:
                self._counts[name] = count - 1
                return
            target = self._mounts / name
            if target.exists():
                mounts.detach_beneath(target)
                mounts.unmount(target, detach=True)
                os.rmdir(target)
            self._counts.pop(name, None)
