"""Sentences of nftables: tables, chains, sets, rules and their expressions.

Encoded by pyroute2's message classes and sent as one transaction, so that a table is
replaced in one step and packets meet either the old one or the new one.
Field names and numbers: ``linux/netfilter/nf_tables.h``.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    nft_chain_msg,
    nft_flags_be32,
    nft_map_be32,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)

from lazarette.runtime.networks.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    encode,
)

SUBSYSTEM = 10
MSG_NEWTABLE, MSG_GETTABLE, MSG_DELTABLE = 0, 1, 2
MSG_NEWCHAIN, MSG_GETCHAIN, MSG_DELCHAIN, MSG_NEWRULE, MSG_GETRULE, MSG_DELRULE = range(3, 9)
MSG_NEWSET, MSG_DELSET = 9, 11
MSG_NEWSETELEM, MSG_GETSETELEM, MSG_DELSETELEM = 12, 13, 14
BATCH_BEGIN, BATCH_END = 0x10, 0x11

INET, IPV4, NETDEV, IPV6 = 1, 2, 5, 10
INGRESS = 0
PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
PRIORITY_RAW, PRIORITY_DNAT, PRIORITY_FILTER, PRIORITY_SNAT = -300, -100, 0, 100

META_PROTOCOL, META_MARK, META_IIFNAME, META_OIFNAME, META_NFPROTO, META_L4PROTO = (
    1,
    3,
    6,
    7,
    15,
    16,
)
CT_STATE, CT_STATUS = 0, 2
CT_ESTABLISHED, CT_RELATED, CT_INVALID = 2, 4, 1
STATUS_DNAT = 1 << 5
LINK, NETWORK, TRANSPORT = 0, 1, 2
ROUTE_LOCAL = 2

REGISTER = 8
"""``NFT_REG32_00``: the first of sixteen registers of four bytes."""

TYPE_IPV4, TYPE_IPV6, TYPE_PROTO, TYPE_SERVICE, TYPE_IFNAME = 7, 8, 12, 13, 41
"""How ``nft list`` prints a value (``datatype.h`` of nftables)."""

DATA_VERDICT = 0xFFFFFF00
_HOST_ORDER = ("NFTNL_UDATA_SET_KEYBYTEORDER", struct.pack("=I", 1))

Expression = dict[str, Any]


class _FibResult(nft_map_be32):  # type: ignore[misc]
    """A number; pyroute2 takes it for bits."""

    ops: ClassVar[dict[int, str]] = {0: "unspec", 1: "oif", 2: "oifname", 3: "type"}


class _FibFlags(nft_flags_be32):  # type: ignore[misc]
    """Bits; pyroute2 takes them for a number."""

    ops = ("saddr", "daddr", "mark", "iif", "oif", "present")


class _Fib(nft_rule_msg.nft_expr.nft_fib):  # type: ignore[misc]
    """The expression with both mended."""

    fib_result = _FibResult
    fib_flags = _FibFlags


class _Expression(nft_rule_msg.nft_expr):  # type: ignore[misc]
    """An expression; see :class:`_Fib`."""

    nft_fib = _Fib


class _RuleMessage(nft_rule_msg):  # type: ignore[misc]
    """A rule; see :class:`_Fib`."""

    nft_expr = _Expression


def _expression(name: str, **attributes: object) -> Expression:
    prefix = {"bitwise": "BITWISE", "immediate": "IMMEDIATE"}.get(name, name.upper())
    given = [(f"NFTA_{prefix}_{key.upper()}", value) for key, value in attributes.items()]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": given})]}


def _value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def meta(key: int, register: int = REGISTER) -> Expression:
    """Load a fact about the packet."""
    return _expression("meta", dreg=register, key=key)


def payload(base: int, offset: int, length: int, register: int = REGISTER) -> Expression:
    """Load bytes of a header."""
    return _expression("payload", dreg=register, base=base, offset=offset, len=length)


def payload_write(base: int, offset: int, length: int, *, checksum: int) -> Expression:
    """Store a register into a header and mend the checksum at that offset of it."""
    return _expression(
        "payload",
        sreg=REGISTER,
        base=base,
        offset=offset,
        len=length,
        csum_type=1,
        csum_offset=checksum,
    )


def connection(key: int, register: int = REGISTER) -> Expression:
    """Load a fact about the connection."""
    return _expression("ct", dreg=register, key=key)


def masked(mask: bytes, register: int = REGISTER) -> Expression:
    """Keep the bits of a mask."""
    return _expression(
        "bitwise",
        sreg=register,
        dreg=register,
        len=len(mask),
        mask=_value(mask),
        xor=_value(bytes(len(mask))),
    )


def compare(data: bytes, *, equal: bool = True, register: int = REGISTER) -> Expression:
    """Go on only if the register is (or is not) that."""
    return _expression("cmp", sreg=register, op=0 if equal else 1, data=_value(data))


def immediate(data: bytes, register: int = REGISTER) -> Expression:
    """Load a constant."""
    return _expression("immediate", dreg=register, data=_value(data))


def lookup(name: str, *, found: bool = True, into: int = 0) -> Expression:
    """Go on only if the set has the register's value (or has it not); maps give one."""
    attributes: dict[str, object] = {"set": name, "sreg": REGISTER}
    if into:
        attributes["dreg"] = into
    if not found:
        attributes["flags"] = ("NFT_LOOKUP_F_INV",)
    return _expression("lookup", **attributes)


