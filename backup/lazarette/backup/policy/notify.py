"""Telling people: on failure, on recovery, when a backup is overdue; and dead-man pings.

Somebody is told when a state begins and once a day while it lasts, not at every run; what
was told is kept in the database, so a restart repeats nothing.  Messages go out through
Apprise (mail, chat, push: its URLs).  A *dead-man ping* is a URL fetched at the beginning
and end of each run; the service behind it raises the alarm when the pings stop, also when
this host is dead.

A message that cannot be delivered never fails a backup; it is returned as a warning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

import aiohttp

from lazarette.backup.policy.durations import format_duration
from lazarette.backup.policy.journal import Protection
from lazarette.backup.policy.model import Policy
from lazarette.backup.policy.outcome import Kind, Outcome, Result
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.state import State

_STEPS = (
    """
    CREATE TABLE policy_alerts (
        volume TEXT NOT NULL, trouble TEXT NOT NULL,
        since_ns INTEGER NOT NULL, told_ns INTEGER NOT NULL,
        PRIMARY KEY (volume, trouble)
    ) STRICT;
    """,
)
_AGAIN = 24 * 3600 * NANOSECONDS
_PING_TIMEOUT = 10.0
_PING_TRIES = 3
_MOST_LINES = 20


class Trouble(Enum):
    """What somebody is told of."""

    FAILING = "failing"
    SUSPICIOUS = "suspicious"
    OVERDUE = "overdue"
    DRILL = "drill failed"


@dataclass(frozen=True, slots=True)
class Message:
    """A message: its title, its text, and whether it is bad news."""

    title: str
    text: str
    bad: bool


class Notifier:
    """Sends messages and pings; one in a daemon.

    Args:
        state: the daemon's database.
        clock: for "once a day".
        host: this host's name, for the messages.
    """

    def __init__(self, state: State, clock: Clock, host: str) -> None:
        self._state = state
        self._clock = clock
        self._host = host
        state.migrate("policy_alerts", _STEPS)

    async def began(self, policy: Policy) -> list[str]:
        """A run of a policy begins."""
        return await self._ping(policy.tell.ping_start)

    async def ended(self, policy: Policy, volume: str, kind: Kind, outcome: Outcome) -> list[str]:
        """A run for one volume ended: tell what is new about it.

        Returns:
            One line for each message that could not be delivered.
        """
        bad = outcome.result is Result.FAILED
        ping = policy.tell.ping_failure if bad else policy.tell.ping_success
        trouble = Trouble.DRILL if kind is Kind.DRILL else Trouble.FAILING
        messages = [self._change(volume, trouble, bad, _run_text(kind, volume, outcome))]
        if kind is Kind.BACKUP and not bad:
            text = _run_text(kind, volume, outcome)
            messages.append(self._change(volume, Trouble.SUSPICIOUS, outcome.suspicious, text))
        results = await asyncio.gather(
            self._ping(ping), *(self._send(policy, message) for message in messages)
        )
        return [line for lines in results for line in lines]

    async def looked_at(self, policy: Policy, protection: Protection) -> list[str]:
        """A volume's state was looked at, as the daemon does every minute: is it overdue?"""
        if protection.rpo_ns is None:
            text = "there is no good backup"
        else:
            text = f"the last good backup is {format_duration(protection.rpo_ns)} old"
        text += f"; the target is {format_duration(protection.rpo_target_ns)}"
        message = self._change(protection.volume, Trouble.OVERDUE, protection.overdue, text)
        return await self._send(policy, message)

    def _change(self, volume: str, trouble: Trouble, bad: bool, text: str) -> Message | None:
        """The message that a state calls for, after what was told before."""
        now = self._clock.now_ns()
        row = self._state.row(
            "SELECT told_ns FROM policy_alerts WHERE volume = ? AND trouble = ?",
            (volume, trouble.value),
        )
        if not bad:
            if row is None:
                return None
            with self._state.write() as db:
                db.execute(
                    "DELETE FROM policy_alerts WHERE volume = ? AND trouble = ?",
                    (volume, trouble.value),
                )
            return Message(f"{volume} on {self._host}: no longer {trouble.value}", text, False)
        if row is not None and 0 <= now - int(row["told_ns"]) < _AGAIN:
            return None
        with self._state.write() as db:
            db.execute(
                "INSERT INTO policy_alerts VALUES (?, ?, ?, ?)"
                " ON CONFLICT (volume, trouble) DO UPDATE SET told_ns = excluded.told_ns",
                (volume, trouble.value, now, now),
            )
        return Message(f"{volume} on {self._host}: {trouble.value}", text, True)

    async def _send(self, policy: Policy, message: Message | None) -> list[str]:
        if message is None or not policy.tell.urls:
            return []
        return await send(policy.tell.urls, message)

    async def _ping(self, url: str) -> list[str]:
        if not url:
            return []
        problem = ""
        for attempt in range(_PING_TRIES):
            if attempt:
                await asyncio.sleep(attempt)
            problem = await _fetch(url)
            if not problem:
                return []
        return [f"cannot ping {urlsplit(url).hostname}: {problem}"]


async def send(urls: Sequence[str], message: Message) -> list[str]:
    """Send one message to each URL; a line for each that failed, without the URL's secrets."""
    # Apprise loads a hundred plugins at its first use: seconds, which the daemon has not
    return await asyncio.to_thread(_send_to_all, urls, message)


def _send_to_all(urls: Sequence[str], message: Message) -> list[str]:
    import apprise  # costs a daemon that tells nobody a third of a second at its start

    problems = []
    kind = apprise.NotifyType.FAILURE if message.bad else apprise.NotifyType.SUCCESS
    for url in urls:
        target = apprise.Apprise()
        if not target.add(url) or not target.notify(
            title=message.title, body=message.text, notify_type=kind
        ):
            problems.append(f"cannot notify through {url.partition(':')[0]}: {message.title}")
    return problems


async def _fetch(url: str) -> str:
    """What went wrong, or nothing."""
    timeout = aiohttp.ClientTimeout(total=_PING_TIMEOUT)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return "" if answer.status < 400 else f"status {answer.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as failed:
        return type(failed).__name__


def _run_text(kind: Kind, volume: str, outcome: Outcome) -> str:
    lines = [f"{kind.value} of {volume}: {outcome.result.value}"]
    if outcome.error:
        lines.append(outcome.error)
    lines += outcome.warnings[:_MOST_LINES]
    if len(outcome.warnings) > _MOST_LINES:
        lines.append(f"and {len(outcome.warnings) - _MOST_LINES} more warnings")
    return "\n".join(lines)
