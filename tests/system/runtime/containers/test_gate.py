"""The write gate: freezes who writes a volume, never for long, never for ever (case A11)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.images import busybox_archive

from lazarette.runtime.config import Config
from lazarette.runtime.containers import gate as gates
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.gate import FreezerGate
from lazarette.runtime.containers.model import CreateRequest, HostConfig
from lazarette.runtime.engine import Engine
from lazarette.runtime.images import archive
from lazarette.storage.clock import SystemClock

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /data/n; sleep 0.01; done"


@dataclass
class Writer:
    """A container that counts into its volume."""

    engine: Engine
    container: Container
    file: Path

    def gate(self, limit: float = 2.0) -> FreezerGate:
        return FreezerGate([self.container.id], self.engine.containers, limit)

    async def writes(self) -> bool:
        before = self.file.read_text()
        await asyncio.sleep(0.4)
        return self.file.read_text() != before


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    config = Config(
        data_root=tmp_path / "data",
        exec_root=tmp_path / "exec",
        bridge=f"lzg{secrets.token_hex(4)}",
    )
    engine = Engine(config, SystemClock())
    await engine.start()
    try:
        with open(busybox_archive(), "rb") as packed:  # noqa: ASYNC230
            await asyncio.to_thread(archive.load, engine.images, packed)
        host = HostConfig(network_mode="none", binds=["vol:/data"])
        request = CreateRequest(image="busybox", cmd=["sh", "-c", COUNT], host_config=host)
        container, _ = await engine.containers.create(request)
        await engine.containers.lifecycle.start(container)
        file = engine.volumes.get("vol").mountpoint / "n"
        for _ in range(4000):
            if file.exists():
                break
            await asyncio.sleep(0.02)
        yield Writer(engine, container, file)
        await engine.containers.remove(container, force=True)
    finally:
        await engine.stop(True)


async def test_nobody_writes_while_it_is_closed(writer: Writer) -> None:
    gate = writer.engine.containers.gate_for(["vol"])
    assert await writer.writes()
    gate.close()
    assert not await writer.writes()
    assert list(writer.engine.containers.store.closed_gates().values()) == [[writer.container.id]]
    gate.open()
    assert await writer.writes()
    assert writer.engine.containers.store.closed_gates() == {}
    gate.open()


async def test_the_watchdog_opens_a_forgotten_gate(writer: Writer) -> None:
    gate = writer.gate(limit=0.3)
    gate.close()
    await asyncio.sleep(0.6)
    assert await writer.writes()
    assert gate.expired


async def test_the_next_start_opens_what_was_left_closed(writer: Writer) -> None:
    gate = writer.gate(limit=1000)
    gate.close()
    assert not await writer.writes()
    gates.open_left_closed(writer.engine.containers)
    assert await writer.writes()
    gate.open()


async def test_a_container_paused_by_hand_stays_paused(writer: Writer) -> None:
    await writer.engine.containers.lifecycle.pause(writer.container)
    gate = writer.gate()
    gate.close()
    gate.open()
    assert not await writer.writes()
    await writer.engine.containers.lifecycle.unpause(writer.container)
    assert await writer.writes()
