"""Policies: what is protected, when, how, for how long, and who is told.

A policy comes from the command line or API, from ``/etc/lazarette/policies.toml``, or from
labels of a volume or container.  All three say the same words::

    [policy.shop]                            lazarette.backup=every 15m
    project  = "shop"                        lazarette.keep=hourly=24,daily=7
    schedule = "every 15m"                   lazarette.repo=s3://backups/shop
    keep     = "hourly=24,daily=7"           lazarette.consistency=postgres
    repository = "s3://backups/shop"
    copies   = ["/mnt/usb/shop"]
    consistency = "postgres"

and are read into one :class:`Policy`.  ``str`` of each part reads back as the same.

Where several apply to a volume: its own labels, then its containers' labels, then what was
set by command line or API, then the file; the first that applies is the one.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from zoneinfo import ZoneInfo

import msgspec

from lazarette.backup.policy.durations import parse_duration
from lazarette.backup.policy.retention import Keep, parse_keep
from lazarette.backup.policy.schedule import Schedule, parse_schedule, zone_of
from lazarette.backup.policy.windows import (
    NO_LIMIT,
    RateLimit,
    Window,
    next_open,
    parse_rate,
    parse_window,
)
from lazarette.storage.errors import InvalidArgument, LazaretteError

LABEL_PREFIX = "lazarette."
SCRATCH_PREFIX = "lazarette-drill-"
"""Names of what drills make; no policy means it, whatever labels it was restored with."""
_PROJECT = "com.docker.compose.project"
_ON = {"on", "yes", "true", "1"}
_OFF = {"off", "none", "no", "false", "never"}
_DEFAULT_KEEP = "last=3,daily=7,weekly=4,monthly=6"


class WrongPolicy(InvalidArgument):
    """A policy cannot be understood; the message names it, the word and what is wrong."""

    number = 260


class Origin(Enum):
    """Where a policy was set; the first that applies to a volume counts."""

    VOLUME_LABELS = "labels of the volume"
    CONTAINER_LABELS = "labels of a container"
    SET = "set by command or API"
    FILE = "policy file"

    @property
    def rank(self) -> int:
        """Smaller goes first."""
        return list(Origin).index(self)


class HoldMode(Enum):
    """How a volume is held still while it is saved."""

    SNAPSHOT = "snapshot"
    """An atomic snapshot; nobody is paused."""
    PAUSE = "pause"
    """Its users are paused while it is read or snapshotted."""
    STOP = "stop"
    """Its users are stopped, and started again."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A command before or after: in a container (its name or id), or on the host."""

    argv: tuple[str, ...]
    container: str = ""


@dataclass(frozen=True, slots=True)
class ConsistencyRule:
    """What is done so that a backup is consistent.

    Attributes:
        profile: ``crash`` (an atomic snapshot, nobody is held), ``auto`` (a profile found by
            image), ``hooks`` (the commands below make it consistent), or a profile's name.
        mode: see :class:`HoldMode`.
        before: commands before the snapshot; one that fails ends the run.
        after: commands after it, in any case.
    """

    profile: str = "crash"
    mode: HoldMode = HoldMode.SNAPSHOT
    before: tuple[Hook, ...] = ()
    after: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Targets:
    """Which volumes a policy means: any of these."""

    volumes: tuple[str, ...] = ()
    """Names; ``*``, ``?`` and ``[…]`` stand for others."""
    labels: tuple[tuple[str, str], ...] = ()
    """All of these labels; an empty value stands for any."""
    project: str = ""
    """A compose project."""

    def mean(self, volume: Volume) -> bool:
        """Whether a volume is one of them."""
        if any(fnmatchcase(volume.name, pattern) for pattern in self.volumes):
            return True
        if self.project and self.project in volume.projects:
            return True
        return bool(self.labels) and all(
            volume.labels.get(name) == value or (not value and name in volume.labels)
            for name, value in self.labels
        )