def lookup_verdict(name: str) -> Expression:
    """Do what a verdict map says for the register's value; go on if it has none."""
    return _expression("lookup", set=name, sreg=REGISTER, dreg=0)


def untracked() -> Expression:
    """Keep connection tracking, and so translation, away from it."""
    return {"attrs": [("NFTA_EXPR_NAME", "notrack")]}


def destination_type_local() -> list[Expression]:
    """Go on only if the destination is an address of this host."""
    local = _expression("fib", dreg=REGISTER, result=3, flags=("daddr",))
    return [local, compare(struct.pack("=I", ROUTE_LOCAL))]


def verdict(code: int, chain: str = "") -> Expression:
    """End here with that verdict."""
    attributes: list[tuple[str, object]] = [("NFTA_VERDICT_CODE", code)]
    if chain:
        attributes.append(("NFTA_VERDICT_CHAIN", chain))
    data = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": attributes})]}
    return _expression("immediate", dreg=0, data=data)


def jump_data(chain: str) -> dict[str, Any]:
    """The data of a verdict map's element that jumps to a chain."""
    attributes = [("NFTA_VERDICT_CODE", -3), ("NFTA_VERDICT_CHAIN", chain)]
    return {"attrs": [("NFTA_DATA_VERDICT", {"attrs": attributes})]}


def accept() -> Expression:
    """Let it pass this chain."""
    return verdict(1)


def drop() -> Expression:
    """Throw it away."""
    return verdict(0)


def jump(chain: str) -> Expression:
    """Go through another chain, then on."""
    return verdict(-3, chain)


def back() -> Expression:
    """Return to the chain that jumped here."""
    return verdict(-5)


def masquerade() -> Expression:
    """Give it the address of the interface it leaves by."""
    return _expression("masq")


def destination_nat(family: int, address: int, port: int) -> Expression:
    """Send it to the address and port in those registers."""
    return _expression("nat", type=1, family=family, reg_addr_min=address, reg_proto_min=port)


def family_is(family: int) -> list[Expression]:
    """Go on only for that IP version; needed before reading its header."""
    return [meta(META_NFPROTO), compare(bytes([family]))]


def interface(key: int, name: str, *, equal: bool = True) -> list[Expression]:
    """Go on only for (or except for) that interface."""
    return [meta(key), compare(interface_name(name), equal=equal)]


def interface_name(name: str) -> bytes:
    """A name as the kernel compares it: sixteen bytes."""
    return name.encode().ljust(16, b"\0")


def address_in(field: str, network: str, *, inside: bool = True) -> list[Expression]:
    """Go on only if the source (``saddr``) or destination (``daddr``) is in a subnet, or
    only if it is not.
    """
    address, _, prefix = network.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    size = len(packed)
    offset = {4: {"saddr": 12, "daddr": 16}, 16: {"saddr": 8, "daddr": 24}}[size][field]
    bits = int(prefix)
    mask = (((1 << bits) - 1) << (8 * size - bits)).to_bytes(size, "big")
    return [
        *family_is(IPV4 if size == 4 else IPV6),
        payload(NETWORK, offset, size),
        masked(mask),
        compare(packed, equal=inside),
    ]


