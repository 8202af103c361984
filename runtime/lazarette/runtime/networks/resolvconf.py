"""``/etc/resolv.conf`` and ``/etc/hosts`` of containers."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOST_FILE = Path("/etc/resolv.conf")
SYSTEMD_FILE = Path("/run/systemd/resolve/resolv.conf")
"""Where systemd-resolved keeps the servers behind its stub at 127.0.0.53."""

EMBEDDED = "127.0.0.11"
"""Where the resolver of user-defined networks answers, in every container."""

_BASE_HOSTS = (
    ("127.0.0.1", "localhost"),
    ("::1", "localhost ip6-localhost ip6-loopback"),
    ("fe00::", "ip6-localnet"),
    ("ff00::", "ip6-mcastprefix"),
    ("ff02::1", "ip6-allnodes"),
    ("ff02::2", "ip6-allrouters"),
)


@dataclass(frozen=True)
class ResolvConf:
    """The settings of a resolver file."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def render(self) -> bytes:
        """The file."""
        lines = [f"nameserver {server}" for server in self.nameservers]
        if self.search:
            lines.append(f"search {' '.join(self.search)}")
        if self.options:
            lines.append(f"options {' '.join(self.options)}")
        return ("\n".join(lines) + "\n").encode()


def parse(text: str) -> ResolvConf:
    """A resolver file; what is not understood is left out."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            servers.append(words[1])
        elif words[0] in ("search", "domain"):
            search = tuple(words[1:])
        elif words[0] == "options":
            options += words[1:]
    return ResolvConf(tuple(servers), search, tuple(options))


def of_host() -> ResolvConf:
    """The host's own settings, those behind a local stub of systemd's if there is one."""
    try:
        conf = parse(HOST_FILE.read_text(errors="replace"))
        if conf.nameservers == ("127.0.0.53",) and SYSTEMD_FILE.exists():
            return parse(SYSTEMD_FILE.read_text(errors="replace"))
    except OSError:
        return ResolvConf()
    return conf


def for_container(
    host: ResolvConf,
    *,
    embedded: bool,
    dns: Sequence[str] = (),
    search: Sequence[str] = (),
    options: Sequence[str] = (),
) -> ResolvConf:
    """What a container's file says.

    Args:
        host: the host's settings.
        embedded: the container is on a user-defined network.
        dns: ``--dns``.
        search: ``--dns-search``; ``.`` alone means none.
        options: ``--dns-option``.
    """
    searched = tuple(search) or host.search
    if searched == (".",):
        searched = ()
    chosen = tuple(options) or host.options
    if embedded:
        if not any(option.startswith("ndots:") for option in chosen):
            chosen = (*chosen, "ndots:0")
        return ResolvConf((EMBEDDED,), searched, chosen)
    servers = tuple(dns) or tuple(server for server in host.nameservers if not _local(server))
    return ResolvConf(servers, searched, chosen)


def upstream(host: ResolvConf, dns: Sequence[str]) -> tuple[str, ...]:
    """Where the embedded resolver asks for names it does not know."""
    return tuple(dns) or host.nameservers


def _local(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return False


def hosts(entries: Sequence[tuple[str, str]]) -> bytes:
    """A hosts file: the usual entries and these (address, names)."""
    lines = [f"{address}\t{names}" for address, names in (*_BASE_HOSTS, *entries)]
    return ("\n".join(lines) + "\n").encode()
