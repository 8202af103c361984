"""The journal of runs as the API shows it."""

from __future__ import annotations

from lazarette.backup.policy.journal import Run


def encode_history(run: Run) -> dict[str, object]:
    """One run of any kind; what a run going on does not know yet is empty or zero."""
    outcome = run.outcome
    return {
        "id": run.id,
        "policy": run.policy,
        "volume": run.volume,
        "kind": run.kind.value,
        "reason": run.reason,
        "started_ns": run.started_ns,
        "ended_ns": run.ended_ns or 0,
        "outcome": outcome.result.value if outcome else "running",
        "consistency": outcome.consistency.value if outcome else "",
        "snapshot": outcome.snapshot if outcome else "",
        "suspicious": outcome.suspicious if outcome else False,
        "warnings": list(outcome.warnings) if outcome else [],
        "error": outcome.error if outcome else "",
        "pause_ns": outcome.pause_ns if outcome else 0,
        "bytes_read": outcome.bytes_read if outcome else 0,
        "bytes_sent": outcome.bytes_sent if outcome else 0,
        "restore_ns": outcome.restore_ns if outcome else 0,
    }
