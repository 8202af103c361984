"""What protection asks of whoever runs containers.

The rules about holding volumes still know containers only through this; the runtime
implements it, tests do with real processes or in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class User:
    """A running container that has a volume mounted.

    Attributes:
        id: the container.
        name: for people.
        image: the reference it was made from.
        labels: of the container.
        paused: whether somebody has paused it already.
    """

    id: str
    name: str
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    paused: bool = False

    @property
    def service(self) -> str:
        """Its compose service, or its name."""
        return self.labels.get("com.docker.compose.service", self.name)

    @property
    def needs(self) -> frozenset[str]:
        """Compose services it depends on (``db:service_healthy:true,cache:…``)."""
        said = self.labels.get("com.docker.compose.depends_on", "")
        return frozenset(part.split(":")[0] for part in said.split(",") if part)


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended: its exit code, and what it wrote."""

    code: int
    stdout: bytes = b""
    stderr: bytes = b""

    def last_words(self) -> str:
        """The last line it wrote, for a message."""
        said = (self.stderr or self.stdout).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else f"exit code {self.code}"


class Session(Protocol):
    """A command that goes on running in a container, spoken to line by line."""

    async def send(self, data: bytes) -> None:
        """Write to its standard input.

        Raises:
            LazaretteError: it has ended.
        """
        ...

    async def read_line(self) -> bytes:
        """One line of its standard output with its line feed; empty when it has ended."""
        ...

    async def close(self) -> None:
        """End it: its standard input closes, then it is killed.  May be called again."""
        ...


class ContainerAccess(Protocol):
    """Containers, as protection needs them.  Every method raises only LazaretteError."""

    async def users(self, volumes: Sequence[str]) -> Sequence[User]:
        """Running or paused containers that have one of the volumes mounted for writing."""
        ...

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        """Run a command in a container to its end; killed after so many seconds."""
        ...

    async def session(self, container: str, argv: Sequence[str]) -> Session:
        """Start a command in a container and talk to it."""
        ...

    async def execute_on_host(self, argv: Sequence[str], timeout: float) -> Ended:
        """Run a command on the host."""
        ...

    async def pause(self, container: str) -> None:
        """Freeze a container; nothing when it is frozen or gone."""
        ...

    async def unpause(self, container: str) -> None:
        """Thaw a container; nothing when it runs or is gone."""
        ...

    async def stop(self, container: str) -> int:
        """Stop a container with its own signal and timeout; its exit code."""
        ...

    async def start(self, container: str) -> None:
        """Start a stopped container; nothing when it runs or is gone."""
        ...


def in_stop_order(users: Sequence[User]) -> list[User]:
    """Those who need others before the others; started again in the reverse order.

    Circles are broken at the alphabetically first.
    """
    left = sorted(users, key=lambda user: user.name)
    ordered: list[User] = []
    while left:
        needed = frozenset[str]().union(*(user.needs for user in left))
        free = [user for user in left if user.service not in needed] or left[:1]
        ordered += free
        left = [user for user in left if user not in free]
    return ordered
