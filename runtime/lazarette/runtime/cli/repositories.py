"""Commands for repositories: where backups live."""

from __future__ import annotations

import click
import msgspec

from lazarette.backup.jobs.model import CheckJob, ForgetJob
from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Session, json_option, pass_session
from lazarette.runtime.cli.secrets import secret_options, store_access
from lazarette.storage.errors import Unavailable

_MAINTENANCE = ("copy", "key", "lock", "migrate", "repair", "scrub", "stats")


class _RepoGroup(click.Group):
    """Imports the maintenance commands, which need the whole engine, when one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_MAINTENANCE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MAINTENANCE:
            return super().get_command(ctx, cmd_name)
        from lazarette.runtime.cli import maintenance

        return next(one for one in maintenance.COMMANDS if one.name == cmd_name)


@click.group("repo", cls=_RepoGroup)
def repo() -> None:
    """Repositories in a bucket or a folder."""


@repo.command("init")
@click.option("--name", default="", help="How the daemon calls it; default: default.")
@click.option("--no-daemon", is_flag=True, help="Do not tell a daemon of it.")
@click.option(
    "--lock-days",
    type=click.IntRange(1),
    default=None,
    help="Make the bucket with object lock: nobody can delete what is younger.",
)
@click.option("--kit-file", default=None, help="Write the recovery kit here, not to the screen.")
@secret_options
@json_option
@click.argument("url")
@pass_session
def init(
    session: Session,
    url: str,
    name: str,
    no_daemon: bool,
    lock_days: int | None,
    kit_file: str | None,
    key_file: str | None,
    kit: str | None,
    as_json: bool,
) -> None:
    """Make a repository; its recovery kit is printed once."""
    access = store_access(url, key_file, kit)
    if lock_days:
        from lazarette.runtime.cli import maintenance

        maintenance.make_locked(access, lock_days)
    if no_daemon:
        from lazarette.runtime.cli import local

        sheet = local.init(access)
        text, code = sheet.text(), sheet.qr_terminal()
    else:
        made = session.daemon.ask(
            "POST", "/repositories", {"access": msgspec.to_builtins(access), "name": name}
        )
        text, code = str(made["kit"]), str(made["qr"])
    if kit_file:
        with open(kit_file, "w", opener=_private) as out:
            out.write(text)
    if as_json:
        output.write_json({"url": access.url, "kit": None if kit_file else text})
    elif kit_file:
        click.echo(f"repository made; its recovery kit is in {kit_file}")
    else:
        click.echo(code)
        click.echo(text)
        click.echo(
            "Print this and keep it off this machine: without it and this host, "
            "nothing opens the repository.",
            err=True,
        )


def _private(path: str, flags: int) -> int:
    import os

    return os.open(path, flags | os.O_EXCL, 0o600)


@repo.command("ls")
@json_option
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the repositories the daemon knows."""
    found = session.daemon.ask_list("/repositories")
    if as_json:
        output.write_json(found)
    else:
        output.write_table(
            ("NAME", "ID", "URL"),
            [(str(one["name"]), str(one["id"])[:12], str(one["url"])) for one in found],
        )


@repo.command("add")
@click.option("--name", default="")
@secret_options
@click.argument("url")
@json_option
@pass_session
def add(
    session: Session, url: str, name: str, key_file: str | None, kit: str | None, as_json: bool
) -> None:
    """Let the daemon know an existing repository."""
    access = store_access(url, key_file, kit)
    made = session.daemon.ask(
        "POST",
        "/repositories",
        {"access": msgspec.to_builtins(access), "name": name, "mode": "adopt"},
    )
    output.answer(as_json, made, str(made["name"]))


@repo.command("rm")
@click.argument("name")
@json_option
@pass_session
def rm(session: Session, name: str, as_json: bool) -> None:
    """Let the daemon forget a repository; its bytes stay."""
    session.daemon.call("DELETE", f"/repositories/{name}")
    output.answer(as_json, {"name": name})


@repo.command("kit")
@click.argument("name", default="default")
@json_option
@pass_session
def kit(session: Session, name: str, as_json: bool) -> None:
    """Make one more recovery kit."""
    made = session.daemon.ask("POST", f"/repositories/{name}/kit")
    if as_json:
        output.write_json({"kit": made["kit"]})
        return
    click.echo(str(made["qr"]))
    click.echo(str(made["kit"]))


@repo.command("check")
@click.option("--read-data", default="0", help="Share of the data to read, e.g. 10% or 100%.")
@secret_options
@json_option
@click.argument("url")
def check(url: str, read_data: str, key_file: str | None, kit: str | None, as_json: bool) -> int:
    """Verify a repository: its structure, and as much of its data as asked."""
    from lazarette.runtime.cli import local

    share = float(read_data.rstrip("%")) / (100 if read_data.endswith("%") else 1)
    result = local.perform(CheckJob(share), store_access(url, key_file, kit), "check", as_json)
    if as_json:
        output.write_json(result)
    elif result.outcome == "ok":
        click.echo("no problem found")
    return local.finish(result)


@repo.command("prune")
@secret_options
@json_option
@click.argument("url")
def prune(url: str, key_file: str | None, kit: str | None, as_json: bool) -> int:
    """Free the space of forgotten snapshots."""
    from lazarette.runtime.cli import local

    result = local.perform(
        ForgetJob([], prune=True), store_access(url, key_file, kit), "prune", as_json
    )
    if as_json:
        output.write_json(result)
    return local.finish(result)


@repo.command("verify-store")
@json_option
@click.argument("url")
def verify_store(url: str, as_json: bool) -> int:
    """Try whether a bucket does all a repository needs, with objects of its own."""
    from lazarette.backup.stores.open import create_place
    from lazarette.backup.stores.verify import Verdict, verify

    access = store_access(url)
    from lazarette.backup.jobs.access import credentials

    store = create_place(access.url, credentials(access))
    try:
        found = verify(store)
    finally:
        store.close()
    if as_json:
        output.write_json([msgspec.to_builtins(one) for one in found])
    else:
        output.write_table(
            ("CHECK", "RESULT"),
            [
                (one.check.name, one.verdict.value + (f": {one.detail}" if one.detail else ""))
                for one in found
            ],
        )
    if any(one.verdict is Verdict.FAILED for one in found):
        raise Unavailable(f"{access.url} does not do all a repository needs")
    return 0


COMMANDS = (repo,)
