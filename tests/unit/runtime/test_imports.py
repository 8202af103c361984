"""What the daemon does not load before somebody uses it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, lazarette.runtime.daemon
print(sorted({"boto3", "botocore"} & set(sys.modules)))
"""


def test_a_daemon_without_s3_does_not_load_its_libraries() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
