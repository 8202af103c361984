"""The one place that starts other programs and waits for them.

Arguments are a list, never a shell line; a secret never goes into them (``ps`` shows
them to everybody) but into ``stdin`` or an inherited descriptor.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazarette.storage.errors import InternalError, MissingFeature


@dataclass(frozen=True)
class Finished:
    """A program that ended: its exit code (negative: killed by that signal) and output."""

    code: int
    stdout: bytes
    stderr: bytes


class CommandFailed(InternalError):
    """A helper program ended with a fault; ``finished`` has what it said."""

    number = 120

    def __init__(self, argv: Sequence[str], finished: Finished) -> None:
        said = finished.stderr.decode(errors="replace").strip() or f"exit code {finished.code}"
        super().__init__(f"{argv[0]} failed: {said.splitlines()[-1]}")
        self.finished = finished


Running = subprocess.Popen[bytes]
"""What :func:`spawn` gives."""


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: str | bytes | None = None,
    timeout: float | None = 60.0,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> Finished:
    """Run a program to its end.

    Args:
        argv: program and arguments.
        stdin: bytes it reads.
        env: its whole environment; ours when None.
        cwd: its folder.
        timeout: seconds until it is killed; None waits for ever.
        check: raise on a non-zero exit code.
        pass_fds: descriptors it inherits.

    Raises:
        MissingFeature: the program is not installed.
        CommandFailed: it ended with a fault and ``check`` is set, or it took too long.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            env=None if env is None else dict(env),
            cwd=cwd,
            timeout=timeout,
            check=False,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as gone:
        if gone.filename not in (argv[0], argv[0].encode()):
            raise
        raise MissingFeature(
            f"the program {argv[0]} is not installed", hint="run scripts/setup"
        ) from gone
    except subprocess.TimeoutExpired as slow:
        late = Finished(-9, slow.stdout or b"", f"no end after {timeout:g} s".encode())
        raise CommandFailed(argv, late) from slow
    finished = Finished(done.returncode, done.stdout, done.stderr)
    if check and finished.code != 0:
        raise CommandFailed(argv, finished)
    return finished


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | bytes | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a program and return at once; the caller reaps it.

    Streams are descriptors; None means the null device.

    Raises:
        MissingFeature: the program is not installed.
    """
    null = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            list(argv),
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=null if stdin is None else stdin,
            stdout=null if stdout is None else stdout,
            stderr=null if stderr is None else stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=new_session,
        )
    except FileNotFoundError as gone:
        raise MissingFeature(
            f"the program {argv[0]} is not installed", hint="run scripts/setup"
        ) from gone
