"""The embedded resolver: a DNS server inside each container's namespace.

It answers at 127.0.0.11 for names of the container's networks and passes everything else
on, unchanged, to the host's resolvers or to those the container was given.  Its sockets
are opened inside the namespace and served by the thread of networks for all containers.

The sockets are not on port 53, which belongs to the container: rules at its loopback
interface exchange the port numbers, without connection tracking and out of the way of all
other traffic.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import dnslib

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import nft
from lazarette.runtime.networks.background import Background
from lazarette.runtime.networks.directory import Directory, reverse_address
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.resolvconf import EMBEDDED
from lazarette.storage.errors import InternalError

log = logging.getLogger(__name__)

PORT = 53
INNER_PORT = 35353
PLAIN_SIZE = 512
"""Bytes of an answer over UDP a client takes if it says nothing (RFC 1035)."""
OUR_SIZE = 1232
"""What we say we take, and the most we send (DNS flag day 2020)."""
UPSTREAM_SECONDS = 2.0
IDLE_SECONDS = 10.0
MOST_FORWARDED = 1024


@dataclass(frozen=True)
class Upstream:
    """Where questions go that are not ours to answer.

    Attributes:
        servers: addresses, tried in turn.
        inside: ask from the container's namespace, not from the host's.
    """

    servers: tuple[str, ...] = ()
    inside: bool = False


@dataclass
class _Client:
    """A container that is served."""

    container: str
    namespace: NetNamespace
    upstream: Callable[[], Upstream]
    udp: asyncio.DatagramTransport | None = None
    tcp: asyncio.Server | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    udp_closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def close(self) -> None:
        if self.udp is not None:
            self.udp.close()
            await self.udp_closed.wait()  # a transport closes its socket some time later
        if self.tcp is not None:
            self.tcp.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.namespace.close()


class Resolver:
    """All containers' resolvers.

    Args:
        background: where it runs.
        directory: the names.
        host: the namespace the host's resolvers are asked from.
    """

    def __init__(self, background: Background, directory: Directory, host: NetNamespace) -> None:
        self._directory = directory
        self._host = host
        self._clients: dict[str, _Client] = {}
        self._forwarded = asyncio.Semaphore(MOST_FORWARDED)
        self._background = background

    def serves(self, container: str) -> bool:
        """Whether that container is served."""
        return container in self._clients

    def start(
        self,
        container: str,
        namespace: NetNamespace,
        upstream: Callable[[], Upstream],
        *,
        again: bool = False,
    ) -> None:
        """Serve a container; one that is served already is left alone.

        Args:
            container: its id.
            namespace: its own, owned by the resolver from now on.
            upstream: asked for each question that is passed on.
            again: it was served before, by a daemon that ended.

        Raises:
            InternalError: its sockets cannot be opened.
        """
        if container in self._clients:
            namespace.close()
            return
        client = _Client(container, namespace, upstream)
        try:
            with namespace.entered():
                udp, tcp = _open(again)
        except BaseException:
            namespace.close()
            raise
        self._clients[container] = client
        self._background.do(self._serve(client, udp, tcp))

    def stop(self, container: str) -> None:
        """Serve it no longer; not served is fine."""
        client = self._clients.pop(container, None)
        if client is not None:
            self._background.do(client.close())

    def close(self) -> None:
        """Stop all."""
        for container in list(self._clients):
            self.stop(container)

    async def _serve(self, client: _Client, udp: socket.socket, tcp: socket.socket) -> None:
        client.udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Datagrams(self, client), sock=udp
        )
        client.tcp = await asyncio.start_server(functools.partial(self._stream, client), sock=tcp)

    async def _stream(
        self, client: _Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is not None:
            client.tasks.add(task)
            task.add_done_callback(client.tasks.discard)
        try:
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    size = struct.unpack("!H", await reader.readexactly(2))[0]
                    question = await reader.readexactly(size)
                answer = self.known(client, question, 65535)
                if answer is None:
                    answer = await self.forward(client, question, stream=True)
                if answer is None:
                    break
                writer.write(struct.pack("!H", len(answer)) + answer)
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def known(self, client: _Client, question: bytes, limit: int) -> bytes | None:
        """The answer if it is ours to give: empty for no answer at all, None to pass on.

        Args:
            client: who asks.
            question: its message.
            limit: bytes the transport carries.
        """
        try:
            asked = dnslib.DNSRecord.parse(question)
        except (dnslib.DNSError, UnicodeError):
            return _refusal(question, dnslib.RCODE.FORMERR)
        if asked.header.qr:
            return b""
        if asked.header.opcode != dnslib.OPCODE.QUERY:
            return _refusal(question, dnslib.RCODE.NOTIMP)
        if len(asked.questions) != 1:
            return _refusal(question, dnslib.RCODE.FORMERR)
        records = self._records(client.container, asked.q)
        if records is None:
            return None
        return _answer(asked, records, limit)

    def _records(self, container: str, question: dnslib.DNSQuestion) -> list[dnslib.RR] | None:
        name = str(question.qname).rstrip(".")
        if question.qtype == dnslib.QTYPE.PTR:
            address = reverse_address(name)
            called = self._directory.reverse(container, address) if address else None
            if called is None:
                return None
            return [dnslib.RR(question.qname, dnslib.QTYPE.PTR, rdata=dnslib.PTR(called), ttl=0)]
        found = self._directory.lookup(container, name)
        if found is None:
            return None
        records = []
        if question.qtype in (dnslib.QTYPE.A, dnslib.QTYPE.ANY):
            records += [
                dnslib.RR(question.qname, dnslib.QTYPE.A, rdata=dnslib.A(address), ttl=0)
                for address in found.ipv4
            ]
        if question.qtype in (dnslib.QTYPE.AAAA, dnslib.QTYPE.ANY):
            records += [
                dnslib.RR(question.qname, dnslib.QTYPE.AAAA, rdata=dnslib.AAAA(address), ttl=0)
                for address in found.ipv6
            ]
        return records

    async def forward(self, client: _Client, question: bytes, *, stream: bool) -> bytes:
        """The answer of the first upstream server that gives one.

        Without any server the name does not exist.  If none answers, the question failed;
        but a name without a dot, which only networks give, does not exist.
        """
        upstream = client.upstream()
        if not upstream.servers:
            return _refusal(question, dnslib.RCODE.NXDOMAIN)
        refusal = b""
        async with self._forwarded:
            for server in upstream.servers:
                try:
                    async with asyncio.timeout(UPSTREAM_SECONDS):
                        ask = self._ask_stream if stream else self._ask_datagram
                        reply = await ask(client, upstream, server, question)
                except (TimeoutError, OSError, asyncio.IncompleteReadError):
                    continue
                if reply[3] & 0xF in (dnslib.RCODE.SERVFAIL, dnslib.RCODE.REFUSED):
                    refusal = reply
                    continue
                return reply
        if refusal:
            return refusal
        if _single_label(question):
            return _refusal(question, dnslib.RCODE.NXDOMAIN)
        return _refusal(question, dnslib.RCODE.SERVFAIL)

    def _socket(self, client: _Client, upstream: Upstream, server: str, kind: int) -> socket.socket:
        namespace = client.namespace if upstream.inside else self._host
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with namespace.entered():
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    async def _ask_datagram(
        self, client: _Client, upstream: Upstream, server: str, question: bytes
    ) -> bytes:
        with self._socket(client, upstream, server, socket.SOCK_DGRAM) as asking:
            asking.connect((server, PORT))  # answers from elsewhere are dropped by the kernel
            await asyncio.get_running_loop().sock_sendall(asking, question)
            while True:
                reply = await asyncio.get_running_loop().sock_recv(asking, 65535)
                if len(reply) >= 12 and reply[:2] == question[:2]:
                    return reply

    async def _ask_stream(
        self, client: _Client, upstream: Upstream, server: str, question: bytes
    ) -> bytes:
        with self._socket(client, upstream, server, socket.SOCK_STREAM) as asking:
            await asyncio.get_running_loop().sock_connect(asking, (server, PORT))
            reader, writer = await asyncio.open_connection(sock=asking.dup())
            try:
                writer.write(struct.pack("!H", len(question)) + question)
                size = struct.unpack("!H", await reader.readexactly(2))[0]
                return await reader.readexactly(size)
            finally:
                writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    """Questions over UDP of one container."""

    def __init__(self, resolver: Resolver, client: _Client) -> None:
        self._resolver = resolver
        self._client = client

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer at once if we can, or pass it on."""
        answer = self._resolver.known(self._client, data, OUR_SIZE)
        if answer is None:
            task = asyncio.ensure_future(self._pass_on(data, addr))
            self._client.tasks.add(task)
            task.add_done_callback(self._client.tasks.discard)
        elif answer:
            self._send(answer, addr)

    async def _pass_on(self, data: bytes, addr: tuple[str, int]) -> None:
        self._send(await self._resolver.forward(self._client, data, stream=False), addr)

    def _send(self, answer: bytes, addr: tuple[str, int]) -> None:
        if self._client.udp is not None and not self._client.udp.is_closing():
            self._client.udp.sendto(answer, addr)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is about to be closed."""
        self._client.udp_closed.set()

    def error_received(self, exc: Exception) -> None:
        """A client that is gone before its answer."""
        log.debug("dns client of %s is gone: %s", self._client.container[:12], exc)


def _answer(asked: dnslib.DNSRecord, records: Sequence[dnslib.RR], limit: int) -> bytes:
    reply = asked.reply(ra=1, aa=0)
    options = [record for record in asked.ar if record.rtype == dnslib.QTYPE.OPT]
    if limit <= OUR_SIZE:
        limit = max(PLAIN_SIZE, min(limit, options[0].rclass)) if options else PLAIN_SIZE
    if options:
        reply.add_ar(dnslib.EDNS0(udp_len=OUR_SIZE))
    for record in records:
        reply.add_answer(record)
    packed = bytes(reply.pack())
    if len(packed) > limit:
        reply.rr.clear()
        reply.header.tc = 1
        packed = bytes(reply.pack())
    return packed


def _refusal(question: bytes, code: int) -> bytes:
    """An answer without records, made from a message that may be nonsense."""
    if len(question) < 12:
        return b""
    flags = struct.unpack_from("!H", question, 2)[0]
    kept = flags & 0x7900  # opcode and recursion desired
    end = _question_end(question)
    count = 1 if end > 12 else 0
    head = question[:2] + struct.pack("!HHHHH", 0x8080 | kept | code, count, 0, 0, 0)
    return head + question[12:end]


def _question_end(message: bytes) -> int:
    """Where the first question ends; 12 if there is no whole one."""
    at = 12
    while at < len(message) and message[at]:
        if message[at] & 0xC0:
            return 12
        at += message[at] + 1
    return at + 5 if at + 5 <= len(message) else 12


def _single_label(message: bytes) -> bool:
    if len(message) < 14:
        return False
    length = message[12]
    return 0 < length < 64 and len(message) > 13 + length and message[13 + length] == 0


def _open(again: bool) -> tuple[socket.socket, socket.socket]:
    """Sockets for UDP and TCP in the calling thread's namespace, and the port exchange."""
    for port in (INNER_PORT, *range(INNER_PORT + 1, INNER_PORT + 16)):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            udp.bind((EMBEDDED, port))
            tcp.bind((EMBEDDED, port))
            tcp.listen(16)
            with nl.Netlink(nl.NETLINK_NETFILTER) as filter_:
                nft.commit(filter_, _port_exchange(port, again))
        except OSError:
            udp.close()
            tcp.close()
            continue
        except BaseException:
            udp.close()
            tcp.close()
            raise
        return udp, tcp
    raise InternalError(f"open the resolver at {EMBEDDED}: no port is free")


