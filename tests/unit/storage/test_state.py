"""The daemon's database on a disk that is full for a while."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.mounts import tmpfs

from lazarette.storage.errors import NoSpace
from lazarette.storage.state import State

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def test_a_full_disk_is_told_as_such_and_leaves_nothing_open(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", 1 << 20) as place:
        state = State(place / "state.db")
        state.migrate("test", ("CREATE TABLE kept (value BLOB NOT NULL) STRICT",))
        with open(place / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        for size in (100_000, 100_000, 100):
            with pytest.raises(NoSpace), state.write() as db:
                db.execute("INSERT INTO kept VALUES (?)", (bytes(size),))
        (place / "ballast").unlink()
        with state.write() as db:
            db.execute("INSERT INTO kept VALUES (?)", (b"one",))
        state.close()
        again = State(place / "state.db")
        assert [bytes(row["value"]) for row in again.rows("SELECT value FROM kept")] == [b"one"]
        again.close()
