"""A name server with two names, in a namespace of its own, as a host's resolver."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import dnslib
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer
from tests.support.netns import cable, inside

from lazarette.runtime.networks import resolvconf
from lazarette.runtime.networks.namespaces import NetNamespace

if TYPE_CHECKING:
    from tests.support.network_host import NetworkHost


class _Zone(BaseResolver):  # type: ignore[misc]
    def resolve(self, request: dnslib.DNSRecord, handler: DNSHandler) -> dnslib.DNSRecord:
        reply = request.reply()
        if str(request.q.qname) != "example.test.":
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        elif request.q.qtype == dnslib.QTYPE.A:
            reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A("192.0.2.1"), ttl=60))
        return reply


class NameServer:
    """Serves ``example.test``.

    Args:
        host: whose resolver it becomes, by a cable; None: it is just there.
        where: the namespace it is in.
    """

    def __init__(self, host: NetworkHost | None, where: NetNamespace) -> None:
        self._host = host
        self._where = where

    def __enter__(self) -> NameServer:
        if self._host is not None:
            cable(self._host.manager.host, "203.0.113.1", self._where, "203.0.113.2")
            self._kept = resolvconf.HOST_FILE
            file = self._host.folder / "resolv.conf"
            file.write_text("nameserver 203.0.113.2\n")
            resolvconf.HOST_FILE = file
        quiet = DNSLogger(log="-request,-reply,-truncated,-error", prefix=False)
        self._servers = [
            inside(
                self._where,
                lambda tcp=tcp: DNSServer(  # type: ignore[misc]
                    _Zone(), port=53, address="0.0.0.0", tcp=tcp, logger=quiet
                ),
            )
            for tcp in (False, True)
        ]
        for server in self._servers:
            server.start_thread()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.server.shutdown()
            server.server.server_close()
            server.thread.join()
        if self._host is not None:
            resolvconf.HOST_FILE = self._kept
