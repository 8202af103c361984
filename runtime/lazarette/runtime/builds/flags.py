"""The ``--flags`` of instructions: which exist, their kinds, and the errors for the rest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from enum import Enum

from lazarette.runtime.builds.errors import DockerfileError


class Kind(Enum):
    """How a flag may be given."""

    TEXT = "one value"
    TEXTS = "repeatable value"
    BOOL = "true or false"


class Flags:
    """The flags of one instruction, checked against those it knows.

    Args:
        word: the instruction, for messages.
        given: the flags as they stand in the file, ``--name[=value]``.
        known: every flag of the instruction.

    Raises:
        DockerfileError: unknown, repeated or incomplete flag.
    """

    def __init__(self, word: str, given: Sequence[str], known: Mapping[str, Kind]) -> None:
        self._texts: dict[str, list[str]] = {}
        self._bools: dict[str, bool] = {}
        for flag in given:
            name, equals, value = flag.removeprefix("--").partition("=")
            kind = known.get(name)
            if kind is None:
                near = difflib.get_close_matches(name, known, 1)
                advice = f" (did you mean {near[0]}?)" if near else ""
                raise DockerfileError(f"unknown flag: --{name}{advice}")
            if kind is Kind.BOOL:
                self._set_bool(name, value if equals else "true")
                continue
            if not equals:
                raise DockerfileError(f"missing a value on flag: {name}")
            if kind is Kind.TEXT and name in self._texts:
                raise DockerfileError(f"duplicate flag specified: {name}")
            self._texts.setdefault(name, []).append(value)
        self.word = word

    def _set_bool(self, name: str, value: str) -> None:
        if name in self._bools:
            raise DockerfileError(f"duplicate flag specified: {name}")
        if value.lower() not in ("true", "false"):
            raise DockerfileError(f"expecting boolean value for flag {name}, not: {value}")
        self._bools[name] = value.lower() == "true"

    def text(self, name: str) -> str:
        """A single value; empty if it was not given."""
        return self._texts.get(name, [""])[0]

    def texts(self, name: str) -> tuple[str, ...]:
        """All values of a repeatable flag."""
        return tuple(self._texts.get(name, ()))

    def flag(self, name: str) -> bool:
        """A boolean; false if it was not given."""
        return self._bools.get(name, False)

    def maybe(self, name: str) -> bool | None:
        """A boolean, or None if it was not given."""
        return self._bools.get(name)

    @property
    def empty(self) -> bool:
        """Whether none was given."""
        return not self._texts and not self._bools
