"""Several requests to a far store at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lazarette.backup.stores.contract import BlobStore

_Got = TypeVar("_Got")


def ahead(store: BlobStore, call: Callable[[], _Got]) -> Callable[[], _Got]:
    """Begin a call whose result is needed later.

    On a store whose answers take their time the call runs in a thread of its own from now on;
    on a near one it runs when it is asked for, since a thread costs more than the call.

    Returns:
        What waits for the result, or for the error the call ended with; to be called once.
    """
    if not store.capabilities.distant:
        return call
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    running = pool.submit(call)
    pool.shutdown(wait=False)
    return running.result
