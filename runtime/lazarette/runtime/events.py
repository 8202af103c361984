"""What happened, told to whoever listens: the Engine's event stream.

Every service publishes here; the API streams it, the policies and restart rules listen.
The last 256 events are kept, so that ``since`` works and a listener can subscribe and
read the past without a gap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from lazarette.storage.clock import Clock

RING = 256


@dataclass(frozen=True, slots=True)
class Event:
    """One record of the stream.

    Attributes:
        type: ``container``, ``image``, ``volume``, ``network``, ``daemon`` or ``backup``.
        action: Docker's verb, e.g. ``die``; exec verbs carry their command.
        id: the object's id or name.
        attributes: labels and details, as Docker gives them.
        time_ns: wall clock.
    """

    type: str
    action: str
    id: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    time_ns: int = 0


class EventBus:
    """Publish and subscribe; may be published to from any thread.

    Args:
        clock: stamps the events.
        loop: the loop its subscribers run in; the running one when None.
    """

    def __init__(self, clock: Clock, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._clock = clock
        self._loop = loop or asyncio.get_running_loop()
        self._ring: deque[Event] = deque(maxlen=RING)
        self._queues: set[asyncio.Queue[Event]] = set()
        self._hooks: list[Callable[[Event], None]] = []

    def publish(
        self, type_: str, action: str, id_: str, attributes: Mapping[str, str] | None = None
    ) -> None:
        """Tell everybody; returns at once."""
        event = Event(type_, action, id_, dict(attributes or {}), self._clock.now_ns())
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside:
            self._deliver(event)
        else:
            with suppress(RuntimeError):  # the loop has ended: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver, event)

    def on_event(self, hook: Callable[[Event], None]) -> None:
        """Call ``hook`` for every event, in the loop."""
        self._hooks.append(hook)

    def _deliver(self, event: Event) -> None:
        self._ring.append(event)
        for queue in self._queues:
            queue.put_nowait(event)
        for hook in self._hooks:
            hook(event)

    @contextmanager
    def subscribe(self) -> Iterator[tuple[tuple[Event, ...], asyncio.Queue[Event]]]:
        """The past events and, without a gap, those to come: ``(past, queue)``."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        past = tuple(self._ring)
        self._queues.add(queue)
        try:
            yield past, queue
        finally:
            self._queues.discard(queue)
