from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lazarette.runtime.containers.container import Container, Places
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.model import ContainerConfig, HostConfig
from lazarette.runtime.containers.record import Definition, State

NOWHERE = Path("/nowhere")


def container(pid: int) -> Container:
    definition = Definition(
        id="c" * 64,
        name="web",
        created_ns=0,
        image_id="",
        image_ref="",
        image_layer=None,
        config=ContainerConfig(),
        host=HostConfig(),
    )
    return Container(definition, State(pid=pid), Places(NOWHERE, NOWHERE, NOWHERE))


@pytest.mark.skipif(os.geteuid() != 0, reason="another process's root is root's to open")
def test_root_of_a_process_that_ended_is_told_as_such() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        root = container(process.pid).open_root()
        assert os.path.samestat(os.fstat(root), os.stat("/"))
        os.close(root)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(WrongState) as ended:  # nobody has waited for it yet
            container(process.pid).open_root()
    assert ended.value.message == f"container {'c' * 64} is not running"
    with pytest.raises(WrongState):
        container(process.pid).open_root()