@dataclass(frozen=True, slots=True)
class Volume:
    """What the rules must know of a volume."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    container_labels: Sequence[Mapping[str, str]] = ()
    containers: Sequence[str] = ()
    """Names of the containers that use it, as ``container_labels``."""

    @property
    def projects(self) -> frozenset[str]:
        """The compose projects it belongs to: its own, and those of containers using it."""
        labels = (self.labels, *self.container_labels)
        return frozenset(filter(None, (each.get(_PROJECT, "") for each in labels)))

    @property
    def bonds(self) -> frozenset[str]:
        """What ties it to others: the containers using it, the projects it belongs to."""
        projects = (f"project {name}" for name in self.projects)
        return frozenset([*(f"container {name}" for name in self.containers), *projects])


@dataclass(frozen=True, slots=True)
class Drill:
    """Restore drills: when, and the command whose success proves the restore.

    Attributes:
        schedule: when.
        command: run in the started container; empty takes the profile's check.
    """

    schedule: Schedule
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tell:
    """Who is told.

    Attributes:
        urls: Apprise URLs; they may hold secrets and are never shown.
        ping_start: URL fetched when a run begins.
        ping_success: when it ended well, with or without warnings.
        ping_failure: when it failed.
    """

    urls: tuple[str, ...] = field(default=(), repr=False)
    ping_start: str = field(default="", repr=False)
    ping_success: str = field(default="", repr=False)
    ping_failure: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy.

    Attributes:
        name: unique; of a policy by labels, the volume's name.
        targets: what it protects.
        schedule: when.
        zone: of schedule, windows and retention.
        keep: retention in the primary repository.
        repository: URL of the primary; empty takes the host's default.
        copies: URLs of repositories that get a copy of each backup.
        copy_keep: retention in the copies.
        consistency: how volumes are held still.
        windows: runs outside them do not happen.
        upload: bandwidth by time of day.
        read: what is read from volumes by time of day.
        jitter_ns: each run begins up to so much late, differently for each policy.
        rpo_ns: the oldest the last good backup may be; 0 takes a default by the schedule.
        rto_ns: the longest a restore may take; 0 for no target.
        drill: restore drills.
        tell: who is told.
        wal: PostgreSQL's log is kept too, for recovery to any moment between two snapshots.
        origin: where it was set.
        source: for people: which file, volume or container.
    """

    name: str
    targets: Targets
    schedule: Schedule
    zone: ZoneInfo
    keep: Keep
    repository: str = ""
    copies: tuple[str, ...] = ()
    copy_keep: Keep | None = None
    consistency: ConsistencyRule = ConsistencyRule()
    windows: tuple[Window, ...] = ()
    upload: RateLimit = NO_LIMIT
    read: RateLimit = NO_LIMIT
    jitter_ns: int = 0
    rpo_ns: int = 0
    rto_ns: int = 0
    drill: Drill | None = None
    tell: Tell = Tell()
    wal: bool = False
    origin: Origin = Origin.SET
    source: str = ""


class _Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A policy as written; see the module's text."""

    schedule: str
    volumes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    project: str = ""
    keep: str = ""
    repository: str = ""
    copies: tuple[str, ...] = ()
    copy_keep: str = ""
    consistency: str = "crash"
    mode: str = "snapshot"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    upload: str = ""
    read: str = ""
    jitter: str = ""
    rpo: str = ""
    rto: str = ""
    zone: str = ""
    drill: str = ""
    drill_command: str = ""
    notify: tuple[str, ...] = ()
    ping_start: str = ""
    ping_success: str = ""
    ping_failure: str = ""
    wal: str | bool = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy file: defaults for all its policies, and the policies by name."""

    defaults: dict[str, object] = {}
    policy: dict[str, dict[str, object]] = {}


_LISTS = {"volumes", "labels", "copies", "before", "after", "windows", "notify"}
_LABEL_WORDS = {
    "backup": "schedule",
    "repo": "repository",
    "pre": "before",
    "post": "after",
    "drill.command": "drill_command",
    "copy.keep": "copy_keep",
    "ping.start": "ping_start",
    "ping.success": "ping_success",
    "ping.failure": "ping_failure",
}
_NOT_BY_LABEL = {"volumes", "labels", "project"}


def parse_file(text: str, source: str, default_zone: str = "UTC") -> list[Policy]:
    """Read a policy file.

    Args:
        text: TOML.
        source: its path, for people.
        default_zone: of policies that name none.

    Raises:
        WrongPolicy: something in it cannot be understood.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), type=_File)
    except (tomllib.TOMLDecodeError, RecursionError, msgspec.ValidationError) as bad:
        raise WrongPolicy(f"policy file {source} cannot be read: {bad}") from bad
    return [
        parse_words(name, {**file.defaults, **words}, Origin.FILE, source, default_zone)
        for name, words in file.policy.items()
    ]


