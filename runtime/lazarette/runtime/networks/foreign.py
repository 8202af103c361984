"""Firewalls of others on this host, and whether they may drop what ours lets pass.

Rules of several tables add up, and a drop anywhere wins; nothing of ours can change that,
so it is told.  What ``iptables-legacy`` holds is no part of nftables and not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyroute2.netlink import nla
from pyroute2.netlink.nfnetlink import nfgen_msg

from lazarette.runtime.networks import nft
from lazarette.runtime.networks.netlink import Message, Netlink, encode

_DROP = 0
_FAMILIES = {nft.INET: "inet", nft.IPV4: "ip", nft.IPV6: "ip6"}
_FIREWALLD = "firewalld"


@dataclass(frozen=True)
class Dropper:
    """A chain of somebody else's that forwarded packets pass and that drops by default.

    Attributes:
        family: ``ip``, ``ip6`` or ``inet``.
        table, chain: its names.
    """

    family: str
    table: str
    chain: str

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}"


def droppers(netlink: Netlink, own: str) -> list[Dropper]:
    """Foreign chains that drop, or reject at their end, what their rules do not accept.

    Args:
        netlink: a netfilter socket of the host.
        own: the table to leave out.

    Raises:
        NetlinkError: the kernel does not list its chains.
    """
    body = encode(nfgen_msg, {"nfgen_family": 0}, [])
    request = Message("list chains", nft.SUBSYSTEM << 8 | nft.MSG_GETCHAIN, 0, body)
    found = []
    for chain in netlink.dump(request, _Chain):
        hook = chain.get_attr("NFTA_CHAIN_HOOK")
        table, family = str(chain.get_attr("NFTA_CHAIN_TABLE")), chain["nfgen_family"]
        if hook is None or table == own or family not in _FAMILIES:
            continue
        if hook.get_attr("NFTA_HOOK_HOOKNUM") != nft.FORWARD:
            continue
        name = str(chain.get_attr("NFTA_CHAIN_NAME"))
        rejects = table == _FIREWALLD and name == "filter_FORWARD"
        if rejects or chain.get_attr("NFTA_CHAIN_POLICY") == _DROP:
            found.append(Dropper(_FAMILIES[family], table, name))
    return found


def warning(dropper: Dropper) -> str:
    """What to tell an operator of one."""
    whose = "firewalld" if dropper.table == _FIREWALLD else "dockerd, ufw or another firewall"
    return (
        f"networks: the chain {dropper} ({whose}) drops forwarded traffic its own rules do not "
        "accept; allow the bridges of containers there (docs/networks.md, beside other firewalls)"
    )


class _Hook(nla):  # type: ignore[misc]
    """Where a base chain sits."""

    prefix = "NFTA_HOOK_"
    nla_map = (
        ("NFTA_HOOK_UNSPEC", "none"),
        ("NFTA_HOOK_HOOKNUM", "be32"),
        ("NFTA_HOOK_PRIORITY", "be32"),
    )


class _Chain(nfgen_msg):  # type: ignore[misc]
    """A chain, of which names, hook and policy are decoded."""

    prefix = "NFTA_CHAIN_"
    nla_map = (
        ("NFTA_CHAIN_UNSPEC", "none"),
        ("NFTA_CHAIN_TABLE", "asciiz"),
        ("NFTA_CHAIN_HANDLE", "hex"),
        ("NFTA_CHAIN_NAME", "asciiz"),
        ("NFTA_CHAIN_HOOK", "hook"),
        ("NFTA_CHAIN_POLICY", "be32"),
    )
    hook = _Hook