def state_in(bits: int) -> list[Expression]:
    """Go on only if the connection is in one of those states."""
    return [connection(CT_STATE), masked(struct.pack("=I", bits)), compare(bytes(4), equal=False)]


def status_has(bits: int) -> list[Expression]:
    """Go on only if the connection has one of those status bits."""
    return [connection(CT_STATUS), masked(struct.pack("=I", bits)), compare(bytes(4), equal=False)]


@dataclass(frozen=True)
class Table:
    """A table by name, whose sentences these methods make; nothing is sent."""

    name: str
    family: int = INET

    def _message(
        self,
        what: str,
        type_: int,
        kind: Any,
        flags: int,
        attributes: list[tuple[str, object]],
        ignore: frozenset[int] = frozenset(),
    ) -> Message:
        body = encode(kind, {"nfgen_family": self.family}, attributes)
        return Message(f"{what} in table {self.name}", SUBSYSTEM << 8 | type_, flags, body, ignore)

    def make(self) -> Message:
        """Make the table; one that exists is kept."""
        name: list[tuple[str, object]] = [("NFTA_TABLE_NAME", self.name)]
        return self._message("make", MSG_NEWTABLE, nft_table_msg, NLM_F_CREATE, name)

    def remove(self) -> Message:
        """Remove it with all it has."""
        name: list[tuple[str, object]] = [("NFTA_TABLE_NAME", self.name)]
        return self._message("remove", MSG_DELTABLE, nft_table_msg, 0, name)

    def chain(
        self, name: str, *, kind: str = "", hook: int = 0, priority: int = 0, device: str = ""
    ) -> Message:
        """A chain; with ``kind`` (``nat``, ``filter``) a base chain at a hook, in a table of
        family ``NETDEV`` that of a device.
        """
        attributes: list[tuple[str, object]] = [
            ("NFTA_CHAIN_TABLE", self.name),
            ("NFTA_CHAIN_NAME", name),
        ]
        if kind:
            place: list[tuple[str, object]] = [
                ("NFTA_HOOK_HOOKNUM", hook),
                ("NFTA_HOOK_PRIORITY", priority),
            ]
            if device:
                place.append(("NFTA_HOOK_DEV", device))
            attributes += [
                ("NFTA_CHAIN_HOOK", {"attrs": place}),
                ("NFTA_CHAIN_POLICY", 1),
                ("NFTA_CHAIN_TYPE", kind),
            ]
        return self._message(f"chain {name}", MSG_NEWCHAIN, nft_chain_msg, NLM_F_CREATE, attributes)

    def rule(self, chain: str, *parts: Expression | list[Expression]) -> Message:
        """A rule at the end of a chain: its expressions, singly or in lists."""
        expressions: list[Expression] = []
        for part in parts:
            expressions += part if isinstance(part, list) else [part]
        attributes: list[tuple[str, object]] = [
            ("NFTA_RULE_TABLE", self.name),
            ("NFTA_RULE_CHAIN", chain),
            ("NFTA_RULE_EXPRESSIONS", expressions),
        ]
        flags = NLM_F_CREATE | NLM_F_APPEND
        return self._message(f"rule of {chain}", MSG_NEWRULE, _RuleMessage, flags, attributes)

    def set(self, number: int, name: str, key: Sequence[tuple[int, int]]) -> Message:
        """A set of keys in host byte order: (type, length in bytes) of each field."""
        return self._set(number, name, key, ())

    def map(
        self,
        number: int,
        name: str,
        key: Sequence[tuple[int, int]],
        data: Sequence[tuple[int, int]],
    ) -> Message:
        """A map from keys to data."""
        return self._set(number, name, key, data)

    def verdicts(self, number: int, name: str, key: tuple[int, int]) -> Message:
        """A map from keys in host byte order to verdicts."""
        attributes: list[tuple[str, object]] = [
            ("NFTA_SET_TABLE", self.name),
            ("NFTA_SET_NAME", name),
            ("NFTA_SET_FLAGS", ("NFT_SET_MAP",)),
            ("NFTA_SET_KEY_TYPE", key[0]),
            ("NFTA_SET_KEY_LEN", key[1]),
            ("NFTA_SET_DATA_TYPE", DATA_VERDICT),
            ("NFTA_SET_ID", number),
            ("NFTA_SET_USERDATA", [_HOST_ORDER]),
        ]
        return self._message(f"map {name}", MSG_NEWSET, nft_set_msg, NLM_F_CREATE, attributes)

    def _set(
        self,
        number: int,
        name: str,
        key: Sequence[tuple[int, int]],
        data: Sequence[tuple[int, int]],
    ) -> Message:
        attributes: list[tuple[str, object]] = [
            ("NFTA_SET_TABLE", self.name),
            ("NFTA_SET_NAME", name),
            ("NFTA_SET_FLAGS", ("NFT_SET_MAP",) if data else ()),
            ("NFTA_SET_KEY_TYPE", _concatenated(key)),
            ("NFTA_SET_KEY_LEN", _width(key)),
            ("NFTA_SET_ID", number),
        ]
        if not data:  # for those who print it; the kernel does not care
            attributes.append(("NFTA_SET_USERDATA", [_HOST_ORDER]))
        if data:
            attributes += [
                ("NFTA_SET_DATA_TYPE", _concatenated(data)),
                ("NFTA_SET_DATA_LEN", _width(data)),
            ]
        return self._message(f"set {name}", MSG_NEWSET, nft_set_msg, NLM_F_CREATE, attributes)

    def elements(
        self,
        name: str,
        entries: Sequence[tuple[bytes, bytes | dict[str, Any]]],
        *,
        delete: bool = False,
    ) -> Message:
        """Entries of a set or map: (key, data); empty for a set, bytes, or a verdict."""
        listed = []
        for key, data in entries:
            parts: list[tuple[str, object]] = [("NFTA_SET_ELEM_KEY", _value(key))]
            if data and not delete:
                value = _value(data) if isinstance(data, bytes) else data
                parts.append(("NFTA_SET_ELEM_DATA", value))
            listed.append({"attrs": parts})
        attributes: list[tuple[str, object]] = [
            ("NFTA_SET_ELEM_LIST_TABLE", self.name),
            ("NFTA_SET_ELEM_LIST_SET", name),
            ("NFTA_SET_ELEM_LIST_ELEMENTS", listed),
        ]
        if delete:
            return self._message(
                f"remove elements of {name}",
                MSG_DELSETELEM,
                nft_set_elem_list_msg,
                0,
                attributes,
                frozenset({errno.ENOENT}),
            )
        return self._message(
            f"elements of {name}",
            MSG_NEWSETELEM,
            nft_set_elem_list_msg,
            NLM_F_CREATE | NLM_F_EXCL,
            attributes,
        )


