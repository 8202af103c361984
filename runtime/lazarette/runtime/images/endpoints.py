"""Where a registry is reached: mirrors, TLS, certificates, proxies.

The rules are the Engine's: a registry named in ``insecure_registries`` (by host, host and
port, or network) is tried by https without checking its certificate, then by http; every
other one only by checked https.  ``/etc/docker/certs.d/HOST[:PORT]/`` may hold
authorities (``*.crt``) and a client certificate (``*.cert`` and ``*.key``).
"""

from __future__ import annotations

import ipaddress
import ssl
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lazarette.runtime.images.errors import RegistryFault
from lazarette.runtime.images.reference import DEFAULT_DOMAIN
from lazarette.storage.errors import InvalidArgument

HUB = "https://registry-1.docker.io"
CERTIFICATES = Path("/etc/docker/certs.d")


@dataclass(frozen=True)
class Endpoint:
    """One way to a registry.

    Attributes:
        url: scheme, host and port.
        mirror: whether it is a mirror, whose faults are passed over.
        checked: whether its certificate must be right.
    """

    url: str
    mirror: bool = False
    checked: bool = True

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    @property
    def proxy(self) -> str | None:
        """The proxy the environment names for it; never one for this host itself."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if _is_loopback(host) or urllib.request.proxy_bypass(parts.netloc):
            return None
        return urllib.request.getproxies().get(parts.scheme)


@dataclass(frozen=True)
class RegistryConfig:
    """How registries are reached.

    Attributes:
        mirrors: base URLs asked before the hub.
        insecure: hosts, ``host:port`` or networks that may lack TLS.
        certificates: folder of certificates by host.
        hub: base URL of the hub.
        parallel: layers fetched or sent at once.
        attempts: tries for a blob before giving up.
    """

    mirrors: tuple[str, ...] = ()
    insecure: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    certificates: Path = CERTIFICATES
    hub: str = HUB
    parallel: int = 3
    attempts: int = 5
    _contexts: dict[str, ssl.SSLContext | bool] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def endpoints(self, domain: str, *, mirrors: bool = True) -> list[Endpoint]:
        """Ways to a registry, in the order to try.

        Args:
            domain: as in a reference.
            mirrors: whether mirrors will do (to pull, not to push).

        Raises:
            InvalidArgument: the domain cannot be one.
        """
        if domain == DEFAULT_DOMAIN:
            found = [_mirror(url) for url in self.mirrors] if mirrors else []
            return [*found, Endpoint(self.hub)]
        if not self._is_insecure(domain):
            return [Endpoint(f"https://{domain}")]
        return [Endpoint(f"https://{domain}", checked=False), Endpoint(f"http://{domain}")]

    def _is_insecure(self, domain: str) -> bool:
        try:
            host = urlsplit(f"//{domain}").hostname or ""
        except ValueError as bad:
            raise InvalidArgument(f"{domain} is no registry: {bad}") from bad
        if domain in self.insecure or host in self.insecure or host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in _networks(self.insecure))

    def tls(self, endpoint: Endpoint) -> ssl.SSLContext | bool:
        """What aiohttp is to check of an endpoint's certificate.

        Raises:
            RegistryFault: a certificate file cannot be read.
        """
        if endpoint.host not in self._contexts:
            self._contexts[endpoint.host] = self._context(endpoint)
        return self._contexts[endpoint.host] if endpoint.checked else self._unchecked(endpoint)

    def _unchecked(self, endpoint: Endpoint) -> ssl.SSLContext | bool:
        known = self._contexts[endpoint.host]
        if isinstance(known, bool):
            return False
        known.check_hostname = False
        known.verify_mode = ssl.CERT_NONE
        return known

    def _context(self, endpoint: Endpoint) -> ssl.SSLContext | bool:
        folder = self.certificates / endpoint.host
        if not folder.is_dir():
            return True
        context = ssl.create_default_context()
        try:
            for authority in sorted(folder.glob("*.crt")):
                context.load_verify_locations(authority)
            for certificate in sorted(folder.glob("*.cert")):
                context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        except (OSError, ssl.SSLError) as bad:
            raise RegistryFault(f"certificates in {folder} cannot be used: {bad}") from bad
        return context


def _mirror(url: str) -> Endpoint:
    return Endpoint(url.rstrip("/"), mirror=True)


def _networks(
    texts: Sequence[str],
) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            continue  # a host name
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