@functools.lru_cache(maxsize=4)
def _port_exchange(port: int, again: bool) -> tuple[nl.Message, ...]:
    """A table that makes ``port`` look like 53 at the resolver's address.

    Replacing one costs a grace period of the kernel, so it is done only ``again``.
    """
    table = nft.Table("lazarette-dns", nft.NETDEV)
    outer, inner = struct.pack("!H", PORT), struct.pack("!H", port)
    rules = []
    for protocol, checksum in ((socket.IPPROTO_UDP, 6), (socket.IPPROTO_TCP, 16)):
        for address, field_, old, new in ((16, 2, outer, inner), (12, 0, inner, outer)):
            rules.append(
                table.rule(
                    "exchange",
                    nft.meta(nft.META_PROTOCOL),
                    nft.compare(struct.pack("!H", 0x0800)),
                    nft.payload(nft.NETWORK, address, 4),
                    nft.compare(socket.inet_aton(EMBEDDED)),
                    nft.meta(nft.META_L4PROTO),
                    nft.compare(bytes([protocol])),
                    nft.payload(nft.TRANSPORT, field_, 2),
                    nft.compare(old),
                    nft.immediate(new),
                    nft.payload_write(nft.TRANSPORT, field_, 2, checksum=checksum),
                )
            )
    return (
        *((table.make(), table.remove()) if again else ()),
        table.make(),
        table.chain("exchange", kind="filter", hook=nft.INGRESS, device="lo"),
        *rules,
    )
