"""How a RUN step's process is run; what the builder needs of the container engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

from lazarette.runtime.builds.options import Limits
from lazarette.runtime.cdi import Edits
from lazarette.storage.idmaps import IdMap


@dataclass(frozen=True, slots=True)
class RunMount:
    """Something mounted for one step.

    Attributes:
        target: absolute path in the root filesystem.
        source: on this host; None for a fresh tmpfs.
        writable: whether the step may write.
        options: further options of a tmpfs.
    """

    target: str
    source: Path | None
    writable: bool
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One process.

    Attributes:
        id: name of the run, 64 hex digits.
        root: the mounted root filesystem, writable.
        argv: program and arguments.
        env: ``NAME=value`` lines.
        cwd: absolute working folder.
        user: ``user[:group]``, looked up in the root filesystem; empty for root.
        mounts: beside the root.
        network: ``default``, ``none``, ``host``, a network's name or ``container:ID``.
        sandbox: name of the network sandbox shared by the steps of one build.
        extra_hosts: ``name:address`` lines.
        limits: resources.
        privileged: ``--security=insecure``.
        devices: what a vendor's devices need.
        idmap: the root and the mounts are seen with; None: with the host's users.
    """

    id: str
    root: Path
    argv: Sequence[str]
    env: Sequence[str]
    cwd: str
    user: str
    mounts: Sequence[RunMount]
    network: str
    sandbox: str
    extra_hosts: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    privileged: bool = False
    devices: Edits = field(default_factory=Edits)
    idmap: IdMap | None = None


class StepRunner(Protocol):
    """Runs the processes of builds."""

    @property
    def idmap(self) -> IdMap | None:
        """Whom the users of steps are on the host; what a step sees has their owners."""
        ...

    def targets(self) -> Mapping[str, bool]:
        """Paths the runtime mounts something on in every run; whether each is a folder."""
        ...

    def run(self, request: RunRequest, output: Callable[[bytes], None], cancelled: Event) -> int:
        """Run to the end and return the exit status; output of both streams goes to ``output``.

        Raises:
            Cancelled: ``cancelled`` was set; the process is gone.
            StepFailed: it could not be started.
        """
        ...

    def recover(self) -> None:
        """End the steps that a killed daemon left running; called once at start."""
        ...

    def release(self, sandbox: str) -> None:
        """Give back the network sandbox of a build; idempotent."""
        ...