def _width(fields: Sequence[tuple[int, int]]) -> int:
    if len(fields) == 1:
        return fields[0][1]
    return sum((length + 3) & ~3 for _, length in fields)


def _concatenated(fields: Sequence[tuple[int, int]]) -> int:
    kind = 0
    for type_, _ in fields:
        kind = kind << 6 | type_
    return kind


_BATCH = encode(nfgen_msg, {"nfgen_family": 0, "res_id": SUBSYSTEM}, [])
_BEGIN = Message("begin", BATCH_BEGIN, 0, _BATCH)
_COMMIT = Message("commit", BATCH_END, 0, _BATCH)


def commit(netlink: Netlink, messages: Sequence[Message]) -> None:
    """Do all of it or nothing.

    Raises:
        NetlinkError: the kernel refused a part.
    """
    netlink.transaction(_BEGIN, messages, _COMMIT)


def count_rules(netlink: Netlink, table: str, family: int = INET) -> int:
    """How many rules a table has."""
    body = encode(nfgen_msg, {"nfgen_family": family}, [])
    wanted = table.encode() + b"\0"
    request = Message("list rules", SUBSYSTEM << 8 | MSG_GETRULE, 0, body)
    return sum(
        1
        for rule in netlink.dump(request, _RuleName)
        if rule.get_attr("NFTA_RULE_TABLE") == wanted[:-1].decode()
    )


class _RuleName(nfgen_msg):  # type: ignore[misc]
    """A rule, of which only the table is decoded."""

    prefix = "NFTA_RULE_"
    nla_map = (("NFTA_RULE_UNSPEC", "none"), ("NFTA_RULE_TABLE", "asciiz"))
