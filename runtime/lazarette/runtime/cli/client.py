"""The connection of the command line to a daemon.

docker-py is the client: it knows unix sockets, TLS, ssh, streams and hijacking.  Calls
under ``/lazarette/v1`` go through the same session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import cast

import docker
import docker.errors
import msgspec
import requests

from lazarette.fuse import jsontext
from lazarette.runtime.cli.context import Json
from lazarette.runtime.cli.failures import failure, unreachable
from lazarette.runtime.cli.hijacked import Hijacked
from lazarette.storage.errors import Unavailable

_TIMEOUT_S = 600


class Daemon(docker.APIClient):
    """One daemon.

    Args:
        host: its address, ``unix://PATH``, ``tcp://HOST:PORT`` or ``ssh://…``.

    Raises:
        Unavailable: nobody listens there.
    """

    def __init__(self, host: str) -> None:
        self.address = host
        try:
            super().__init__(base_url=host, version="1.44", timeout=_TIMEOUT_S, tls=_tls(host))
        except docker.errors.DockerException as bad:
            raise Unavailable(f"no daemon at {host}: {bad}", hint="start lazd") from bad

    def merge_environment_settings(  # type: ignore[no-untyped-def]
        self, url, proxies, stream, verify, cert
    ):
        """See requests, which prefers ``REQUESTS_CA_BUNDLE`` to the daemon's own authority."""
        own = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, own, cert)

    def call(self, method: str, path: str, body: object = None, **query: str) -> bytes:
        """One call under ``/lazarette/v1``; the answer's body.

        Raises:
            LazaretteError: the error the daemon answered.
            Unavailable: nobody listens.
        """
        with self._send(method, path, body, query, stream=False) as answer:
            return cast(bytes, answer.content)

    def ask(self, method: str, path: str, body: object = None, **query: str) -> Json:
        """One call whose answer is a JSON object."""
        raw = self.call(method, path, body, **query)
        return jsontext.decode(raw or b"{}", type=dict[str, object])

    def ask_list(self, path: str, **query: str) -> list[Json]:
        """One GET whose answer is a JSON list of objects."""
        found = jsontext.decode(self.call("GET", path, None, **query), type=list[dict[str, object]])
        return list(found)

    def follow(self, method: str, path: str, body: object = None, **query: str) -> Iterator[Json]:
        """A call that answers a JSON object a line; an ``error`` line is raised."""
        with self._send(method, path, body, query, stream=True) as answer:
            for line in answer.iter_lines(chunk_size=1):
                if not line:
                    continue
                record = jsontext.decode(line, type=dict[str, object])
                if "error" in record:
                    raise failure(msgspec.json.encode(record["error"]), 500)
                yield record

    def hijack(self, path: str, body: object = None, **query: int) -> Hijacked:
        """A POST of the Engine API whose connection then carries a program's streams.

        docker-py's own ``attach_socket`` and ``exec_start`` lose the bytes that come together
        with the answer's head.

        Raises:
            APIError: what the daemon answered.
        """
        answer = self.post(
            f"{self.base_url}/v{self.api_version}{path}",
            json=body,
            params=query,
            headers={"Connection": "Upgrade", "Upgrade": "tcp"},
            stream=True,
            timeout=_TIMEOUT_S,
        )
        try:
            answer.raise_for_status()
        except requests.exceptions.HTTPError as refused:
            docker.errors.create_api_error_from_http_exception(refused)
        return Hijacked(answer)

    def _send(
        self, method: str, path: str, body: object, query: Mapping[str, str], stream: bool
    ) -> requests.Response:
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        url = f"{self.base_url}/lazarette/v1{path}"
        try:
            answer = self.request(
                method,
                url,
                data=data,
                params=query,
                headers=headers,
                stream=stream,
                timeout=_TIMEOUT_S,
            )
        except requests.exceptions.ConnectionError as gone:
            raise unreachable(self.address) from gone
        if answer.status_code >= 400:
            with answer:
                raise failure(answer.content, answer.status_code)
        return answer


def _tls(host: str) -> docker.tls.TLSConfig | bool:
    """Mutual TLS from ``DOCKER_TLS_VERIFY`` and ``DOCKER_CERT_PATH``, as docker reads them."""
    if not host.startswith("tcp://") or not os.environ.get("DOCKER_TLS_VERIFY"):
        return False
    folder = os.environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")
    return docker.tls.TLSConfig(
        client_cert=(f"{folder}/cert.pem", f"{folder}/key.pem"),
        ca_cert=f"{folder}/ca.pem",
        verify=True,
    )
