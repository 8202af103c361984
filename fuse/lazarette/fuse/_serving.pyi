import threading
from collections.abc import Callable, Sequence
from typing import Any

from lazarette.fuse.serving import Journal, Readers, Route

def serve(
    device: int,
    buffer: bytearray,
    routes: Sequence[Route | None],
    make: Callable[..., Any],
    lock: threading.Lock,
    journal: Journal,
    readers: Readers,
    /,
) -> tuple[Any, int, int, object]: ...
