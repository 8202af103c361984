"""What the daemon, or the way to it, answered instead of a result, as errors of ours."""

from __future__ import annotations

import msgspec

from lazarette.backup.jobs.model import Failure
from lazarette.fuse import jsontext
from lazarette.runtime.cli.context import default_host
from lazarette.storage.errors import InternalError, LazaretteError, Unavailable, registry

_BY_STATUS = {400: 101, 401: 102, 403: 103, 404: 104, 409: 105, 501: 107, 503: 108, 507: 109}


class _Answer(msgspec.Struct):
    message: str = ""
    hint: str = ""
    code: int = 0
    exit: int = 0


def failure(body: bytes, status: int) -> LazaretteError:
    """The error behind an answer of the daemon, of the class it was raised as there."""
    try:
        answer = jsontext.decode(body, type=_Answer)
    except msgspec.DecodeError:
        answer = _Answer(message=body.decode(errors="replace").strip() or f"HTTP status {status}")
    kind = registry().get(_BY_STATUS.get(status, InternalError.number), InternalError)
    return Failure(
        answer.code or kind.number, answer.message, answer.hint, answer.exit or kind.exit_code
    ).error()


def told(error: Exception) -> LazaretteError | None:
    """What docker-py, requests or the system raised, as an error of ours; None for a fault."""
    import docker.errors  # on use: a command without a daemon does not load docker-py
    import requests

    if isinstance(error, docker.errors.APIError) and error.response is not None:
        return failure(error.response.content, error.response.status_code)
    if isinstance(error, docker.errors.APIError):
        return LazaretteError(str(error.explanation or error))
    if isinstance(error, requests.exceptions.ConnectionError):
        return unreachable(default_host())
    if isinstance(error, docker.errors.DockerException | OSError):
        return LazaretteError(str(error))
    return None


def unreachable(host: str) -> Unavailable:
    """The error for a daemon that does not answer."""
    return Unavailable(
        f"cannot connect to the daemon at {host}",
        hint="start lazd, or name its socket with -H or LAZ_HOST",
    )
