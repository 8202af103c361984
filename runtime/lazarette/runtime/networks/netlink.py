"""Talking netlink: pyroute2 encodes and decodes, a plain socket carries.

The messages of a call go to the kernel in one ``send``, each is acknowledged by itself;
a container's interface costs two such calls.  pyroute2's own sockets run an event loop
for every request, which is about a millisecond each.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazarette.storage.errors import InternalError

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
NETLINK_NETFILTER = 12
HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence number, port: ``struct nlmsghdr``."""

SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
RECEIVE_BUFFER = 1 << 20
PATIENCE = 30.0
"""Seconds the kernel may take; it answers within the send, but for its locks."""

Attributes = Sequence[tuple[str, object]]


class NetlinkError(InternalError):
    """The kernel refused a request; ``errno`` has its reason."""

    number = 347

    def __init__(self, what: str, code: int, said: str = "") -> None:
        super().__init__(f"{what}: {said or os.strerror(code)}")
        self.errno = code


@dataclass(frozen=True)
class Message:
    """A request, encoded but for its sequence number.

    Attributes:
        what: names the operation and its object, for errors.
        type: of the message.
        flags: besides request and acknowledgement.
        body: what follows the netlink header.
        ignore: error numbers that are as good as success.
    """

    what: str
    type: int
    flags: int
    body: bytes
    ignore: frozenset[int] = field(default=frozenset())


def encode(kind: Any, fields: Mapping[str, object], attributes: Attributes) -> bytes:
    """The body of a message of one of pyroute2's classes."""
    message = kind()
    for key, value in fields.items():
        message[key] = value
    message["attrs"] = list(attributes)
    message["header"]["type"] = 0
    message.encode()
    return bytes(message.data[HEADER.size :])


class Netlink:
    """A socket to one kernel subsystem in the network namespace of its maker.

    Safe to use from several threads; one call is on the wire at a time.
    """

    def __init__(self, family: int = socket.NETLINK_ROUTE) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family
        )
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RECEIVE_BUFFER)
        self._socket.settimeout(PATIENCE)
        self._socket.bind((0, 0))
        self.port: int = self._socket.getsockname()[0]

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, messages: Sequence[Message]) -> None:
        """Have the kernel do all of them, in order.

        Raises:
            NetlinkError: the first refusal; later messages were tried all the same.
        """
        if not messages:
            return
        with self._lock:
            waiting: dict[int, Message] = {}
            data = bytearray()
            for message in messages:
                self._sequence += 1
                waiting[self._sequence] = message
                data += self._header(message, NLM_F_REQUEST | NLM_F_ACK) + message.body
                data += bytes(-len(data) % 4)
            self._socket.send(data)
            self._acknowledge(waiting)

    def transaction(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """Have nfnetlink do all of them or none.

        Raises:
            NetlinkError: the first refusal; nothing was changed.
        """
        with self._lock:
            waiting: dict[int, Message] = {}
            data = bytearray()
            for message in (begin, *messages, end):
                self._sequence += 1
                asked = NLM_F_REQUEST
                if message is not begin and message is not end:
                    waiting[self._sequence] = message
                    asked |= NLM_F_ACK
                data += self._header(message, asked) + message.body
                data += bytes(-len(data) % 4)
            size = max(RECEIVE_BUFFER, 2 * len(data))
            self._socket.setsockopt(socket.SOL_SOCKET, 32, size)  # SO_SNDBUFFORCE
            self._socket.setsockopt(socket.SOL_SOCKET, 33, size)  # SO_RCVBUFFORCE
            self._socket.send(data)
            self._acknowledge(waiting, (self._sequence - len(messages) - 1, begin))

    def dump(self, message: Message, kind: Any) -> Iterator[Any]:
        """The objects a request lists, decoded by one of pyroute2's classes."""
        found: list[bytes] = []
        with self._lock:
            self._sequence += 1
            self._socket.send(self._header(message, NLM_F_REQUEST | NLM_F_DUMP) + message.body)
            done = False
            while not done:
                for type_, sequence, part in self._receive():
                    if sequence != self._sequence:
                        continue
                    if type_ == NLMSG_DONE:
                        done = True
                    elif type_ == NLMSG_ERROR:
                        self._refuse(message, part)
                        done = True
                    else:
                        found.append(part)
        for part in found:
            decoded = kind(part)
            decoded.decode()
            yield decoded

    def get(self, message: Message, kind: Any) -> Any | None:
        """The one object a request names, or None."""
        with self._lock:
            self._sequence += 1
            self._socket.send(self._header(message, NLM_F_REQUEST) + message.body)
            while True:
                for type_, sequence, part in self._receive():
                    if sequence != self._sequence:
                        continue
                    if type_ == NLMSG_ERROR:
                        code = -struct.unpack_from("=i", part, HEADER.size)[0]
                        if code in (errno.ENODEV, errno.ENOENT):
                            return None
                        raise NetlinkError(message.what, code)
                    decoded = kind(part)
                    decoded.decode()
                    return decoded

    def _header(self, message: Message, flags: int) -> bytes:
        length = HEADER.size + len(message.body)
        return HEADER.pack(length, message.type, message.flags | flags, self._sequence, 0)

    def _acknowledge(
        self, waiting: dict[int, Message], whole: tuple[int, Message] | None = None
    ) -> None:
        refusal: NetlinkError | None = None
        while waiting:
            for type_, sequence, part in self._receive():
                if whole is not None and type_ == NLMSG_ERROR and sequence == whole[0]:
                    self._refuse(whole[1], part)  # of the transaction: no other answer comes
                message = waiting.pop(sequence, None) if type_ == NLMSG_ERROR else None
                if message is None:
                    continue
                try:
                    self._refuse(message, part)
                except NetlinkError as error:
                    refusal = refusal or error
        if refusal is not None:
            raise refusal

    @staticmethod
    def _refuse(message: Message, part: bytes) -> None:
        code = -struct.unpack_from("=i", part, HEADER.size)[0]
        if code and code not in message.ignore:
            raise NetlinkError(message.what, code, _extended(part))

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        data = self._socket.recv(RECEIVE_BUFFER)
        offset = 0
        while offset < len(data):
            length, type_, _, sequence, _ = HEADER.unpack_from(data, offset)
            yield type_, sequence, data[offset : offset + length]
            offset += (length + 3) & ~3


def _extended(part: bytes) -> str:
    """The kernel's own words about a refusal (``NLMSGERR_ATTR_MSG``), if it has any."""
    capped = struct.unpack_from("=H", part, 6)[0] & 0x100
    inner = struct.unpack_from("=I", part, HEADER.size + 4)[0]
    offset = HEADER.size + 4 + (HEADER.size if capped else (inner + 3) & ~3)
    while offset + 4 <= len(part):
        length, kind = struct.unpack_from("=HH", part, offset)
        if length < 4:
            break
        if kind == 1:
            return part[offset + 4 : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += (length + 3) & ~3
    return ""
