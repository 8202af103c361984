"""Names and life of volumes over all drivers: making, using, renaming, removing them.

:class:`VolumeStore` keeps one record a volume (:mod:`lazarette.storage.volumes.book`),
counts who has a volume mounted by the caller's id (case A35), serialises operations on one
volume and writes ahead what it is about to do.  A killed operation is undone when its
driver did not finish (``create``, ``clone``, ``snapshot``, ``move`` to another driver, filling an
empty volume) and finished otherwise (``remove``, ``rename``, ``rollback``).

:class:`lazarette.storage.volumes.manager.VolumeManager` adds snapshots and contents.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazarette.storage import steps
from lazarette.storage.clock import Clock
from lazarette.storage.errors import (
    InUse,
    InvalidArgument,
    LazaretteError,
    NameTaken,
    NotFound,
    Unsupported,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes import content
from lazarette.storage.volumes.book import Entry, Operation, VolumeBook
from lazarette.storage.volumes.contract import (
    VolumeDriver,
    VolumeUsage,
)
from lazarette.storage.volumes.names import anonymous_name, check_name

ANONYMOUS_LABEL = "com.docker.volume.anonymous"

_log = logging.getLogger(__name__)


class WrongDriver(NameTaken):
    """A volume of that name exists with another driver or other options (case A24)."""

    number = 123


@dataclass(frozen=True, slots=True)
class Volume:
    """A named volume.

    Attributes:
        name: its name.
        driver: name of its driver.
        options: as given at its creation.
        labels: of the user.
        created_ns: wall clock.
        anonymous: it was given no name.
        mountpoint: where its content is reachable while mounted.
        users: ids of those who have it mounted, sorted.
    """

    name: str
    driver: str
    options: Mapping[str, str]
    labels: Mapping[str, str]
    created_ns: int
    anonymous: bool
    mountpoint: Path
    users: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Volumes that :meth:`VolumeManager.prune` removed, and the bytes they referred to."""

    names: tuple[str, ...]
    reclaimed: int


Origin = Callable[[str, Mapping[str, str], Mapping[str, str]], Volume]
ORIGIN = "from"


