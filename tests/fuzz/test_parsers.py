"""A moment of coverage-guided fuzzing; a finding is a crash of the fuzzer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lazarette.storage import process

FUZZER = Path(__file__).with_name("parsers.py")
RUNS = int(os.environ.get("LAZ_TEST_FUZZ_RUNS", "3000"))
SECONDS = max(300, RUNS // 10)


@pytest.mark.timeout(SECONDS)
def test_no_bytes_lead_a_parser_astray(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    process.run([sys.executable, str(FUZZER), "seeds", str(corpus)], timeout=120)
    limits = [f"-runs={RUNS}", "-max_len=20000", "-rss_limit_mb=2048", "-timeout=60"]
    process.run([sys.executable, str(FUZZER), *limits, str(corpus)], timeout=SECONDS)
