"""Which variables an instruction sees, and with which values.

1. ``ARG`` before the first ``FROM`` is global: seen by FROM lines, and by a stage only
   where it declares the name again.
2. In a stage: ``--build-arg``, else the line's default, else the global value.
3. Declared from its line to the end of the stage, and in stages built FROM that stage.
4. ``ENV`` of the same name wins, over ``--build-arg`` too.
5. The ten proxy variables reach RUN without a declaration; they are part of the cache key
   and the history only when declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.images.model import Platform

PROXIES = frozenset(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (upper, upper.lower())
)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def platform_args(target: Platform, host: Platform, stage: str) -> dict[str, str]:
    """The automatic variables, all of the global scope."""
    found: dict[str, str] = {"TARGETSTAGE": stage or "default"}
    for prefix, platform in (("TARGET", target), ("BUILD", host)):
        found |= {
            f"{prefix}PLATFORM": str(platform),
            f"{prefix}OS": platform.os,
            f"{prefix}ARCH": platform.architecture,
            f"{prefix}VARIANT": platform.variant,
        }
    return found


@dataclass
class BuildArgs:
    """The values given from outside, and which of them were used.

    Attributes:
        given: name to value.
        used: names some ARG declared.
    """

    given: Mapping[str, str]
    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> str | None:
        """The value given for a declared name."""
        self.used.add(name)
        return self.given.get(name)

    def unused(self) -> list[str]:
        """Names given in vain, for the warning at the end, sorted."""
        return sorted(
            name
            for name in self.given
            if name not in self.used
            and name not in PROXIES
            and name != "SOURCE_DATE_EPOCH"
            and not name.startswith("BUILDKIT_")
        )


@dataclass
class GlobalScope:
    """What FROM lines see.

    Attributes:
        args: the values given from outside.
        automatic: the platform's variables.
        values: global ARGs so far.
        declared: names of the ARG lines before the first FROM.
    """

    args: BuildArgs
    automatic: Mapping[str, str]
    escape: str = "\\"
    values: dict[str, str] = field(default_factory=dict)
    declared: set[str] = field(default_factory=set)

    def declare(self, names: Iterable[tuple[str, str | None]]) -> None:
        """An ARG line before the first FROM."""
        expander = self.expander()
        made = [
            (name, None if default is None else expander.word(default)) for name, default in names
        ]
        for name, default in made:
            self.declared.add(name)
            value = self.args.take(name)
            if value is None:
                value = self.automatic.get(name) if default is None else default
            if value is not None:
                self.values[name] = value

    def expander(self) -> Expander:
        """For FROM lines."""
        return Expander({**self.automatic, **self.values}, self.escape)


@dataclass
class StageScope:
    """What the instructions of a stage see.

    Attributes:
        world: the global scope.
        declared: ARGs declared so far; None where there is no value.
    """

    world: GlobalScope
    declared: dict[str, str | None] = field(default_factory=dict)

    def declare(
        self, names: Iterable[tuple[str, str | None]], env: Mapping[str, str]
    ) -> list[tuple[str, str | None]]:
        """An ARG line; returns names and expanded defaults for the history."""
        expander = self.expander(env)
        made = [
            (name, None if default is None else expander.word(default)) for name, default in names
        ]
        for name, default in made:
            self.declared[name] = self._value(name, default)
        return made

    def _value(self, name: str, default: str | None) -> str | None:
        given = self.world.args.take(name)
        if given is not None:
            return given
        if default is not None:
            return default
        if name in self.world.values:
            return self.world.values[name]
        return self.world.automatic.get(name)

    def values(self, env: Mapping[str, str]) -> dict[str, str]:
        """All variables for substitution."""
        args = {name: value for name, value in self.declared.items() if value is not None}
        return args | dict(env)

    def expander(self, env: Mapping[str, str]) -> Expander:
        """For the stage's instructions."""
        return Expander(self.values(env), self.world.escape)

    def run_args(self, env: Mapping[str, str]) -> dict[str, str]:
        """Declared ARGs a RUN step gets, sorted; these are part of its key and history."""
        return {
            name: value
            for name, value in sorted(self.declared.items())
            if value is not None and name not in env
        }

    def proxies(self, env: Mapping[str, str]) -> dict[str, str]:
        """Proxy variables a RUN step gets without declaration."""
        return {
            name: value
            for name, value in sorted(self.world.args.given.items())
            if name in PROXIES and name not in self.declared and name not in env
        }


def env_map(env: Iterable[str]) -> dict[str, str]:
    """``["a=1"]`` as ``{"a": "1"}``."""
    found: dict[str, str] = {}
    for line in env:
        name, _, value = line.partition("=")
        found[name] = value
    return found


def set_env(env: list[str], name: str, value: str) -> None:
    """Replace a variable in its place, or add it at the end."""
    for at, line in enumerate(env):
        if line.partition("=")[0] == name:
            env[at] = f"{name}={value}"
            return
    env.append(f"{name}={value}")
