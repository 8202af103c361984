"""The guardian: releases what a dead daemon holds.

A small process beside the daemon, run as a file with nothing but Python's library, so that it
starts in milliseconds and holds little memory::

    guardian.py PID STARTED DATABASE COMMAND…

It waits for the end of the daemon (process ``PID``, begun at ``STARTED`` clock ticks after boot).
Then it looks into the daemon's database: as long as anything is recorded as held (a gate, a pause,
a stop, a lock, a hook) it runs ``COMMAND``, which is the daemon in the form that does nothing but
release and end.  That one takes the daemon's lock, so it and a daemon started meanwhile never
release the same thing twice.
"""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import sys
import time

HELD = ("SELECT count(*) FROM container_gates", "SELECT count(*) FROM policy_holds")
AGAIN_S = 1.0
GIVE_UP_S = 3600.0
LONGEST_S = 120.0
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def anything_held(database: str) -> bool:
    """Whether the database records a hold; one that cannot be read may."""
    try:
        connection = sqlite3.connect(f"file:{database}?mode=rw", uri=True, timeout=5)
    except sqlite3.Error:
        return os.path.exists(database)
    try:
        return any(connection.execute(question).fetchone()[0] for question in HELD)
    except sqlite3.Error as failed:
        # a daemon that died before it made its tables held nothing
        return "no such table" not in str(failed)
    finally:
        connection.close()


def wait_for_end(pid: int, started: int) -> None:
    """Return when the process has ended, or was another one all along."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _started(pid) == started:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
    finally:
        os.close(handle)


def _started(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def release(database: str, command: list[str]) -> None:
    """Run the releasing command until nothing is held any more."""
    end = time.monotonic() + GIVE_UP_S
    while anything_held(database) and time.monotonic() < end:
        _run(command)
        if anything_held(database):
            time.sleep(AGAIN_S)


def _run(command: list[str]) -> None:
    """Run a program to its end, which comes after two minutes at the latest."""
    child = os.posix_spawn(command[0], command, os.environ, setsigdef=_IGNORED)
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(LONGEST_S * 1000):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        os.close(handle)


def main(arguments: list[str]) -> None:
    """Guard one daemon to its end; see the module's text."""
    pid, started, database = int(arguments[0]), int(arguments[1]), arguments[2]
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-900")
    except OSError:
        pass  # fewer rights: as likely to be ended as anybody
    wait_for_end(pid, started)
    release(database, arguments[3:])


if __name__ == "__main__":
    main(sys.argv[1:])
