"""The one registry of errors, used by every room above the filesystem one.

A class says three things about a failure: which number names it for ever, which exit
code a command ends with, and which HTTP status the API answers.  An instance says what
happened to which object and, in ``hint``, what to do next.  Only the edges translate:
the API makes ``{"message": …}`` and a status of it, the command line one line and an
exit code, a filesystem an errno.

::

    LazaretteError
    ├── InvalidArgument      the caller asked for something that cannot be      400
    ├── Unauthenticated      credentials are missing or wrong                   401
    ├── Forbidden            understood and refused                             403
    ├── NotFound             the named object does not exist                    404
    ├── Conflict             it exists already, or its state forbids this       409
    ├── NotModified          nothing to do                                      304
    ├── Unsupported          this build or driver does not do that              501
    ├── Unavailable          a part this needs is not there now                 503
    ├── NoSpace              a disk or quota is full                            507
    ├── DamagedData          stored bytes are not what was written              500
    └── InternalError        a fault of ours or of the host                     500

Messages start in lower case, end without a full stop, and name the operation and the
object.  Numbers: 1xx storage, 2xx backup, 3xx runtime.  Exit codes 0 (done), 1 (other
fault), 2 (usage), 3 (partial success: done with warnings) and 125-127 (as the docker
command line) are fixed; the rest are one for each kind a script may want to tell apart.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_WARNINGS = 3

_registry: dict[int, type[LazaretteError]] = {}


class LazaretteError(Exception):
    """Base of every error that reaches a person or a client.

    Args:
        message: what failed, on which object; lower case, no full stop.
        hint: the next command or step, if there is one worth naming.
    """

    number: ClassVar[int] = 100
    exit_code: int = EXIT_FAULT
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "number" not in cls.__dict__:
            raise TypeError(f"{cls.__name__} has no error number of its own")
        known = _registry.get(cls.number)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise TypeError(f"error number {cls.number} is taken by {known.__name__}")
        _registry[cls.number] = cls

    def __str__(self) -> str:
        return self.message


def registry() -> dict[int, type[LazaretteError]]:
    """Every known error class by its number (those of imported modules)."""
    return dict(_registry)


class InvalidArgument(LazaretteError):
    """The request itself is wrong: a bad name, option, size or combination."""

    number = 101
    exit_code = EXIT_USAGE
    http_status = 400


class Unauthenticated(LazaretteError):
    """Credentials are missing, wrong or expired."""

    number = 102
    exit_code = 10
    http_status = 401


class Forbidden(LazaretteError):
    """The request is understood and refused (predefined object, read-only place)."""

    number = 103
    exit_code = 11
    http_status = 403


class NotFound(LazaretteError):
    """The named object does not exist."""

    number = 104
    exit_code = 12
    http_status = 404


class Conflict(LazaretteError):
    """The name is taken, or the object's state forbids the operation now."""

    number = 105
    exit_code = 13
    http_status = 409


class NotModified(LazaretteError):
    """The object is already in the state asked for."""

    number = 106
    exit_code = EXIT_OK
    http_status = 304


class Unsupported(LazaretteError):
    """This driver, store or build does not offer the operation."""

    number = 107
    exit_code = 14
    http_status = 501


class Unavailable(LazaretteError):
    """A part the operation needs (daemon, store, kernel feature) is not there now."""

    number = 108
    exit_code = 15
    http_status = 503


class NoSpace(LazaretteError):
    """A disk, pool, quota or bucket is full."""

    number = 109
    exit_code = 16
    http_status = 507


class DamagedData(LazaretteError):
    """Stored bytes are not the bytes that were written."""

    number = 110
    exit_code = 17
    http_status = 500


class InternalError(LazaretteError):
    """A fault of ours or of the host that no other class names."""

    number = 111
    exit_code = EXIT_FAULT
    http_status = 500


class MissingFeature(Unavailable):
    """The kernel or host lacks a feature; the message names it."""

    number = 112
    exit_code = 18


class NotRoot(Forbidden):
    """The operation needs root."""

    number = 113
    exit_code = 19


class VolumeNotFound(NotFound):
    """No volume of that name."""

    number = 114
    exit_code = 20


class NameTaken(Conflict):
    """Another object holds the name."""

    number = 115
    exit_code = 21


class InUse(Conflict):
    """The object is used by something that must let go first."""

    number = 116
    exit_code = 22


class SnapshotNotFound(NotFound):
    """No snapshot of that name or id."""

    number = 117
    exit_code = 23


class SourceMissing(LazaretteError):
    """What should be read is absent, unmounted or its device failed (case A36)."""

    number = 118
    exit_code = 24
    http_status = 500


class Cancelled(LazaretteError):
    """The operation was cancelled by its caller."""

    number = 119
    exit_code = 25
    http_status = 499
