"""SIGKILL of the server under load: nothing that was reported done is lost.

``LAZ_KILLS`` sets how often.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.unions import kill_mount, prepare, serving
from tests.support.waiting import until

KILLS = int(os.environ.get("LAZ_KILLS", "4"))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

WRITER = """
import os, sys, itertools, random
root, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
try:
    for number in itertools.count():
        name = f"{root}/d{number % 7}/{seed}-{number}"
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name + ".tmp", "wb") as stream:
            stream.write(b"%d" % number * 500)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(name + ".tmp", name)
        with open(f"{root}/low{rng.randrange(20)}", "ab") as stream:
            stream.write(b"+")
        print("done", number, flush=True)
        if number % 3 == 0:
            os.unlink(name)
            print("gone", number, flush=True)
except OSError:
    pass
"""


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_kills_under_load_lose_nothing(tmp_path: Path) -> None:
    union = prepare(tmp_path, lowers=1)
    for number in range(20):
        (union.lower() / f"low{number}").write_bytes(b"x" * 400_000)
    rng = random.Random(5)
    sizes = dict.fromkeys(range(20), 400000)
    with serving(union):
        for round_number in range(KILLS):
            command = [sys.executable, "-c", WRITER, str(union.root), str(round_number)]
            said = tmp_path / f"said-{round_number}"
            with said.open("w") as stream, subprocess.Popen(command, stdout=stream) as writer:
                until(lambda said=said: "done" in said.read_text(), "nothing is written")  # type: ignore[misc]
                time.sleep(rng.random() * 0.4)
                kill_mount(union.mounted)
                writer.wait(60)
            output = said.read_text()
            union.mounted.ensure()
            done = {int(line.split()[1]) for line in output.splitlines() if line[:4] == "done"}
            gone = {int(line.split()[1]) for line in output.splitlines() if line[:4] == "gone"}
            assert done, "the writer got nowhere: the kill tested nothing"
            for number in done:
                path = union.root / f"d{number % 7}" / f"{round_number}-{number}"
                if number in gone:
                    assert not path.exists()
                elif number + 1 in done:  # the last one may be on its way out
                    assert path.read_bytes() == b"%d" % number * 500
            for number, size in sizes.items():
                now = (union.root / f"low{number}").stat().st_size
                assert now >= size
                sizes[number] = now
                assert set((union.root / f"low{number}").read_bytes()) <= set(b"x+")
            leftovers = [name for name in os.listdir(tmp_path / "work/tmp") if name[0] == "#"]
            assert leftovers == []
