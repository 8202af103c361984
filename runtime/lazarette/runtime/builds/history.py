"""The texts of an image's history, as Docker's builder writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from lazarette.runtime.images.model import Healthcheck

DEFAULT_SHELL = ("/bin/sh", "-c")


def quoted(words: Sequence[str]) -> str:
    """Go's ``%q`` of a list: ``["a" "b"]``."""
    return "[" + " ".join(json.dumps(word, ensure_ascii=False) for word in words) + "]"


def plain(words: Sequence[str]) -> str:
    """Go's ``%v`` of a list: ``[a b]``."""
    return "[" + " ".join(words) + "]"


def metadata(shell: Sequence[str], text: str) -> str:
    """A step that changes only the configuration."""
    return " ".join([*shell, "#(nop) ", text])


def transfer(shell: Sequence[str], word: str, digest: str, target: str) -> str:
    """COPY and ADD: what was copied by its digest, and where to."""
    return " ".join([*shell, f"#(nop) {word} {digest} in {target} "])


def run(args: Mapping[str, str], command: Sequence[str]) -> str:
    """RUN, with the declared build arguments it saw."""
    prefix = [f"|{len(args)}", *(f"{name}={value}" for name, value in args.items())] if args else []
    return " ".join([*prefix, *command])


def healthcheck(check: Healthcheck) -> str:
    """Go's ``%q`` of the structure."""
    times = (check.interval, check.timeout, check.start_period, check.start_interval)
    shown = " ".join(json.dumps(go_duration(value)) for value in times)
    retries = chr(check.retries)
    rune = repr(retries) if retries.isprintable() else f"'\\x{check.retries:02x}'"
    return f"HEALTHCHECK &{{{quoted(check.test or [])} {shown} {rune}}}"


def go_duration(ns: int) -> str:
    """Nanoseconds as Go prints a duration: ``1m30s``, ``1.5s``, ``0s``."""
    if ns == 0:
        return "0s"
    if ns < 1_000:
        return f"{ns}ns"
    if ns < 1_000_000:
        return f"{ns / 1_000:.9g}µs"
    if ns < 1_000_000_000:
        return f"{ns / 1_000_000:.12g}ms"
    minutes, rest = divmod(ns, 60_000_000_000)
    seconds = f"{rest / 1_000_000_000:.12g}s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