class VolumeStore:
    """All named volumes of a host.

    Args:
        state: the daemon's database.
        drivers: by name; one is asked for only when it is needed.
        clock: for creation times.
        default: name of the driver taken when none is asked for; ``"local"`` and ``""``
            stand for it, as tools made for Docker send them.
        databases: name of the driver that suits databases best; by default the same.

    Attributes:
        set_back: told of a volume before it is rolled back.
        origin: makes volumes with the option ``from`` of name, options and labels; they begin
            as something that is kept elsewhere.
    """

    def __init__(
        self,
        state: State,
        drivers: Mapping[str, VolumeDriver],
        clock: Clock,
        default: str,
        *,
        databases: str = "",
    ) -> None:
        self.origin: Origin | None = None
        self.set_back: Callable[[str], None] = lambda volume: None
        if default not in drivers:
            raise InvalidArgument(
                f"the default volume driver {default} is not among {', '.join(sorted(drivers))}"
            )
        self._book = VolumeBook(state)
        self._drivers = drivers
        self._clock = clock
        self.default = default
        self.databases = databases or default
        self._locks: dict[str, threading.RLock] = {}
        self._guard = threading.Lock()
        self._shown: dict[str, Path] = {}
        self._reserved: dict[str, tuple[str, str]] = {}
        self._recovered: set[str] = set()

    # ---- records

    def driver(self, name: str) -> VolumeDriver:
        """A driver by its name; ``""`` and ``"local"`` are the default one.

        Raises:
            NotFound: no such driver, with the list.
        """
        wanted = self.default if name in ("", "local") else name
        if wanted not in self._drivers:
            raise NotFound(
                f'volume driver "{name}" not found',
                hint=f"valid drivers: {', '.join(sorted(self._drivers))}",
            )
        driver = self._drivers[wanted]
        with self._guard:
            if wanted not in self._recovered:
                driver.recover()
                self._recovered.add(wanted)
        return driver

    def shown(self, driver: str) -> str:
        """A driver as Docker's tools know it: those taken when none is asked for are ``local``."""
        return "local" if driver in (self.default, self.databases) else driver

    @property
    def drivers(self) -> Mapping[str, VolumeDriver]:
        """All drivers by name."""
        return self._drivers

    def get(self, name: str) -> Volume:
        """A volume by name.

        Raises:
            VolumeNotFound: there is none.
        """
        entry = self._book.get(name)
        location = Path()
        if entry.driver in self._drivers:
            location = self.driver(entry.driver).location(name)
        return Volume(
            name=name,
            driver=entry.driver,
            options=entry.options,
            labels=entry.labels,
            created_ns=entry.created_ns,
            anonymous=entry.anonymous,
            mountpoint=location,
            users=self._book.users(name),
        )

    def list(self) -> list[Volume]:
        """All volumes, by name."""
        return [self.get(name) for name in self._book.names()]

    def users(self, name: str) -> tuple[str, ...]:
        """Ids of those who have a volume mounted, sorted."""
        return self._book.users(name)

    def set_labels(self, name: str, labels: Mapping[str, str]) -> Volume:
        """Replace the labels of a volume."""
        with self._held(name):
            self._book.get(name)
            self._book.set_labels(name, labels)
        return self.get(name)

    @contextmanager
    def _held(self, *names: str) -> Iterator[None]:
        """Serialise operations on volumes; several are taken in the order of their names."""
        with self._guard:
            locks = [self._locks.setdefault(name, threading.RLock()) for name in sorted(set(names))]
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            yield

    def _of(self, name: str) -> VolumeDriver:
        """The driver of an existing volume."""
        return self.driver(self._book.get(name).driver)

    @contextmanager
    def _reachable(self, name: str) -> Iterator[Path]:
        """The root of a volume for the length of the block, whether it is in use or not."""
        driver = self._of(name)
        try:
            yield driver.mount(name)
        finally:
            if not self._book.users(name):
                driver.unmount(name)

    # ---- after a restart

    def recover(self) -> None:
        """Finish or undo every operation that was killed; mount again what is in use.

        A driver cleans up after itself when it is first asked for, here or later.
        """
        for name in self._book.drivers():
            if name in self._drivers:
                self.driver(name)
            else:
                _log.warning("volumes of the driver %s: there is no such driver", name)
        for operation in self._book.unfinished():
            if operation.driver in self._drivers:
                self._repair(operation)
                self._book.settle(operation.id)
        for name in self._book.used():
            try:
                self._of(name).mount(name)
            except LazaretteError as failed:
                _log.warning("volume %s cannot be mounted again: %s", name, failed)

    def _repair(self, operation: Operation) -> None:
        verb, volume, detail = operation.verb, operation.volume, operation.detail
        driver = self.driver(operation.driver)
        recorded = self._book.has(volume)
        if verb in ("create", "clone") and not recorded:
            driver.remove(volume)
        elif verb == "move" and recorded:
            moved = self._book.get(volume).driver == detail["to"]
            (driver if moved else self.driver(detail["to"])).remove(volume)
        elif verb == "remove":
            driver.remove(volume)
            self._book.forget(volume)
        elif verb == "rename" and recorded:
            driver.rename(volume, detail["new"])
            self._book.rename(volume, detail["new"])
        elif verb == "snapshot" and recorded:
            driver.delete_snapshot(volume, detail["snapshot"])
        elif verb == "rollback" and recorded:
            driver.rollback(volume, detail["snapshot"])
        elif verb == "fill" and recorded:
            with self._reachable(volume) as root:
                content.clear(root)

    # ---- life

    def create(
        self,
        name: str | None,
        driver: str = "",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        suited: str = "",
    ) -> Volume:
        """Make a volume, or return the one there is when driver and options agree.

        Args:
            name: None or ``""`` for an anonymous one.
            driver: by default ``suited``, or the host's.
            options: of the driver.
            labels: of the user.
            suited: driver that is best for what the volume is to hold.  It counts where neither
                driver nor options are asked for, and one that exists and nobody has used moves.

        Raises:
            InvalidArgument: a bad name or option.
            WrongDriver: the name exists with another driver or other options.
        """
        anonymous = not name
        wanted = check_name(name) if name else anonymous_name()
        options, labels = dict(options or {}), dict(labels or {})
        if anonymous:
            labels.setdefault(ANONYMOUS_LABEL, "")
        if ORIGIN in options and self.origin is not None and driver in ("", "local"):
            return self.origin(wanted, options, labels)
        with self._held(wanted):
            existing = self._same(wanted, driver, options)
            free = driver in ("", "local") and not options
            if existing is not None:
                if suited and free and self._movable(wanted, suited):
                    self._move(wanted, suited)
                    return self.get(wanted)
                return existing
            chosen = self.driver(suited) if suited and free else self._chosen(driver, options)
            kind = chosen.capabilities.name
            with self._book.operation("create", kind, wanted):
                chosen.create(wanted, options)
                steps.reached("volume.create.made")
                self._add(wanted, kind, options, labels, anonymous, free and not suited)
        return self.get(wanted)

    def _movable(self, name: str, driver: str) -> bool:
        """Whether a volume can be made anew by another driver without anyone missing anything."""
        entry = self._book.get(name)
        if not entry.undecided or entry.driver == driver or entry.driver not in self._drivers:
            return False
        if name in self._shown or name in self._reserved or self._of(name).snapshots(name):
            return False
        with self._reachable(name) as root:
            return content.is_untouched(root)

    def _move(self, name: str, driver: str) -> None:
        """Let another driver make an empty volume anew; where it cannot, the volume stays."""
        old, new = self._of(name), self.driver(driver)
        with self._book.operation("move", old.capabilities.name, name, to=driver):
            try:
                new.create(name, {})
            except LazaretteError as refused:
                _log.warning("volume %s stays with its driver: %s", name, refused)
                new.remove(name)
                return
            steps.reached("volume.move.made")
            self._book.set_driver(name, driver)
            steps.reached("volume.move.recorded")
            old.remove(name)

    def _chosen(self, driver: str, options: Mapping[str, str]) -> VolumeDriver:
        """The driver to make a volume with; Docker's local driver takes its kind as options.

        Raises:
            Unsupported: the local driver's options ask for a network filesystem.
        """
        kind = options.get("type", "")
        if driver not in ("", "local") or not {"type", "o", "device"} & set(options):
            return self.driver(driver)
        if kind == "tmpfs":
            return self.driver("tmpfs")
        if kind in ("", "none", "bind"):
            return self.driver("bind")
        raise Unsupported(
            f'the volume type "{kind}" is not supported', hint="mount it and bind the folder"
        )

    def _same(self, name: str, driver: str, options: Mapping[str, str]) -> Volume | None:
        try:
            existing = self.get(name)
        except VolumeNotFound:
            return None
        try:
            other = self.driver(driver).capabilities.name if driver not in ("", "local") else None
        except NotFound:
            other = driver  # whether there is such a driver does not matter: the name is taken
        if other is not None and other != existing.driver:
            raise WrongDriver(
                f"create {name}: a volume of that name exists with the driver {existing.driver}"
            )
        if options and dict(options) != dict(existing.options):
            raise WrongDriver(f"create {name}: a volume of that name exists with other options")
        return existing

    def _add(
        self,
        name: str,
        driver: str,
        options: Mapping[str, str],
        labels: Mapping[str, str],
        anonymous: bool,
        undecided: bool = False,
    ) -> None:
        now = self._clock.now_ns()
        self._book.add(Entry(name, driver, dict(options), dict(labels), now, anonymous, undecided))

    def remove(self, name: str, force: bool = False) -> None:
        """Delete a volume with its snapshots.

        Args:
            name: the volume.
            force: a volume that does not exist is no fault.

        Raises:
            VolumeNotFound: there is none.
            InUse: somebody has it mounted; ``force`` changes nothing about that.
        """
        with self._held(name):
            try:
                volume = self.get(name)
            except VolumeNotFound:
                if force:
                    return
                raise
            self.require_free(name)
            if volume.users:
                raise InUse(
                    f"remove {name}: volume is in use - [{', '.join(volume.users)}]",
                    hint="remove the containers that use it first",
                )
            with self._book.operation("remove", volume.driver, name):
                self.driver(volume.driver).remove(name)
                steps.reached("volume.remove.removed")
                self._book.forget(name)

    def rename(self, name: str, new: str) -> Volume:
        """Give a volume another name, mounted or not.

        Raises:
            NameTaken: a volume of the new name exists.
        """
        check_name(new)
        with self._held(name, new):
            volume = self.get(name)
            if name == new:
                return volume
            if self._book.has(new):
                raise NameTaken(f"rename {name}: a volume {new} exists already")
            with self._book.operation("rename", volume.driver, name, new=new):
                self.driver(volume.driver).rename(name, new)
                steps.reached("volume.rename.renamed")
                self._book.rename(name, new)
        return self.get(new)

    def prune(
        self, keep: Sequence[str] = (), *, all_volumes: bool = False, dry_run: bool = False
    ) -> Pruned:
        """Remove volumes nobody uses: the anonymous ones, or with ``all_volumes`` every one.

        Args:
            keep: names to leave alone (referred to by stopped containers, labels, policies).
            all_volumes: named ones too.
            dry_run: only say which.
        """
        names: list[str] = []
        reclaimed = 0
        for volume in self.list():
            if volume.users or volume.name in keep or not (volume.anonymous or all_volumes):
                continue
            with self._held(volume.name):
                size = self.usage(volume.name).referenced
                if not dry_run:
                    try:
                        self.remove(volume.name, force=True)
                    except InUse:
                        continue
            names.append(volume.name)
            reclaimed += size
        return Pruned(tuple(names), reclaimed)

    # ---- mounts

    def mount(self, name: str, user: str) -> Path:
        """Mount a volume for a user; repeating it with one id counts once (case A35).

        Raises:
            InUse: it is reserved for somebody else.
        """
        with self._held(name):
            driver = self._of(name)
            self.require_free(name, user)
            self._book.add_user(name, user)
            try:
                root = driver.mount(name)
            except BaseException:
                self._book.drop_user(name, user)
                raise
            return self._shown.get(name, root)

    def redirect(self, name: str, shown: Path | None) -> None:
        """Give users of a volume another folder than its root from now on (None: its root).

        For a filesystem that stands before a volume, as while it is filled from a backup;
        not remembered over a restart.
        """
        with self._guard:
            if shown is None:
                self._shown.pop(name, None)
            else:
                self._shown[name] = shown

    def reserve(self, name: str, user: str, why: str) -> None:
        """Let nobody but ``user`` mount, remove or set back a volume until :meth:`release`.

        Those who have it mounted keep it.  Not remembered over a restart.

        Args:
            name: the volume.
            user: who may.
            why: told to the others.

        Raises:
            InUse: it is reserved for somebody else.
        """
        with self._held(name):
            self.require_free(name, user)
            self._reserved[name] = (user, why)

    def release(self, name: str) -> None:
        """Undo :meth:`reserve`."""
        self._reserved.pop(name, None)

    def require_free(self, name: str, user: str = "") -> None:
        """Refuse a volume that is reserved for somebody else.

        Raises:
            InUse: it is.
        """
        holder, why = self._reserved.get(name, (user, ""))
        if holder != user:
            raise InUse(f"volume {name} cannot be used now: {why}")

    def unmount(self, name: str, user: str) -> None:
        """Let a user go; the volume is unmounted with the last one."""
        with self._held(name):
            if not self._book.has(name):
                return
            self._book.drop_user(name, user)
            if not self._book.users(name):
                self._of(name).unmount(name)

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """Space a volume takes."""
        return self._of(name).usage(name)
