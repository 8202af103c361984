"""Commands for images and registries."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import click
import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.runtime.cli.failures import failure
from lazarette.runtime.images.credentials import HUB_KEY, Credentials, DockerConfig
from lazarette.storage.errors import InternalError

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon


class TransferFailed(InternalError):
    """The daemon told, amid its progress, that a pull, push, load or build failed."""

    number = 375
    exit_code = 54


def _show_stream(lines: Iterable[object], quiet: bool, as_json: bool = False) -> None:
    """Print a progress stream, as it is with ``as_json``; an error in it is raised."""
    for line in cast(Iterable[dict[str, object]], lines):
        if "error" in line:
            raise TransferFailed(str(line["error"]), hint=str(line.get("hint", "")))
        if as_json:
            click.echo(msgspec.json.encode(line).decode())
        elif quiet:
            continue
        elif "stream" in line:
            click.echo(str(line["stream"]), nl=False)
        elif line.get("status") and not line.get("progressDetail"):
            where = f"{line['id']}: " if line.get("id") else ""
            click.echo(f"{where}{line['status']}")


def pull_image(daemon: Daemon, reference: str, *, quiet: bool, as_json: bool = False) -> None:
    """Pull an image, showing progress.

    Raises:
        InternalError: the registry has no such image, or refused.
    """
    name, tag = reference, None
    if "@" not in reference and ":" not in reference.rpartition("/")[2]:
        tag = "latest"
    _show_stream(daemon.pull(name, tag=tag, stream=True, decode=True), quiet, as_json)


@click.command("pull")
@click.option("-q", "--quiet", is_flag=True)
@click.argument("reference")
@json_option
@pass_session
def pull(session: Session, reference: str, quiet: bool, as_json: bool) -> None:
    """Fetch an image from a registry."""
    pull_image(session.daemon, reference, quiet=quiet, as_json=as_json)


@click.command("push")
@click.option("-q", "--quiet", is_flag=True)
@click.argument("reference")
@json_option
@pass_session
def push(session: Session, reference: str, quiet: bool, as_json: bool) -> None:
    """Send an image to a registry."""
    _show_stream(session.daemon.push(reference, stream=True, decode=True), quiet, as_json)


@click.command("images")
@click.option("-a", "--all", "everything", is_flag=True)
@click.option("-q", "--quiet", is_flag=True)
@json_option
@pass_session
def images(session: Session, everything: bool, quiet: bool, as_json: bool) -> None:
    """List images."""
    found = cast(list[Json], session.daemon.images(all=everything))
    if as_json:
        output.write_json(found)
    elif quiet:
        for one in found:
            click.echo(str(one["Id"]).removeprefix("sha256:")[:12])
    else:
        rows = []
        for one in found:
            for tag in cast(list[str], one["RepoTags"]) or ["<none>:<none>"]:
                name, _, label = tag.rpartition(":")
                rows.append(
                    (
                        name,
                        label,
                        str(one["Id"]).removeprefix("sha256:")[:12],
                        output.size_text(cast(int, one["Size"])),
                    )
                )
        output.write_table(("REPOSITORY", "TAG", "IMAGE ID", "SIZE"), rows)


@click.command("rmi")
@click.option("-f", "--force", is_flag=True)
@click.argument("references", nargs=-1, required=True)
@json_option
@pass_session
def rmi(session: Session, references: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove images."""
    gone = [
        (kind, str(name))
        for reference in references
        for line in session.daemon.remove_image(reference, force=force)
        for kind, name in line.items()
    ]
    output.answer(
        as_json, [{kind: name} for kind, name in gone], *(f"{kind}: {name}" for kind, name in gone)
    )


@click.command("tag")
@click.argument("source")
@click.argument("target")
@json_option
@pass_session
def tag(session: Session, source: str, target: str, as_json: bool) -> None:
    """Give an image another name."""
    name, colon, label = target.rpartition(":")
    if not colon or "/" in label:
        name, label = target, "latest"
    session.daemon.tag(source, name, label)
    output.answer(as_json, {"name": f"{name}:{label}"})


