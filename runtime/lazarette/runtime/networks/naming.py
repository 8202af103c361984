"""What a container asks for names: the resolver inside, and its ``/etc/resolv.conf``."""

from __future__ import annotations

from collections.abc import Sequence

from lazarette.runtime.networks import resolvconf
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.directory import Directory
from lazarette.runtime.networks.dns import Resolver, Upstream
from lazarette.runtime.networks.model import Endpoint
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.records import LiveRecords
from lazarette.runtime.networks.sandbox import Sandbox


class Naming:
    """Names of endpoints, and who answers for them.

    Args:
        catalogue: of networks.
        directory: of names.
        resolver: answers inside sandboxes.
        live: where resolvers given to containers are recorded.
    """

    def __init__(
        self, catalogue: Catalogue, directory: Directory, resolver: Resolver, live: LiveRecords
    ) -> None:
        self._catalogue = catalogue
        self._directory = directory
        self._resolver = resolver
        self._live = live

    def close(self) -> None:
        """Answer nobody any more."""
        self._resolver.close()

    def has_names(self, endpoint: Endpoint) -> bool:
        """Whether its network has names at all."""
        network = self._catalogue.get(endpoint.network)
        return network is not None and network.user_defined

    def add(self, endpoint: Endpoint) -> None:
        """Answer for an endpoint, if its network has names."""
        if self.has_names(endpoint):
            self._directory.add(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Answer for it no longer."""
        self._directory.remove(endpoint)

    def serve(self, sandbox: Sandbox, *, again: bool = False) -> None:
        """Answer inside a sandbox that is in a network with names.

        Args:
            sandbox: whose processes ask.
            again: the resolver of an earlier daemon was there.
        """
        wanted = any(self.has_names(endpoint) for endpoint in sandbox.endpoints.values())
        if wanted and not self._resolver.serves(sandbox.container):
            self._resolver.start(
                sandbox.container,
                NetNamespace.at(sandbox.path),
                lambda: _upstream(sandbox),
                again=again,
            )

    def stop(self, container: str) -> None:
        """The container ends."""
        self._resolver.stop(container)

    def resolv_conf(
        self,
        sandbox: Sandbox | None,
        dns: Sequence[str],
        search: Sequence[str],
        options: Sequence[str],
    ) -> bytes:
        """The file as the sandbox is joined now; its resolver asks ``dns`` from then on."""
        if sandbox is not None and sandbox.dns != tuple(dns):
            sandbox.dns = tuple(dns)
            self._live.save_dns(sandbox.container, list(dns))
        joined = list(sandbox.endpoints.values()) if sandbox is not None else []
        embedded = any(self.has_names(endpoint) for endpoint in joined)
        conf = resolvconf.for_container(
            resolvconf.of_host(), embedded=embedded, dns=dns, search=search, options=options
        )
        return conf.render()


def _upstream(sandbox: Sandbox) -> Upstream:
    """Whom the embedded resolver asks: nobody, for a container without a way out."""
    if sandbox.dns:
        return Upstream(sandbox.dns, inside=True)
    if sandbox.way_out() is None:
        return Upstream()
    return Upstream(resolvconf.of_host().nameservers)
