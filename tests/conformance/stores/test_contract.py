"""The contract's checks on every store and decorator."""

from __future__ import annotations

import pytest

from lazarette.backup.stores import verify
from lazarette.backup.stores.contract import BlobStore
from lazarette.backup.stores.verify import Check, Verdict


@pytest.mark.parametrize("check", verify.checks(), ids=lambda check: f"{check.number}-{check.name}")
def test_contract(store: BlobStore, check: Check) -> None:
    result = verify.run_check(store, check, "verify/")
    assert result.verdict is not Verdict.FAILED, result.detail
    assert list(store.list("verify/")) == []


def test_conditional_writes_are_exact(store: BlobStore) -> None:
    assert verify.probe_conditional(store)
    assert list(store.list("probe/")) == []
