"""A client joins a container's streams, before its start or while it runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from lazarette.runtime.containers import monitor as conmon
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.lifecycle import Lifecycle
from lazarette.runtime.containers.record import Status
from lazarette.runtime.containers.streams import Attach, ClientStream, pump


async def join(
    lifecycle: Lifecycle,
    container: Container,
    wanted: Attach,
    replay: Callable[[ClientStream], Awaitable[None]] | None,
    stream: bool,
    hijack: Callable[[], Awaitable[ClientStream]],
) -> None:
    """Attach a client until the run ends or the client goes.

    A container that does not run is waited for: the client sees its next run from the
    first byte.

    Args:
        lifecycle: told of it.
        container: which.
        wanted: the streams.
        replay: writes the log so far to the client.
        stream: stay for what is to come.
        hijack: takes over the client's connection; called once nothing can be lost.

    Raises:
        WrongState: it is paused or restarting.
    """
    status = container.state.status
    if status is Status.PAUSED:
        raise WrongState(
            f"container {container.name} is paused, unpause the container before attach"
        )
    if status is Status.RESTARTING:
        raise WrongState(
            f"container {container.id} is restarting, wait until the container is running"
        )
    waiting: asyncio.Future[socket.socket | None] | None = None
    if stream:
        waiting = asyncio.get_running_loop().create_future()
        if container.state.running:
            try:
                waiting.set_result(conmon.connect(container.bundle))
            except OSError:
                waiting.set_result(None)  # it is just ending
        else:
            container.waiting.append(waiting)
    try:
        client = await hijack()
        lifecycle.emit(container, "attach")
        if replay is not None:
            await replay(client)
        if waiting is None:
            return
        monitor = await waiting
    finally:
        if waiting is not None and waiting in container.waiting:
            container.waiting.remove(waiting)
    if monitor is None:
        return
    if await pump(client, monitor, wanted):
        lifecycle.emit(container, "detach")
