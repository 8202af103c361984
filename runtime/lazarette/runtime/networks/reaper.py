"""Links of sandboxes that ended, and whether they are gone.

A namespace without processes takes its interfaces, and their peers on the host, with it;
the kernel does that for many at once, in a worker.  Removing a link by hand costs a grace
period of tens of milliseconds under the lock all links share, so it is done only for what
a namespace that somebody holds open keeps alive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.5


class LinkReaper:
    """Removes links that ought to be gone, in the namespace it is made in."""

    def __init__(self) -> None:
        self._netlink = nl.Netlink()
        self._wake = threading.Condition()
        self._doomed: list[str] = []
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="link-reaper", daemon=True)
        self._thread.start()

    def expect_gone(self, names: Sequence[str]) -> None:
        """These links should vanish by themselves; see that they do."""
        if names:
            with self._wake:
                self._doomed += names
                self._wake.notify_all()

    def settle(self) -> None:
        """Wait until none of them is left."""
        with self._wake:
            self._wake.wait_for(lambda: not self._doomed and not self._busy)

    def close(self) -> None:
        """End; what is left is swept at the next start."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()
        self._netlink.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._doomed or self._closed)
                self._wake.wait_for(lambda: self._closed, PATIENCE_SECONDS)
                names, self._doomed = self._doomed, []
                self._busy = True
            for name in names:
                try:
                    self._netlink.run([rt.link_delete(name)])
                except nl.NetlinkError as error:
                    log.warning("a link of a container that ended is still there: %s", error)
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                if self._closed and not self._doomed:
                    return
