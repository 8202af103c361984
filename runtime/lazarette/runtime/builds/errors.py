"""What goes wrong in a build, told with the file, the line and the instruction.

``DockerfileError`` is for a file that cannot be understood (400 before the stream
begins); ``BuildFailed`` for a step that ended badly (in-band, the stream has begun).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lazarette.runtime.images.errors import RegistryFault
from lazarette.storage.errors import InternalError, InvalidArgument, LazaretteError, NotFound


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a Dockerfile: lines are counted from 1; ``text`` is what stands there."""

    file: str
    line: int
    text: str

    def shown(self) -> str:
        """``Dockerfile:3`` and the lines themselves, each with its number."""
        lines = self.text.splitlines() or [""]
        body = "\n".join(f"{self.line + at:4d} | {line}" for at, line in enumerate(lines))
        return f"{self.file}:{self.line}\n{body}"


class DockerfileError(InvalidArgument):
    """The Dockerfile cannot be understood, or asks for what cannot be."""

    number = 360

    def __init__(self, message: str, where: Location | None = None, *, hint: str = "") -> None:
        self.bare = message
        self.where = where
        if where is not None:
            message = f"dockerfile parse error on line {where.line}: {message}\n{where.shown()}"
        super().__init__(message, hint=hint)

    def at(self, where: Location) -> DockerfileError:
        """The same error with its place, unless it has one already."""
        if self.where is not None:
            return self
        return DockerfileError(self.bare, where, hint=self.hint)


class StepFailed(InternalError):
    """A step of the build ended badly.

    Attributes:
        code: exit status of the step's process; 1 for anything else.
        where: the instruction.
    """

    number = 361
    http_status = 500

    def __init__(
        self, message: str, code: int = 1, where: Location | None = None, *, hint: str = ""
    ) -> None:
        self.bare = message
        self.code = code
        self.where = where
        if where is not None:
            message = f"{message}\n{where.shown()}"
        super().__init__(message, hint=hint)

    def at(self, where: Location) -> StepFailed:
        """The same error with its place, unless it has one already."""
        if self.where is not None:
            return self
        return StepFailed(self.bare, self.code, where, hint=self.hint)


@contextmanager
def placed(where: Location) -> Iterator[None]:
    """Give what goes wrong in the block its place, if it is the Dockerfile's fault.

    Raises:
        DockerfileError, StepFailed: with the place.
    """
    try:
        yield
    except (DockerfileError, StepFailed) as failed:
        raise failed.at(where) from failed
    except LazaretteError as failed:
        if failed.http_status in (400, 404) or isinstance(failed, RegistryFault):
            raise StepFailed(failed.message, 1, where, hint=failed.hint) from failed
        raise


class ContextError(InvalidArgument):
    """The build context is hostile, broken or lacks what was asked of it."""

    number = 362


class StageNotFound(InvalidArgument):
    """No stage of that name or number."""

    number = 363


class CacheRecordNotFound(NotFound):
    """No build cache record of that id."""

    number = 364
