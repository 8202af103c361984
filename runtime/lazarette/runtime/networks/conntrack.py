"""Flows the kernel remembers, forgotten when a UDP port changes hands.

A sender that never pauses keeps its flow alive, and a flow keeps the translation it began
with: without this, datagrams to a port published just now would go on to the host, and
those to a container that ended would go on to its address.
"""

from __future__ import annotations

import errno
import socket

from pyroute2.netlink.nfnetlink.nfctsocket import (
    FILTER_FLAG_CTA_PROTO_DST_PORT,
    FILTER_FLAG_CTA_PROTO_NUM,
    nfct_msg,
)

from lazarette.runtime.networks import netlink as nl

_SUBSYSTEM = 1
_GET, _DELETE = 1, 2


def forget_datagrams(netlink: nl.Netlink, port: int) -> None:
    """Forget all UDP flows that were first sent to a port, of both families.

    Args:
        netlink: a ``NETLINK_NETFILTER`` socket.
        port: the destination as the first sender wrote it.
    """
    number = [("CTA_PROTO_NUM", socket.IPPROTO_UDP), ("CTA_PROTO_DST_PORT", port)]
    wanted = {"attrs": [("CTA_TUPLE_PROTO", {"attrs": number})]}
    flags = FILTER_FLAG_CTA_PROTO_NUM | FILTER_FLAG_CTA_PROTO_DST_PORT
    only = {"attrs": [("CTA_FILTER_ORIG_FLAGS", flags)]}
    for family in (socket.AF_INET, socket.AF_INET6):
        head = {"nfgen_family": family, "version": 0, "res_id": 0}
        body = nl.encode(nfct_msg, head, [("CTA_TUPLE_ORIG", wanted), ("CTA_FILTER", only)])
        listing = nl.Message("list flows", _SUBSYSTEM << 8 | _GET, 0, body)
        doomed = []
        for flow in netlink.dump(listing, nfct_msg):
            first = flow.get_attr("CTA_TUPLE_ORIG")
            sent = first.get_attr("CTA_TUPLE_PROTO")
            if sent.get_attr("CTA_PROTO_NUM") != socket.IPPROTO_UDP:
                continue  # a kernel that does not filter
            if sent.get_attr("CTA_PROTO_DST_PORT") == port:
                exact = {"attrs": [(a, {"attrs": first.get_attr(a)["attrs"]}) for a in _PARTS]}
                doomed.append(nl.encode(nfct_msg, head, [("CTA_TUPLE_ORIG", exact)]))
        gone = frozenset({errno.ENOENT})
        kind = _SUBSYSTEM << 8 | _DELETE
        netlink.run([nl.Message("forget a flow", kind, 0, each, gone) for each in doomed])


_PARTS = ("CTA_TUPLE_IP", "CTA_TUPLE_PROTO")
