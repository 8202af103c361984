"""What a starting daemon does with the containers of the one before it.

Running ones are watched again; ones that ended meanwhile are ended in the books too, with
the exit code their monitor left; restart policies go on; what belongs to no container
(layers, folders, control groups) is removed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lazarette.runtime.containers import cgroups, gate, pidfd, users
from lazarette.runtime.containers.cgroups import Group
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.record import LAYER_PREFIX, Status
from lazarette.storage import beneath
from lazarette.storage.errors import LazaretteError

if TYPE_CHECKING:
    from lazarette.runtime.containers.manager import ContainerManager

log = logging.getLogger(__name__)


def load(manager: ContainerManager) -> list[str]:
    """Take all containers into memory and find out which still run.

    Call before the networks recover; call :func:`resume` after them.

    Returns:
        Ids of those that run.
    """
    for definition, state in manager.store.load():
        container = manager.adopt(definition, state)
        container.root_mounted = True
        container.idmap = users.noted(container)
        _find_run(container)
    return [one.id for one in manager.all() if one.state.running]


def _find_run(container: Container) -> None:
    """Notice a run that began just before the old daemon ended, and one that is over."""
    state = container.state
    pid, monitor = _read_pid(container, "pid"), _read_pid(container, "conmon.pid")
    if not state.running and monitor and _is_monitor(monitor, container.id):
        if pidfd.is_alive(pid) and _has_started(pid):
            state.status = Status.RUNNING
            state.pid, state.pid_start = pid, pidfd.start_time(pid)
            state.monitor_pid = monitor
            state.started_ns = state.started_ns or container.definition.created_ns
        else:
            pidfd.send(pid, 0, 9)
    if state.running and not _is_monitor(state.monitor_pid, container.id):
        state.monitor_pid = 0  # over; its exit file says how


def _read_pid(container: Container, name: str) -> int:
    try:
        return int((container.bundle / name).read_text())
    except (OSError, ValueError):
        return 0


def _is_monitor(pid: int, container_id: str) -> bool:
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return container_id.encode() in file.read()
    except OSError:
        return False


def _has_started(pid: int) -> bool:
    """Whether the first process runs its own program, not the runtime's waiting half."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return not file.read().startswith(("crun", "runc", "3", "exe"))
    except OSError:
        return False


async def resume(manager: ContainerManager) -> None:
    """Watch what runs, end what ended, restart what must, remove what is nobody's."""
    gate.open_left_closed(manager)
    idle: list[Container] = []
    for container in manager.all():
        state = container.state
        if state.status is Status.REMOVING:
            await _finish_removal(manager, container)
        elif state.running:
            if pidfd.is_alive(state.pid, state.pid_start):
                _correct_pause(manager, container)
            if state.monitor_pid:
                manager.lifecycle.watch(container)
                manager.supervisor.resumed(container)
            else:
                await manager.lifecycle.ended(container)
        else:
            await _clean(manager, container)
            idle.append(container)
    await asyncio.to_thread(sweep, manager)
    for container in idle:
        _restart(manager, container)


def _correct_pause(manager: ContainerManager, container: Container) -> None:
    frozen = manager.preparer.group(container).is_frozen()
    container.state.status = Status.PAUSED if frozen else Status.RUNNING


async def _finish_removal(manager: ContainerManager, container: Container) -> None:
    container.state.status = Status.EXITED
    try:
        await manager.remove(container, force=True)
    except LazaretteError as bad:
        log.warning("finishing the removal of %s: %s", container.name, bad)
        container.state.status = Status.DEAD


async def _clean(manager: ContainerManager, container: Container) -> None:
    try:
        await asyncio.to_thread(manager.preparer.release, container)
    except LazaretteError as bad:
        log.warning("cleaning up after %s: %s", container.name, bad)


def _restart(manager: ContainerManager, container: Container) -> None:
    state, policy = container.state, container.definition.host.restart_policy
    if state.running:
        return
    if state.restart_due or state.status is Status.RESTARTING:
        state.status, state.restart_due = Status.RESTARTING, True
        manager.supervisor.follow_up(container)
    elif container.definition.host.auto_remove and state.started_ns:
        manager.supervisor.follow_up(container)
    elif policy.name == "always" and state.started_ns:
        state.restart_due, state.status = True, Status.RESTARTING
        manager.supervisor.follow_up(container)


def sweep(manager: ContainerManager) -> None:
    """Remove layers, folders and control groups that belong to no container."""
    known = {one.id for one in manager.all()}
    layers = manager.layers.keys()
    for key in layers:
        if key.startswith(LAYER_PREFIX) and key.removeprefix(LAYER_PREFIX) not in known:
            try:
                manager.layers.unmount(key)
                manager.layers.remove(key)
            except LazaretteError as bad:
                log.warning("removing the leftover layer %s: %s", key, bad)
    for root in manager.places.roots.iterdir():
        if root.name not in known:
            users.hide_root(root)
    for parent in (manager.places.run, manager.places.data):
        for folder in parent.iterdir():
            if folder.name not in known and folder.is_dir():
                _remove(folder)
    hierarchies = manager.facts.hierarchies
    for name in cgroups.groups_below(hierarchies, manager.cgroup_parent) - known:
        group = Group(hierarchies, f"{manager.cgroup_parent}/{name}")
        group.kill(manager.clock)
        try:
            group.remove(manager.clock)
        except LazaretteError as bad:
            log.warning("removing the leftover control group %s: %s", name, bad)
    for folder in manager.runtime.root.iterdir():
        if folder.name not in known and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Delete a leftover folder; a volume that is mounted in it is only detached."""
    try:
        beneath.remove_path(folder)
    except (OSError, LazaretteError) as bad:
        log.warning("removing the leftover folder %s: %s", folder, bad)
