"""How the command line speaks: tables, sizes, progress, JSON, one line for an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from rich.progress import Progress

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_NS = 1_000_000_000


def size_text(size: int) -> str:
    """A size in bytes for a person: ``1.5 GiB``."""
    value = float(size)
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def duration_text(ns: int) -> str:
    """A duration for a person: ``3.2 ms``, ``1.4 s``, ``2 min 5 s``."""
    if ns < _NS:
        return f"{ns / 1e6:.1f} ms"
    if ns < 60 * _NS:
        return f"{ns / _NS:.1f} s"
    minutes, rest = divmod(ns // _NS, 60)
    return f"{minutes} min {rest} s"


def printable(text: str) -> str:
    """Text without control characters, so that a file name cannot steer a terminal (A1)."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def name_text(name: bytes) -> str:
    """A file name for a person: undecodable and control bytes are escaped."""
    return printable(name.decode("utf-8", "backslashreplace"))


def write_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def answer(as_json: bool, value: object, *lines: str) -> None:
    """What a command answers: one JSON document, or its lines for a person."""
    if as_json:
        write_json(value)
        return
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def write_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], colours: Sequence[str] = ()
) -> None:
    """Columns padded to their widest cell, as docker prints them.

    Args:
        heads: names of the columns.
        rows: cells.
        colours: of each row, on a terminal only; empty for none.
    """
    lines = [list(heads), *[[printable(cell) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line, colour in zip_longest(lines, ["", *colours], fillvalue=""):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text = "   ".join(cells).rstrip()
        click.echo(click.style(text, fg=colour) if colour else text)


def write_error(message: str, hint: str) -> None:
    """One line for what failed, one for what to do next, on standard error."""
    sys.stderr.write(f"laz: {printable(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {printable(hint)}\n")


class Bar:
    """A progress bar with rate and time left; silent when nobody watches.

    Args:
        title: what is being done.
        quiet: never draw (``--json``).
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self._progress = None if quiet or not sys.stderr.isatty() else _progress()
        self._title = title

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.add_task(self._title, total=None)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, record: Mapping[str, object]) -> None:
        """Move to what a progress record says (``done`` and ``total`` bytes)."""
        done, total = record.get("done"), record.get("total")
        if self._progress is not None and isinstance(done, int) and isinstance(total, int):
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=done, total=max(total, done) or None)


def _progress() -> Progress:
    from rich.console import Console  # on use: most commands draw no bar
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
