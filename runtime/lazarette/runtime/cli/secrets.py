"""Where the command line takes secrets from: the environment and files, never arguments."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from lazarette.backup.jobs.model import StoreAccess
from lazarette.storage.errors import InvalidArgument, NotFound

P = ParamSpec("P")
R = TypeVar("R")
KEY_FOLDER = "LAZ_KEYS"


def secret_options(command: Callable[P, R]) -> Callable[P, R]:
    """``--key-file`` and ``--kit``; a passphrase comes from ``LAZ_PASSPHRASE``."""
    command = click.option(
        "--key-file",
        type=click.Path(dir_okay=False),
        default=None,
        help="A key file; LAZ_PASSPHRASE holds a passphrase.",
    )(command)
    return click.option(
        "--kit",
        type=click.Path(dir_okay=False, allow_dash=True),
        default=None,
        help="A file with the recovery kit; - reads it from the terminal.",
    )(command)


def repository_option(command: Callable[..., R]) -> Callable[..., R]:
    """``--repo`` with :func:`secret_options`; the command gets them as ``access``."""

    @secret_options
    @click.option("--repo", "url", required=True, help="The repository's URL.")
    @functools.wraps(command)
    def with_access(
        *arguments: object, url: str, key_file: str | None, kit: str | None, **options: object
    ) -> R:
        return command(*arguments, access=store_access(url, key_file, kit), **options)

    return with_access


def store_access(url: str, key_file: str | None = None, kit: str | None = None) -> StoreAccess:
    """A store with its credentials (``AWS_*``) and, as far as one is given, a secret.

    A relative folder is one of the working directory of whoever types it.

    Raises:
        NotFound: a file does not exist.
        InvalidArgument: no store is named.
    """
    if not url:
        raise InvalidArgument("a repository's address cannot be empty")
    access = StoreAccess(
        url=url if "://" in url else os.path.abspath(url),
        access_key=os.environ.get("AWS_ACCESS_KEY_ID", ""),
        secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        session_token=os.environ.get("AWS_SESSION_TOKEN", ""),
    )
    from msgspec.structs import replace

    if kit is not None:
        return replace(access, key=_read(kit), key_kind="kit")
    if key_file is not None:
        from lazarette.backup.repository.keys import KeyFile

        return replace(access, key=KeyFile.read(key_file).secret.hex(), key_kind="file")
    if passphrase := os.environ.get("LAZ_PASSPHRASE", ""):
        return replace(access, key=passphrase, key_kind="passphrase")
    return access


def _read(path: str) -> str:
    if path == "-":
        if sys.stdin.isatty():
            click.echo("Type or paste the recovery kit, then an empty line and Ctrl-D:", err=True)
        return sys.stdin.read()
    try:
        return Path(path).read_text()
    except FileNotFoundError as gone:
        raise NotFound(f"recovery kit {path} does not exist") from gone


def key_folder() -> Path:
    """Where keys of repositories used without a daemon are kept."""
    given = os.environ.get(KEY_FOLDER)
    return Path(given) if given else Path.home() / ".config" / "lazarette" / "keys"
