"""Policies of volumes: which applies, when it is due, and what it keeps.

The rules are :mod:`lazarette.backup.policy`'s; here they meet the volumes and containers
of this daemon.  Policies come from labels, from the command line or API (kept in the
database), and from a file that is read again when it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from lazarette.backup.policy.groups import groups, together
from lazarette.backup.policy.model import Origin, Policy, Volume, applying, parse_file, parse_words
from lazarette.fuse import jsontext
from lazarette.storage.errors import LazaretteError, NotFound
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

_MIGRATIONS = (
    """
    CREATE TABLE policies (
        name TEXT PRIMARY KEY,
        words TEXT NOT NULL
    ) STRICT
    """,
)

Labels = Mapping[str, str]


class PolicyNotFound(NotFound):
    """The volume has no policy of its own."""

    number = 372


class PolicyBook:
    """All policies of a daemon.

    Args:
        state: keeps those that were set.
        volumes: what there is to protect.
        users: name and labels of the containers that use a volume.
        file: the policy file, which need not exist.
        zone: of policies that name none.
    """

    def __init__(
        self,
        state: State,
        volumes: VolumeManager,
        users: Callable[[str], Sequence[tuple[str, Labels]]],
        file: Path,
        zone: str = "UTC",
    ) -> None:
        self._state = state
        self._volumes = volumes
        self._users = users
        self._file = file
        self._zone = zone
        self._file_seen = 0
        self._from_file: list[Policy] = []
        state.migrate("policies", _MIGRATIONS)

    def set(self, name: str, words: Mapping[str, object]) -> Policy:
        """Keep a policy under a name; a volume's own goes by the volume's name.

        Raises:
            WrongPolicy: a word cannot be understood.
        """
        policy = self._parse(name, words)
        with self._state.write() as db:
            db.execute(
                "INSERT INTO policies VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET words = excluded.words",
                (name, msgspec.json.encode(words).decode()),
            )
        return policy

    def remove(self, name: str) -> None:
        """Forget a policy that was set; backups stay.

        Raises:
            PolicyNotFound: none was set under that name.
        """
        with self._state.write() as db:
            gone = db.execute("DELETE FROM policies WHERE name = ?", (name,)).rowcount
        if not gone:
            raise PolicyNotFound(
                f"no policy {name} was set", hint="laz policy show says where one comes from"
            )

    def words(self, name: str) -> str:
        """A policy that was set, as JSON; empty when none was."""
        row = self._state.row("SELECT words FROM policies WHERE name = ?", (name,))
        return "" if row is None else str(row["words"])

    def of(self, volume: str) -> Policy | None:
        """The policy that applies to a volume.

        Raises:
            VolumeNotFound: there is no such volume.
            WrongPolicy: a label cannot be understood.
        """
        policy = applying(self._given(), self._volume(volume), self._zone)
        if policy is None or policy.origin in (Origin.SET, Origin.FILE):
            return policy
        return self.all().get(volume)

    def all(self) -> dict[str, Policy]:
        """Every protected volume with its policy; one that cannot be understood is logged."""
        given, found, known = self._given(), {}, {}
        for volume in self._volumes.list():
            try:
                known[volume.name] = self._volume(volume.name)
                policy = applying(given, known[volume.name], self._zone)
            except LazaretteError as bad:
                log.error("volume %s is not protected: %s", volume.name, bad)
                continue
            if policy is not None:
                found[volume.name] = policy
        return together(found, known)

    def groups(self, volumes: Sequence[str]) -> list[list[str]]:
        """Those of the volumes that are saved at one instant, together; gone ones left out."""
        known = []
        for name in volumes:
            with suppress(NotFound):
                known.append(self._volume(name))
        return groups(known)

    def _volume(self, name: str) -> Volume:
        known = self._volumes.get(name)
        users = self._users(name)
        return Volume(
            name,
            known.labels,
            [labels for _, labels in users],
            [container for container, _ in users],
        )

    def _given(self) -> list[Policy]:
        kept = [
            self._parse(str(row["name"]), jsontext.decode(row["words"], type=dict[str, object]))
            for row in self._state.rows("SELECT name, words FROM policies ORDER BY name")
        ]
        return kept + self._read_file()

    def _parse(self, name: str, words: Mapping[str, object]) -> Policy:
        return parse_words(name, words, Origin.SET, "laz policy set", self._zone)

    def _read_file(self) -> list[Policy]:
        """The file's policies; a broken file leaves those it had before."""
        try:
            changed = self._file.stat().st_mtime_ns
        except FileNotFoundError:
            self._from_file, self._file_seen = [], 0
            return []
        if changed != self._file_seen:
            self._file_seen = changed
            try:
                self._from_file = parse_file(self._file.read_text(), str(self._file), self._zone)
            except (LazaretteError, OSError, UnicodeDecodeError) as bad:
                log.error("%s: %s; the policies before stay in force", self._file, bad)
        return self._from_file
