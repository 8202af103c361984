"""Notices that somebody changed our table, and puts it back.

``nft flush ruleset``, which firewalls run when they are reloaded, takes every table with
it.  The kernel tells of each change and of the port it came from.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import nft

log = logging.getLogger(__name__)

_GROUP = 7
"""``NFNLGRP_NFTABLES``."""
_GONE = frozenset({nft.MSG_DELTABLE, nft.MSG_DELCHAIN, nft.MSG_DELRULE, nft.MSG_DELSET})
_SETTLE_SECONDS = 0.05
_AGAIN_SECONDS = 1.0


class TableWatch:
    """Watches the tables of the namespace it is made in.

    Args:
        ours: whether a netlink port is one of our own.
        restore: called, in a thread, after somebody else removed anything; it looks
            whether it was ours.
    """

    def __init__(self, ours: Callable[[int], bool], restore: Callable[[], None]) -> None:
        self._ours = ours
        self._restore = restore
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            nl.NETLINK_NETFILTER,
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(nl.SOL_NETLINK, 1, _GROUP)  # NETLINK_ADD_MEMBERSHIP

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        with self._socket:
            while True:
                if not await self._suspicious(loop):
                    continue
                await asyncio.sleep(_SETTLE_SECONDS)
                try:
                    await asyncio.to_thread(self._restore)
                except nl.NetlinkError as error:
                    log.warning("the firewall table cannot be restored yet: %s", error)
                    await asyncio.sleep(_AGAIN_SECONDS)

    async def _suspicious(self, loop: asyncio.AbstractEventLoop) -> bool:
        try:
            data = await loop.sock_recv(self._socket, 1 << 17)
        except OSError:  # so many changes that some were dropped: look
            return True
        offset = 0
        while offset + nl.HEADER.size <= len(data):
            length, kind, _, _, port = nl.HEADER.unpack_from(data, offset)
            if kind >> 8 == nft.SUBSYSTEM and kind & 0xFF in _GONE and not self._ours(port):
                return True
            offset += max(nl.HEADER.size, (length + 3) & ~3)
        return False