def parse_labels(
    name: str, labels: Mapping[str, str], origin: Origin, source: str, default_zone: str = "UTC"
) -> Policy | None:
    """The policy that labels set for one volume; None when they set none.

    Args:
        name: the volume.
        labels: of the volume or of a container that uses it.
        origin: which of the two.
        source: for people.
        default_zone: when no ``lazarette.zone`` is there.

    Raises:
        WrongPolicy: a label cannot be understood.
    """
    said = {
        label[len(LABEL_PREFIX) :]: value
        for label, value in labels.items()
        if label.startswith(LABEL_PREFIX)
    }
    if "backup" not in said or said["backup"].strip().lower() in _OFF:
        return None
    words: dict[str, object] = {"volumes": (_escaped(name),)}
    for label, value in said.items():
        word = _LABEL_WORDS.get(label, label.replace(".", "_"))
        if word in _NOT_BY_LABEL or word not in _Words.__struct_fields__:
            continue
        words[word] = _split(word, value)
    return parse_words(name, words, origin, source, default_zone)


def is_switched_off(labels: Mapping[str, str]) -> bool:
    """Whether labels say that a volume is not to be protected by any policy."""
    return labels.get(LABEL_PREFIX + "backup", "").strip().lower() in _OFF


def parse_words(
    name: str,
    words: Mapping[str, object],
    origin: Origin,
    source: str = "",
    default_zone: str = "UTC",
) -> Policy:
    """Read a policy from its words, e.g. of the API or of command line options.

    Raises:
        WrongPolicy: one cannot be understood.
    """
    try:
        said = msgspec.convert(dict(words), type=_Words)
    except msgspec.ValidationError as bad:
        raise WrongPolicy(f"policy {name}: {bad}", hint="see laz policy set --help") from bad
    try:
        return _build(name, said, origin, source, default_zone)
    except LazaretteError as bad:
        raise WrongPolicy(f"policy {name}: {bad.message}", hint=bad.hint) from bad


def applying(
    policies: Sequence[Policy], volume: Volume, default_zone: str = "UTC"
) -> Policy | None:
    """The policy that counts for a volume, None when nothing protects it.

    Args:
        policies: those of the file and those set; labels are read from the volume itself.
        volume: which.
        default_zone: for policies by labels.

    Raises:
        WrongPolicy: the volume's or a container's label cannot be understood.
    """
    if is_switched_off(volume.labels) or volume.name.startswith(SCRATCH_PREFIX):
        return None
    own = parse_labels(
        volume.name, volume.labels, Origin.VOLUME_LABELS, f"volume {volume.name}", default_zone
    )
    if own is not None:
        return own
    for number, labels in enumerate(volume.container_labels):
        known = number < len(volume.containers)
        source = f"container {volume.containers[number]}" if known else "a container using it"
        found = parse_labels(volume.name, labels, Origin.CONTAINER_LABELS, source, default_zone)
        if found is not None:
            return found
    ordered = sorted(policies, key=lambda policy: (policy.origin.rank, policy.name))
    return next((policy for policy in ordered if policy.targets.mean(volume)), None)