@click.command("load")
@click.option("-i", "--input", "path", default="-", help="File; - for standard input.")
@click.option("-q", "--quiet", is_flag=True)
@json_option
@pass_session
def load(session: Session, path: str, quiet: bool, as_json: bool) -> None:
    """Load images from an archive."""
    with click.open_file(path, "rb") as source:
        _show_stream(session.daemon.load_image(source, quiet=quiet), False, as_json)


@click.command("save")
@click.option("-o", "--output", "path", default="-", help="File; - for standard output.")
@click.argument("reference")
@pass_session
def save(session: Session, reference: str, path: str) -> None:
    """Write an image as an archive."""
    with click.open_file(path, "wb") as out:
        for chunk in session.daemon.get_image(reference):
            out.write(chunk)


@click.command("import")
@click.option("-c", "--change", "changes", multiple=True, help="A Dockerfile instruction.")
@click.argument("path")
@click.argument("reference", required=False)
@json_option
@pass_session
def import_(
    session: Session, path: str, reference: str | None, changes: tuple[str, ...], as_json: bool
) -> None:
    """Make an image of a root filesystem tar."""
    name, _, label = (reference or "").partition(":")
    query: list[tuple[str, str]] = [("fromSrc", "-"), ("repo", name), ("tag", label)]
    query += [("changes", change) for change in changes]
    daemon = session.daemon
    source = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    with (
        source,
        daemon.post(
            f"{daemon.base_url}/v{daemon.api_version}/images/create",
            params=query,
            data=source,
            stream=True,
        ) as answer,
    ):
        if answer.status_code >= 400:
            raise failure(answer.content, answer.status_code)
        lines = (jsontext.decode(line) for line in answer.iter_lines() if line)
        _show_stream(lines, False, as_json)


@click.command("history")
@click.argument("reference")
@json_option
@pass_session
def history(session: Session, reference: str, as_json: bool) -> None:
    """Show how an image was made."""
    found = session.daemon.history(reference)
    if as_json:
        output.write_json(found)
    else:
        output.write_table(
            ("IMAGE", "CREATED BY", "SIZE"),
            [
                (
                    str(one["Id"]).removeprefix("sha256:")[:12],
                    str(one["CreatedBy"])[:60],
                    output.size_text(int(one["Size"])),
                )
                for one in found
            ],
        )


@click.command("commit")
@click.option("-a", "--author", default="")
@click.option("-m", "--message", default="")
@click.option("-c", "--change", "changes", multiple=True)
@click.argument("container")
@click.argument("reference", required=False)
@json_option
@pass_session
def commit(
    session: Session,
    container: str,
    reference: str | None,
    author: str,
    message: str,
    changes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make an image of a container."""
    name, _, label = (reference or "").partition(":")
    made = session.daemon.commit(
        container, name or None, label or None, message, author, changes=list(changes)
    )
    output.answer(as_json, {"id": made["Id"]}, str(made["Id"]))


@click.command("login")
@click.option("-u", "--username", required=True)
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.argument("registry", default="")
@json_option
@pass_session
def login(
    session: Session, registry: str, username: str, password_stdin: bool, as_json: bool
) -> None:
    """Check credentials of a registry and keep them where docker keeps its own."""
    password = (
        sys.stdin.readline().rstrip("\n")
        if password_stdin
        else click.prompt("Password", hide_input=True)
    )
    told = cast(
        Json, session.daemon.login(username, password, registry=registry or None, reauth=True)
    )
    token = str(told.get("IdentityToken") or "")
    kept = Credentials(username=username, password="" if token else password, identitytoken=token)
    DockerConfig().store(registry, kept)
    output.answer(as_json, {"status": "Login Succeeded"}, "Login Succeeded")


@click.command("logout")
@click.argument("registry", default="")
@json_option
def logout(registry: str, as_json: bool) -> None:
    """Forget the credentials of a registry."""
    removed = DockerConfig().erase(registry)
    where = registry or HUB_KEY
    told = f"Removing login credentials for {where}" if removed else f"Not logged in to {where}"
    output.answer(as_json, {"removed": removed}, told)


COMMANDS = (pull, push, images, rmi, tag, load, save, import_, history, commit, login, logout)
