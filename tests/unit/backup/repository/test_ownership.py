"""Who owns a history: exactly one of several claimants, and everybody else is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.support import repositories

from lazarette.backup.repository import ownership, scrub
from lazarette.backup.repository.format import OWNERS
from lazarette.backup.repository.ownership import Fenced


def test_a_history_is_anybodys_until_it_is_claimed(tmp_path: Path) -> None:
    with repositories.local(tmp_path) as repo:
        ownership.require(repo, "db", "a")
        assert ownership.claim(repo, "db", "b", "host-b").epoch == 1
        ownership.require(repo, "db", "b")
        ownership.require(repo, "other", "a")
        with pytest.raises(Fenced, match="taken over by host host-b"):
            ownership.require(repo, "db", "a")


def test_claims_count_and_repeat(tmp_path: Path) -> None:
    with repositories.local(tmp_path) as repo:
        first = ownership.claim(repo, "pgdata", "a", "host-a")
        assert ownership.claim(repo, "pgdata", "a", "host-a") == first
        assert ownership.claim(repo, "pgdata", "b", "host-b").epoch == 2
        assert ownership.claim(repo, "pgdata", "a", "host-a").epoch == 3
        [info] = repo.store.list(OWNERS)
        assert "pgdata" not in info.name.removeprefix(OWNERS)
        assert not scrub.run(repo.store).damaged


def test_claims_at_once_have_an_order(tmp_path: Path) -> None:
    hosts = [f"host-{number}" for number in range(4)]
    with repositories.local(tmp_path) as repo:
        together = threading.Barrier(len(hosts))
        epochs: dict[str, int] = {}

        def claim(host: str) -> None:
            together.wait()
            epochs[host] = ownership.claim(repo, "db", host, host).epoch

        threads = [threading.Thread(target=claim, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(epochs.values()) == [1, 2, 3, 4]
        held = ownership.read(repo.store, repo.crypt, "db")
        assert held is not None
        assert epochs[held.owner] == held.epoch == 4
