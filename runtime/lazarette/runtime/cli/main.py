"""``laz``: the command line, thin over the daemon's API and the backup library."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import click

from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Session, default_host
from lazarette.storage.errors import EXIT_USAGE, LazaretteError

_MODULES = {
    "containers": (
        "create run ps logs exec start stop restart kill pause unpause rm wait rename top"
        " inspect cp"
    ),
    "images": "pull push images rmi tag load save import history commit login logout",
    "build": "build builder",
    "volumes": "volume",
    "networks": "network",
    "system": "info version events system shutdown",
    "backup": "backup restore",
    "branches": "branch",
    "repositories": "repo",
    "policies": "policy status",
    "recovery": "recover",
    "standby": "standby",
    "wal": "wal",
    "browse": "mount ls find cat dump diff",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for: most need few libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(_HOME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in _HOME:
            return None
        module = importlib.import_module(f"lazarette.runtime.cli.{_HOME[cmd_name]}")
        commands: tuple[click.Command, ...] = module.COMMANDS
        return next(one for one in commands if one.name == cmd_name)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-H", "--host", default=None, help="The daemon's address (LAZ_HOST, DOCKER_HOST).")
@click.version_option(package_name="lazarette")
@click.pass_context
def laz(context: click.Context, host: str | None) -> None:
    """Container volumes that protect themselves."""
    context.obj = Session(host or default_host())


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code; no traceback reaches a person."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line; its exit code."""
    try:
        code = laz.main(args=list(argv), prog_name="laz", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        output.write_error("interrupted", "")
        return 130
    except click.ClickException as bad:
        bad.show()
        return EXIT_USAGE
    except LazaretteError as error:
        output.write_error(error.message, error.hint)
        return error.exit_code
    except Exception as error:
        # On use: a command that went well, or without a daemon, does not need docker-py here.
        from lazarette.runtime.cli.failures import told

        known = told(error)
        if known is None:
            raise
        output.write_error(known.message, known.hint)
        return known.exit_code
    return code if isinstance(code, int) else 0
