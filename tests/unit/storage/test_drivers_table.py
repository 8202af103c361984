"""``docs/drivers.md`` says what the drivers say."""

from __future__ import annotations

import sys
from pathlib import Path

from lazarette.storage import process

ROOT = Path(__file__).parents[3]


def test_the_table_is_up_to_date() -> None:
    process.run([sys.executable, str(ROOT / "tools" / "drivers_table.py"), "--check"])