def _build(name: str, said: _Words, origin: Origin, source: str, default_zone: str) -> Policy:
    zone = said.zone or default_zone
    policy = Policy(
        name=name,
        targets=Targets(said.volumes, _label_selectors(said.labels), said.project),
        schedule=parse_schedule(said.schedule, zone),
        zone=zone_of(zone),
        keep=parse_keep(said.keep or _DEFAULT_KEEP),
        repository=said.repository,
        copies=said.copies,
        copy_keep=parse_keep(said.copy_keep) if said.copy_keep else None,
        consistency=_consistency(said),
        windows=tuple(parse_window(window) for window in said.windows),
        upload=parse_rate(said.upload),
        read=parse_rate(said.read),
        jitter_ns=parse_duration(said.jitter) if said.jitter else 0,
        rpo_ns=parse_duration(said.rpo) if said.rpo else 0,
        rto_ns=parse_duration(said.rto) if said.rto else 0,
        drill=_drill(said, zone),
        tell=Tell(said.notify, said.ping_start, said.ping_success, said.ping_failure),
        wal=_yes(said.wal),
        origin=origin,
        source=source,
    )
    if not (said.volumes or said.labels or said.project):
        raise InvalidArgument("it protects nothing", hint="name volumes, labels or a project")
    _check_times(policy)
    return policy if policy.rpo_ns else replace(policy, rpo_ns=_default_rpo(policy))


def _yes(said: str | bool) -> bool:
    """A yes or no as people write it; nothing is no.

    Raises:
        InvalidArgument: it is neither.
    """
    word = str(said).strip().lower()
    if word in _ON:
        return True
    if word in _OFF or word in ("", "0"):
        return False
    raise InvalidArgument(f"wal is yes or no, not {said!r}")


def _check_times(policy: Policy) -> None:
    """It is due at times, and its jitter does not reach beyond the next one."""
    first = next_open(policy.schedule, policy.windows, 0, policy.zone)
    gap = next_open(policy.schedule, policy.windows, first, policy.zone) - first
    if policy.jitter_ns * 2 > gap:
        raise InvalidArgument("the jitter is longer than half the time between runs")


def _default_rpo(policy: Policy) -> int:
    """Twice the longest wait between two runs, of the next dozen."""
    due = next_open(policy.schedule, policy.windows, 1_767_225_600 * 10**9, policy.zone)
    longest = 0
    for _ in range(12):
        following = next_open(policy.schedule, policy.windows, due, policy.zone)
        longest = max(longest, following - due)
        due = following
    return 2 * longest + policy.jitter_ns


def _drill(said: _Words, zone: str) -> Drill | None:
    if not said.drill or said.drill.lower() in _OFF:
        return None
    return Drill(parse_schedule(said.drill, zone), tuple(shlex.split(said.drill_command)))


def _consistency(said: _Words) -> ConsistencyRule:
    """The words ``pause``, ``stop`` and ``application`` are short for a mode or ``auto``."""
    profile, mode = said.consistency.strip(), _mode(said.mode)
    if profile in (HoldMode.PAUSE.value, HoldMode.STOP.value):
        profile, mode = "crash", HoldMode(profile)
    elif profile == "application":
        profile = "auto"
    return ConsistencyRule(profile, mode, _hooks(said.before), _hooks(said.after))


def _mode(text: str) -> HoldMode:
    try:
        return HoldMode(text)
    except ValueError:
        raise InvalidArgument(f"mode is snapshot, pause or stop, not {text!r}") from None


def _hooks(commands: Sequence[str]) -> tuple[Hook, ...]:
    """``container: command`` or ``host: command``, split as a shell would."""
    found = []
    for command in commands:
        place, colon, rest = command.partition(":")
        try:
            argv = tuple(shlex.split(rest))
        except ValueError as bad:
            raise InvalidArgument(f"not a command: {rest.strip()!r} ({bad})") from bad
        if not colon or not argv or " " in place.strip():
            raise InvalidArgument(
                f"not a hook: {command!r}",
                hint="write 'host: command …' or 'CONTAINER: command …'",
            )
        found.append(Hook(argv, "" if place.strip() == "host" else place.strip()))
    return tuple(found)


def _label_selectors(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = (label.partition("=") for label in labels)
    return tuple((name.strip(), value.strip()) for name, _, value in pairs)


def _split(word: str, value: str) -> object:
    """A label's text as the word's type: lists are separated by semicolons."""
    if word not in _LISTS:
        return value
    return tuple(filter(None, (part.strip() for part in value.split(";"))))


def _escaped(name: str) -> str:
    """A name as a pattern that means only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
