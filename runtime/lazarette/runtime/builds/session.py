"""What a client hands over beside a build's request: secrets and agent sockets.

They travel in a body of their own, never in a URL, and are kept in memory only, for one
build or ten minutes.
"""

from __future__ import annotations

import secrets as tokens
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lazarette.runtime.builds.options import Secret
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import InvalidArgument

LIFETIME: Final = 600 * NANOSECONDS
LARGEST: Final = 500 * 1024


@dataclass(frozen=True)
class Handed:
    """Secrets and agent sockets by id."""

    secrets: Mapping[str, Secret] = field(default_factory=dict)
    ssh: Mapping[str, str] = field(default_factory=dict)


class Sessions:
    """What waits for its build.

    Args:
        clock: lets it expire.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, tuple[int, Handed]] = {}

    def put(self, handed: Handed) -> str:
        """Keep it.

        Returns:
            A token that names it once.

        Raises:
            InvalidArgument: a secret is too large.
        """
        for name, secret in handed.secrets.items():
            if len(secret.data) > LARGEST:
                raise InvalidArgument(f"secret {name} is larger than {LARGEST} bytes")
        now = self._clock.monotonic_ns()
        self._waiting = {t: kept for t, kept in self._waiting.items() if kept[0] > now}
        token = tokens.token_urlsafe(24)
        self._waiting[token] = (now + LIFETIME, handed)
        return token

    def take(self, token: str) -> Handed:
        """What a token names; gone afterwards.

        Raises:
            InvalidArgument: no such token, or it expired.
        """
        if not token:
            return Handed()
        until, handed = self._waiting.pop(token, (0, Handed()))
        if until <= self._clock.monotonic_ns():
            raise InvalidArgument("the build's secrets are unknown or expired")
        return handed
