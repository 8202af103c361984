"""Questions to the embedded resolver, from inside containers."""

from __future__ import annotations

import socket
import struct

import dnslib
from tests.support.netns import inside
from tests.support.network_host import Container


def query(
    container: Container, name: str, kind: str = "A", *, tcp: bool = False, edns: int = 0
) -> dnslib.DNSRecord:
    """The answer the container gets from its resolver."""
    question = dnslib.DNSRecord.question(name, kind)
    if edns:
        question.add_ar(dnslib.EDNS0(udp_len=edns))
    type_ = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM

    def work() -> bytes:
        with socket.socket(socket.AF_INET, type_) as asking:
            asking.settimeout(8)
            asking.connect(("127.0.0.11", 53))
            packed = question.pack()
            if not tcp:
                asking.send(packed)
                return asking.recv(65535)
            asking.sendall(struct.pack("!H", len(packed)) + packed)
            with asking.makefile("rb") as stream:
                return stream.read(struct.unpack("!H", stream.read(2))[0])

    answer = dnslib.DNSRecord.parse(inside(container.path, work))
    assert answer.header.id == question.header.id
    return answer


def addresses(container: Container, name: str, kind: str = "A") -> list[str]:
    return [str(record.rdata) for record in query(container, name, kind).rr]
