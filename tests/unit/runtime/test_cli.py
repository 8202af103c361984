"""The command line as a whole: every command answers in JSON when asked."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from lazarette.runtime.cli import output
from lazarette.runtime.cli.main import LazyGroup, laz, run

STREAMS = {
    "logs",
    "exec",
    "cp",
    "save",
    "inspect",
    "mount",
    "cat",
    "dump",
    "volume export",
    "volume import",
    "volume inspect",
    "network inspect",
    "network connect",
    "network disconnect",
    "system dial-stdio",
}
"""Commands that answer with bytes or JSON anyway, or with nothing."""


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None, name
        if isinstance(found, click.Group):
            yield from commands(found, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", found


def test_every_command_has_json_and_a_help_text() -> None:
    assert isinstance(laz, LazyGroup)
    for name, command in commands(laz):
        assert command.help, name
        options = {option for one in command.params for option in one.opts}
        assert "--json" in options or name in STREAMS, name


def test_usage_error_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nosuchcommand"]) == 2
    assert "nosuchcommand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert output.size_text(size) == text


@pytest.mark.parametrize(
    ("ns", "text"), [(1_500_000, "1.5 ms"), (2_000_000_000, "2.0 s"), (125 * 10**9, "2 min 5 s")]
)
def test_durations(ns: int, text: str) -> None:
    assert output.duration_text(ns) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [(b"plain", "plain"), (b"a\nb", "a\\x0ab"), (b"\x1b[31m", "\\x1b[31m"), (b"\xff", "\\xff")],
)
def test_names_cannot_steer_a_terminal(name: bytes, text: str) -> None:
    assert output.name_text(name) == text


def test_an_interrupt_while_libraries_load_shows_no_traceback() -> None:
    program = """
import os, signal, sys
from lazarette.runtime.cli import entry

class Interrupting:
    def find_spec(self, name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == b""
