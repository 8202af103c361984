"""Prometheus metrics of protection.

What lasts (ages, last results) is read from the journal at every scrape, so a restart of
the daemon loses nothing; what counts (runs, bytes) counts since the start, as Prometheus
expects of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lazarette.backup.policy.journal import Protection, Run
from lazarette.backup.policy.outcome import Kind, Outcome, Result
from lazarette.storage.clock import NANOSECONDS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PAUSES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Watched:
    """A protected volume and its state."""

    policy: str
    protection: Protection
    skipped: int = 0


class Metrics:
    """All metrics of protection.

    Args:
        watched: gives the state of every protected volume; asked at each scrape.
    """

    def __init__(self, watched: Callable[[], Sequence[Watched]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_States(watched))
        self._runs = Counter(
            "lazarette_runs",
            "Runs by what they did and how they ended.",
            ("volume", "kind", "result"),
            registry=self._registry,
        )
        self._read = Counter(
            "lazarette_read_bytes",
            "Bytes read from volumes.",
            ("volume",),
            registry=self._registry,
        )
        self._sent = Counter(
            "lazarette_sent_bytes",
            "Bytes sent to repositories.",
            ("volume",),
            registry=self._registry,
        )
        self._pause = Histogram(
            "lazarette_pause_seconds",
            "How long writers were held for a backup.",
            ("volume",),
            buckets=_PAUSES,
            registry=self._registry,
        )

    def ended(self, volume: str, kind: Kind, outcome: Outcome) -> None:
        """Count a run."""
        self._runs.labels(volume, kind.value, outcome.result.value).inc()
        self._read.labels(volume).inc(outcome.bytes_read)
        self._sent.labels(volume).inc(outcome.bytes_sent)
        if kind is Kind.BACKUP and outcome.result is not Result.FAILED:
            self._pause.labels(volume).observe(outcome.pause_ns / NANOSECONDS)

    def render(self) -> bytes:
        """Prometheus' text format; see ``CONTENT_TYPE``."""
        return generate_latest(self._registry)


class _States(Collector):
    """Gauges made of the journal at each scrape."""

    def __init__(self, watched: Callable[[], Sequence[Watched]]) -> None:
        self._watched = watched

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Names only: nothing is asked while registering."""
        return _families().values()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See Prometheus' ``Collector``."""
        families = _families()
        for each in self._watched():
            for name, value in _values(each).items():
                families[name].add_metric((each.protection.volume, each.policy), value)
        return families.values()


_GAUGES = {
    "last_success_timestamp_seconds": "When the newest good backup began; 0 for never.",
    "last_backup_ok": "1 when the newest backup did not fail.",
    "overdue": "1 when the newest good backup is older than the policy allows.",
    "rpo_seconds": "Age of the newest good backup.",
    "rpo_target_seconds": "The oldest it may be.",
    "rto_seconds": "The restore time last measured by a drill.",
    "rto_target_seconds": "The longest it may be; 0 for no target.",
    "last_drill_ok": "1 when the newest restore drill succeeded.",
    "last_drill_timestamp_seconds": "When it began; 0 for never.",
    "last_verified_timestamp_seconds": "When stored data were last verified; 0 for never.",
    "skipped_runs": "Runs skipped because the one before still went on.",
}


def _families() -> dict[str, GaugeMetricFamily]:
    return {
        name: GaugeMetricFamily(f"lazarette_{name}", text, labels=("volume", "policy"))
        for name, text in _GAUGES.items()
    }


def _values(watched: Watched) -> dict[str, float]:
    state = watched.protection
    values = {
        "last_success_timestamp_seconds": _began(state.last_good),
        "last_backup_ok": _ok(state.last),
        "overdue": float(state.overdue),
        "rpo_target_seconds": state.rpo_target_ns / NANOSECONDS,
        "rto_target_seconds": state.rto_target_ns / NANOSECONDS,
        "last_drill_timestamp_seconds": _began(state.last_drill),
        "last_verified_timestamp_seconds": _began(state.last_verified),
        "skipped_runs": float(watched.skipped),
    }
    if state.last_drill is not None:
        values["last_drill_ok"] = _ok(state.last_drill)
    if state.rpo_ns is not None:
        values["rpo_seconds"] = state.rpo_ns / NANOSECONDS
    if state.rto_ns is not None:
        values["rto_seconds"] = state.rto_ns / NANOSECONDS
    return values


def _began(run: Run | None) -> float:
    return run.started_ns / NANOSECONDS if run is not None else 0.0


def _ok(run: Run | None) -> float:
    return float(run is not None and run.outcome is not None and run.outcome.good)
