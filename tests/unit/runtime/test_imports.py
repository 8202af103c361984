"""What a program does not load before somebody uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = "boto3 botocore docker numpy requests rich segno sqlite3"
NOT_SMALL = "concurrent.futures ctypes dataclasses hashlib inspect logging typing_extensions"

DAEMON = "import lazarette.runtime.daemon"
JOB = """
from lazarette.backup.jobs import run
from lazarette.backup.jobs.model import BackupJob, Request, StoreAccess
access = StoreAccess({repo!r}, key="00" * 32)
job = BackupJob({source!r}, "v", "h", base="latest")
result = run.execute(Request(job, access), lambda progress: None, lambda: False)
assert result.outcome == "ok", result
"""
COMMAND = """
from lazarette.runtime.cli.main import run
assert run(["backup", "path", {source!r}, "--repo", {repo!r}, "--key-file", {key!r}]) == 0
"""


def _loaded(script: str, unwanted: str) -> list[str]:
    """Which of some modules a script that does its work has loaded."""
    script += f"\nimport sys; print(*sorted(set({unwanted.split()!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_a_daemon_without_s3_does_not_load_its_libraries() -> None:
    assert _loaded(DAEMON, "boto3 botocore") == []


def test_a_backup_that_finds_nothing_new_loads_little(tmp_path: Path) -> None:
    source, repo, key = tmp_path / "source", tmp_path / "repo", tmp_path / "key"
    source.mkdir()
    repo.mkdir()
    (source / "file").write_bytes(bytes(1 << 20))
    key.write_text(f"lazarette-key-file-1 {'00' * 32}\n")
    make = (
        "from lazarette.backup.jobs.access import init_repository\n"
        "from lazarette.backup.jobs.model import StoreAccess\n"
        "from lazarette.storage.clock import SystemClock\n"
        f"init_repository(StoreAccess({str(repo)!r}, key='00' * 32), SystemClock())\n"
    )
    places = {"source": str(source), "repo": str(repo), "key": str(key)}
    assert _loaded(make + JOB.format(**places), HEAVY) == []
    assert _loaded(JOB.format(**places), f"{HEAVY} {NOT_SMALL}") == []
    assert _loaded(COMMAND.format(**places), HEAVY) == []
