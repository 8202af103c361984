"""The stages of a Dockerfile, which of them a target needs, and what they need of each other."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

from lazarette.runtime.builds.errors import DockerfileError, StageNotFound
from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.builds.instructions import Arg, From, Instruction, Run, Transfer, instruction
from lazarette.runtime.builds.mounts import parse_mount
from lazarette.runtime.builds.parser import Dockerfile
from lazarette.runtime.builds.scope import GlobalScope

SCRATCH = "scratch"


@dataclass
class Stage:
    """One FROM and what follows it.

    Attributes:
        number: from 0, in file order.
        origin: the FROM instruction.
        base: its base with variables substituted; ``scratch``, an image or a stage's name.
        platform: its ``--platform`` with variables substituted.
        steps: instructions after FROM.
        base_stage: number of the stage it is built on, or None.
        needs: numbers of all stages it takes something from.
    """

    number: int
    origin: From
    base: str
    platform: str
    steps: list[Instruction] = field(default_factory=list)
    base_stage: int | None = None
    needs: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The name given by AS; empty without."""
        return self.origin.name


@dataclass(frozen=True)
class Plan:
    """What a build does.

    Attributes:
        stages: every stage of the file.
        needed: numbers of those to build, ascending; the last one is the target.
        arguments: global ARG lines, shown as steps.
    """

    stages: Sequence[Stage]
    needed: Sequence[int]
    arguments: Sequence[Arg]

    @property
    def target(self) -> Stage:
        """The stage whose result is the image."""
        return self.stages[self.needed[-1]]

    @property
    def step_count(self) -> int:
        """Steps that run, for ``Step n/m``."""
        return len(self.arguments) + sum(1 + len(self.stages[n].steps) for n in self.needed)

    def first_step(self, number: int) -> int:
        """The number, from 1, of a needed stage's FROM."""
        before = [n for n in self.needed if n < number]
        return 1 + len(self.arguments) + sum(1 + len(self.stages[n].steps) for n in before)


def make_plan(
    file: Dockerfile, scope: GlobalScope, target: str, named: Container[str] = ()
) -> Plan:
    """Divide a file into stages and choose those the target needs.

    Args:
        file: the Dockerfile.
        scope: global variables.
        target: stage to build; empty for the last.
        named: names of contexts, which hide stages of the same name.

    Raises:
        DockerfileError: no stage, a doubled name, a base that is blank.
        StageNotFound: no such target.
    """
    stages: list[Stage] = []
    arguments: list[Arg] = []
    for statement in file.statements:
        made = instruction(statement)
        if isinstance(made, From):
            stages.append(_begin(made, stages, scope, named))
        elif stages:
            stages[-1].steps.append(made)
        elif isinstance(made, Arg):
            arguments.append(made)
            try:
                scope.declare(made.names)
            except DockerfileError as bad:
                raise bad.at(made.where) from bad
        else:
            raise DockerfileError("no build stage in current context", made.where)
    if not stages:
        raise DockerfileError("no build stage in current context")
    for stage in stages:
        stage.needs |= set(_needs(stage, stages, named))
    chosen = find_stage(stages, target) if target else stages[-1]
    if chosen is None:
        raise StageNotFound(
            f'target stage "{target}" could not be found',
            hint="name one of: " + ", ".join(stage.name or str(stage.number) for stage in stages),
        )
    return Plan(stages, _closure(stages, chosen.number), arguments)


def find_stage(stages: Sequence[Stage], name: str) -> Stage | None:
    """A stage by name or number."""
    for stage in stages:
        if stage.name and stage.name == name.lower():
            return stage
    if name.isdecimal() and int(name) < len(stages):
        return stages[int(name)]
    return None


def _begin(
    origin: From, stages: Sequence[Stage], scope: GlobalScope, named: Container[str]
) -> Stage:
    if origin.name and any(stage.name == origin.name for stage in stages):
        raise DockerfileError(f"duplicate name {origin.name}", origin.where)
    if origin.name == SCRATCH:
        raise DockerfileError("scratch is reserved and cannot name a stage", origin.where)
    try:
        expander = scope.expander()
        base, platform = expander.word(origin.base), expander.word(origin.platform)
    except DockerfileError as bad:
        raise bad.at(origin.where) from bad
    if not base.strip():
        raise DockerfileError(f"base name ({origin.base}) should not be blank", origin.where)
    stage = Stage(len(stages), origin, base, platform)
    earlier = next((s for s in stages if s.name and s.name == base.lower()), None)
    if earlier is not None and base not in named:
        stage.base_stage = earlier.number
        stage.needs.add(earlier.number)
    return stage


def _needs(stage: Stage, stages: Sequence[Stage], named: Container[str]) -> Iterator[int]:
    for step in stage.steps:
        for origin in _origins(step):
            if origin in named:
                continue
            found = stage_origin(origin, stage, stages, step)
            if found is not None:
                yield found.number


def _origins(step: Instruction) -> Iterator[str]:
    if isinstance(step, Transfer) and step.origin:
        yield step.origin
    elif isinstance(step, Run):
        for mount in step.mounts:
            origin = parse_mount(mount, Expander({})).origin if "$" not in mount else ""
            if origin:
                yield origin


def stage_origin(
    origin: str, stage: Stage, stages: Sequence[Stage], step: Instruction
) -> Stage | None:
    """The earlier stage a ``from`` names; None for an image or context.

    Raises:
        DockerfileError: the stage itself, or a number out of range.
    """
    earlier = stages[: stage.number]
    for other in earlier:
        if other.name and other.name == origin.lower():
            return other
    if origin.isdecimal():
        number = int(origin)
        if number == stage.number:
            raise DockerfileError(
                f"invalid from flag value {origin}: refers to current build stage", step.where
            )
        if number > stage.number:
            raise DockerfileError(
                f"invalid from flag value {origin}: index out of bounds", step.where
            )
        return earlier[number]
    if stage.name and origin.lower() == stage.name:
        raise DockerfileError(
            f"invalid from flag value {origin}: refers to current build stage", step.where
        )
    return None


def _closure(stages: Sequence[Stage], target: int) -> list[int]:
    needed: set[int] = set()
    todo = [target]
    while todo:
        number = todo.pop()
        if number not in needed:
            needed.add(number)
            todo.extend(stages[number].needs)
    return sorted(needed)
