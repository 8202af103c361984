"""Holding the users of volumes still while their snapshot is taken.

Order of events (each hold is written down before it begins, see :mod:`.quiesce`)::

    commands before ──▶ pause or stop users, or open the profiles' sessions and locks
                    ──▶ the caller takes its snapshot (or reads, without one)
                    ──▶ everything is released, the last first, and commands after run

What the backup may be called (:class:`Consistency`) is decided from what really happened:
a session that broke, a container killed at its stop, a command that failed or a release by
the deadline make it less, never more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from lazarette.backup.policy.access import ContainerAccess, Session, User, in_stop_order
from lazarette.backup.policy.model import ConsistencyRule, HoldMode, Hook
from lazarette.backup.policy.outcome import Consistency
from lazarette.backup.policy.profiles import (
    HOOKS,
    CommandProfile,
    LockProfile,
    SessionProfile,
    profile_for,
)
from lazarette.backup.policy.quiesce import HOOK_TIMEOUT, Quiesced, Release, ReleaseKind
from lazarette.backup.policy.sqlitelock import SqliteLocks
from lazarette.storage.clock import Clock
from lazarette.storage.errors import LazaretteError

KILLED = 137


class HookFailed(LazaretteError):
    """A command before the backup failed; nothing was saved."""

    number = 264
    exit_code = 46


class ProfileFailed(LazaretteError):
    """A database could not be brought into a consistent state."""

    number = 265
    exit_code = 47


@dataclass
class Held:
    """What is held, for the one who takes the snapshot.

    Attributes:
        documents: what profiles leave with the backup, by name (``backup_label``).
        warnings: one line each.
        held_ns: how long writers were paused, stopped or locked; known at the end.
    """

    documents: dict[str, bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    held_ns: int = 0
    _application: bool = False
    _still: bool = False
    _blocks: bool = False
    _broken: bool = False

    def consistency(self, *, atomic: bool) -> Consistency:
        """What the backup may be called; ask after everything was released.

        Args:
            atomic: whether all volumes were snapshotted at one instant.
        """
        if self._broken:
            return Consistency.CRASH if atomic else Consistency.NONE
        if self._application and (atomic or self._still):
            return Consistency.APPLICATION
        return Consistency.CRASH if atomic or self._still else Consistency.NONE

    def degrade(self, why: str) -> None:
        """Something did not hold until the end."""
        self._broken = True
        self.warnings.append(why)


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """Seconds: how long a profile may take to begin, and how long anything is held at most."""

    begin: float = 120.0
    longest: float = 20.0


class Holder:
    """Holds and releases; one in a daemon.

    Args:
        access: the containers.
        quiesced: the record of holds.
        clock: to measure, and for locks.
        limits: how long.
    """

    def __init__(
        self,
        access: ContainerAccess,
        quiesced: Quiesced,
        clock: Clock,
        limits: HoldLimits | None = None,
    ) -> None:
        self._access = access
        self._quiesced = quiesced
        self._clock = clock
        self._limits = limits or HoldLimits()

    @asynccontextmanager
    async def still(
        self, run: int, volumes: Sequence[str], roots: Sequence[bytes], rule: ConsistencyRule
    ) -> AsyncIterator[Held]:
        """Hold the users of volumes while the block runs; release them at its end.

        Args:
            run: its number in the journal.
            volumes: their names; all are held at once.
            roots: their folders on the host, for locks.
            rule: of the policy.

        Raises:
            HookFailed: a command before failed; what it began is undone by those after.
            ProfileFailed: a database could not be made consistent.
        """
        held = Held()
        try:
            users = await self._access.users(volumes)
            await self._run_before(run, rule)
            began = self._clock.monotonic_ns()
            async with AsyncExitStack() as stack:
                await self._hold(run, users, roots, rule, held, stack)
                async with self._deadline(run, held, stack):
                    yield held
        finally:
            held.warnings += await asyncio.shield(self._quiesced.release(run, self._access))
        if held._blocks:
            held.held_ns = self._clock.monotonic_ns() - began

    async def _run_before(self, run: int, rule: ConsistencyRule) -> None:
        for hook in reversed(rule.after):
            self._quiesced.write_down(run, Release(ReleaseKind.HOOK, hook.container, hook.argv))
        for hook in rule.before:
            problem = await self._run_hook(hook)
            if problem:
                raise HookFailed(
                    f"the command {hook.argv[0]} before the backup failed: {problem}",
                    hint="nothing was saved; the commands after it were run",
                )

    async def _run_hook(self, hook: Hook) -> str:
        if hook.container:
            ended = await self._access.execute(hook.container, hook.argv, HOOK_TIMEOUT)
        else:
            ended = await self._access.execute_on_host(hook.argv, HOOK_TIMEOUT)
        return "" if ended.code == 0 else ended.last_words()

    async def _hold(
        self,
        run: int,
        users: Sequence[User],
        roots: Sequence[bytes],
        rule: ConsistencyRule,
        held: Held,
        stack: AsyncExitStack,
    ) -> None:
        if rule.mode is HoldMode.STOP:
            await self._stop(run, users, held)
        elif rule.mode is HoldMode.PAUSE:
            await self._pause(run, users, held)
        else:
            await self._open_profiles(run, users, roots, rule, held, stack)
        if rule.profile == HOOKS and rule.before:
            held._application = True

    async def _stop(self, run: int, users: Sequence[User], held: Held) -> None:
        held._application = held._still = held._blocks = True
        for user in in_stop_order(users):
            self._quiesced.write_down(run, Release(ReleaseKind.START, user.id))
            if await self._access.stop(user.id) == KILLED:
                held.degrade(f"{user.name} did not end by itself and was killed")

    async def _pause(self, run: int, users: Sequence[User], held: Held) -> None:
        held._still = held._blocks = True
        for user in users:
            if not user.paused:
                self._quiesced.write_down(run, Release(ReleaseKind.UNPAUSE, user.id))
        await asyncio.gather(*(self._access.pause(user.id) for user in users if not user.paused))

    async def _open_profiles(
        self,
        run: int,
        users: Sequence[User],
        roots: Sequence[bytes],
        rule: ConsistencyRule,
        held: Held,
        stack: AsyncExitStack,
    ) -> None:
        opened = 0
        for user in users:
            profile = profile_for(rule.profile, user)
            if isinstance(profile, SessionProfile):
                await stack.enter_async_context(self._in_session(profile, user, held))
            elif isinstance(profile, CommandProfile):
                await self._by_command(run, profile, user)
            elif isinstance(profile, LockProfile):
                await self._by_locks(roots, stack)
            opened += profile is not None
            held._blocks |= profile is not None and profile.blocks
        held._application = opened > 0 and opened == len(users)

    @asynccontextmanager
    async def _in_session(
        self, profile: SessionProfile, user: User, held: Held
    ) -> AsyncIterator[None]:
        session = await self._access.session(user.id, profile.argv)
        try:
            await self._tell(session, profile.begin, profile.ready, profile, user)
            yield
            try:
                said = await self._tell(session, profile.end, profile.done, profile, user)
            except LazaretteError as broke:
                held.degrade(broke.message)
            else:
                if profile.keeps:
                    held.documents[profile.keeps] = said
        finally:
            await session.close()

    async def _tell(
        self, session: Session, text: str, until: str, profile: SessionProfile, user: User
    ) -> bytes:
        """Send and read up to a line; the lines before it."""
        said = b""
        try:
            async with asyncio.timeout(self._limits.begin):
                await session.send(text.encode())
                while True:
                    line = await session.read_line()
                    if not line:
                        raise ProfileFailed(
                            f"the {profile.name} session in {user.name} ended early",
                            hint="look at the container's log, or use lazarette.consistency=crash",
                        )
                    if line.strip() == until.encode():
                        return said
                    said += line
        except TimeoutError:
            raise ProfileFailed(
                f"the {profile.name} session in {user.name} does not answer"
            ) from None

    async def _by_command(self, run: int, profile: CommandProfile, user: User) -> None:
        if profile.after:
            self._quiesced.write_down(run, Release(ReleaseKind.UNLOCK, user.id, profile.after))
        ended = await self._access.execute(user.id, profile.before, self._limits.begin)
        if ended.code != 0:
            raise ProfileFailed(
                f"the {profile.name} profile failed in {user.name}: {ended.last_words()}",
                hint="use lazarette.consistency=crash to do without",
            )

    async def _by_locks(self, roots: Sequence[bytes], stack: AsyncExitStack) -> None:
        for root in roots:
            locks = SqliteLocks(root, self._clock)
            await asyncio.to_thread(locks.__enter__)
            stack.callback(locks.release)

    @asynccontextmanager
    async def _deadline(self, run: int, held: Held, stack: AsyncExitStack) -> AsyncIterator[None]:
        """Release everything when the block takes too long, and let it go on without."""

        released: list[bool] = []

        async def release() -> None:
            await asyncio.sleep(self._limits.longest)
            released.append(True)
            held.degrade(f"released after {self._limits.longest:g} s, before it was done")
            await stack.aclose()
            held.warnings += await self._quiesced.release(run, self._access)

        watch = asyncio.get_running_loop().create_task(release())
        try:
            yield
        finally:
            if not released:  # once begun, a release is seen to its end
                watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
