"""A backup reads no faster than it may."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.repositories import local

from lazarette.backup import archive


def test_reading_takes_as_long_as_the_rate_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    content = random.Random(1)
    (source / "large").write_bytes(content.randbytes(3 << 20))
    for number in range(64):
        (source / f"small{number}").write_bytes(content.randbytes(16 << 10))
    asked = []

    def rate() -> int:
        asked.append(1)
        return 2 << 20

    options = archive.ArchiveOptions(read=rate, threads=2)
    with local(tmp_path) as repo:
        began = repo.clock.monotonic_ns()
        report = archive.run(repo, archive.Source(source, "v"), options)
        took_ns = repo.clock.monotonic_ns() - began
    assert report.stats.bytes_read == 4 << 20
    assert took_ns > 0.9e9  # one second's worth is free, the rest is waited for
    assert asked
