"""What can go wrong with containers; numbers 300 to 319 of the registry."""

from __future__ import annotations

from lazarette.storage.errors import Conflict, InternalError, InvalidArgument, NotFound, Unavailable


class ContainerNotFound(NotFound):
    """No container of that name or id."""

    number = 300

    def __init__(self, reference: str) -> None:
        super().__init__(f"No such container: {reference}", hint="docker ps --all lists them")


class ContainerNameTaken(Conflict):
    """Another container holds the name; the text is the one clients look for."""

    number = 301
    exit_code = 21

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(
            f'Conflict. The container name "/{name}" is already in use by container "{holder}". '
            "You have to remove (or rename) that container to be able to reuse that name."
        )


class WrongState(Conflict):
    """The container's state forbids the operation."""

    number = 302
    exit_code = 22


class StartFailed(InvalidArgument):
    """The container's first process could not be started.

    ``code`` is what the container's exit code becomes: 127 when the program is not
    there, 126 when it cannot be executed, 128 for anything else; ``reason`` is the
    runtime's word without what Docker puts around it.
    """

    number = 303
    exit_code = 125

    def __init__(self, reason: str, code: int, runtime: str) -> None:
        super().__init__(
            "failed to create task for container: failed to create shim task: OCI runtime "
            f"create failed: {runtime} create failed: unable to start container process: {reason}"
        )
        self.code = code
        self.reason = reason


class RuntimeMissing(Unavailable):
    """No OCI runtime works on this host."""

    number = 304
    exit_code = 18


class MonitorFailed(InternalError):
    """conmon could not be started or broke its protocol."""

    number = 305


class ExecNotFound(NotFound):
    """No exec session of that id."""

    number = 306

    def __init__(self, reference: str) -> None:
        super().__init__(f"No such exec instance: {reference}")


class PathNotFound(NotFound):
    """The path does not exist in the container."""

    number = 307
    exit_code = 12

    def __init__(self, path: str, container: str) -> None:
        super().__init__(f"Could not find the file {path} in container {container}")


class PruneRunning(Conflict):
    """A prune of the same kind is under way."""

    number = 308
    exit_code = 22

    def __init__(self) -> None:
        super().__init__("a prune operation is already running")


class LogsUnreadable(InvalidArgument):
    """The container's logging driver keeps nothing that could be read."""

    number = 309
    http_status = 501

    def __init__(self) -> None:
        super().__init__("configured logging driver does not support reading")


class TopFailed(InternalError):
    """``ps`` cannot show what was asked for."""

    number = 311


class DriverMissing(InternalError):
    """No driver gives the devices that ``--gpus`` or another device request asks for."""

    number = 312

    def __init__(self, driver: str, capabilities: str) -> None:
        super().__init__(
            f'could not select device driver "{driver}" with capabilities: {capabilities}',
            hint="name the devices themselves with --device",
        )


class HostFault(InternalError):
    """The kernel refused something a container needs."""

    number = 310
