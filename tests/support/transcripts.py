"""Transcripts: commands with what they print, checked in and played again.

A file of lines: ``$ command`` is run by a shell; what follows is its standard output,
``! line`` its standard error, ``? N`` its exit code where that is not 0.  ``# text`` is a
comment, a blank line before a command is for people.  Everything that differs from run
to run is replaced by a word in angle brackets (:func:`plain`); runs of blanks become two,
so that the width of a column does not matter.  Lines of standard error are sorted, as
compose works on several things at once, and each is kept once.

``LAZ_TRANSCRIPTS_RECORD=HOST`` writes the files anew with what the engine at that address
prints: recorded with dockerd, they say what clients expect of any engine.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

RECORD = "LAZ_TRANSCRIPTS_RECORD"
_LONGEST_S = 120.0

_SPAN = r"(?:Less than a|About an?|\d+) (?:second|minute|hour|day|week|month|year)s?"
_PLAIN: tuple[tuple[str, str], ...] = (
    (r"\x1b\[[0-9;?]*[A-Za-z]", ""),
    # the docker command line's race between its archive and the daemon's refusal of it
    (r"time=\"[^\"]*\" level=error msg=\"Can't (?:add|close) .*\n", ""),
    (r"\b[0-9a-f]{64}\b", "<id>"),
    (r"\b[0-9a-f]{12}\b", "<id>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z| ?[+-]\d\d:?\d\d)?(?: UTC)?", "<time>"),
    (rf"Up {_SPAN}", "Up <span>"),
    (rf"{_SPAN} ago", "<span> ago"),
    (r"\b172\.\d+\.\d+\.\d+\b", "<address>"),
    (r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", "<mac>"),
    (r"(?<=:)(?:3276[89]|327[7-9]\d|32[89]\d\d|3[3-9]\d{3}|[45]\d{4}|6[0-5]\d{3})\b", "<port>"),
    (r"\b\d+(?:\.\d+)?(?:B|kB|MB|GB)\b", "<size>"),
    (r"\b\d+\.\d+s\b", "<seconds>"),
    (r"\b(?:runc|crun) create failed", "<runtime> create failed"),
    (r"[ \t]{2,}|\t", "  "),
)


@dataclass
class Step:
    """One command and what it did.

    Attributes:
        comment: lines before it, as they are.
    """

    command: str
    comment: list[str] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    code: int = 0

    def lines(self) -> list[str]:
        """It as it stands in a file."""
        code = [f"? {self.code}"] if self.code else []
        return [*self.comment, f"$ {self.command}", *self.out, *self.err, *code]


def plain(text: str) -> list[str]:
    """Its lines without what differs from run to run."""
    for pattern, word in _PLAIN:
        text = re.sub(pattern, word, text)
    return [line.rstrip() for line in text.replace("\r", "").splitlines() if line.strip()]


def read(text: str) -> list[Step]:
    """The steps of a file."""
    steps: list[Step] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append(Step(line[2:], comment))
            comment = []
        elif not line or line.startswith("# "):
            comment.append(line)
        elif line.startswith("? "):
            steps[-1].code = int(line[2:])
        else:
            (steps[-1].err if line.startswith("! ") else steps[-1].out).append(line)
    return steps


def play(step: Step, folder: Path, env: Mapping[str, str]) -> Step:
    """Run its command; what it did."""
    done = subprocess.run(
        ["sh", "-c", step.command],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=_LONGEST_S,
        check=False,
    )
    out = plain(done.stdout.decode(errors="replace"))
    err = {f"! {line}" for line in plain(done.stderr.decode(errors="replace"))}
    return Step(step.command, step.comment, out, sorted(err), done.returncode)


def play_all(file: Path, folder: Path, env: Mapping[str, str]) -> tuple[str, str]:
    """Play a file.

    Returns:
        What it should say and what it says.
    """
    wanted = read(file.read_text())
    said = [play(step, folder, env) for step in wanted]
    return _text(wanted), _text(said)


def _text(steps: list[Step]) -> str:
    return "".join(f"{line}\n" for step in steps for line in step.lines())
