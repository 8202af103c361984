"""Commands for containers: run, create, ps, logs, exec, stop and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import click

from lazarette.runtime.cli import output, terminal
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session
from lazarette.runtime.cli.creation import create_options, make
from lazarette.storage.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon


@click.command(
    "create", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False}
)
@create_options
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@json_option
@pass_session
def create(
    session: Session, /, image: str, command: tuple[str, ...], as_json: bool, **given: object
) -> None:
    """Make a container without starting it."""
    made = make(session.daemon, image, command, given, attach=False)
    output.answer(as_json, {"id": made}, made)


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Do not wait for it.")
@create_options
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@json_option
@pass_session
def run(
    session: Session,
    /,
    detach: bool,
    image: str,
    command: tuple[str, ...],
    as_json: bool,
    **given: object,
) -> int:
    """Make and start a container."""
    daemon = session.daemon
    container = make(daemon, image, command, given, attach=not detach)
    if detach:
        daemon.start(container)
        output.answer(as_json, {"id": container}, container)
        return 0
    return terminal.run_attached(
        daemon,
        container,
        stdin=bool(given["interactive"]),
        tty=bool(given["tty"]),
        removed=bool(given["remove"]),
    )


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Stopped ones too.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("-f", "--filter", "filters", multiple=True, help="KEY=VALUE")
@json_option
@pass_session
def ps(
    session: Session, everything: bool, quiet: bool, filters: tuple[str, ...], as_json: bool
) -> None:
    """List containers."""
    wanted: dict[str, list[str]] = {}
    for item in filters:
        key, _, value = item.partition("=")
        wanted.setdefault(key, []).append(value)
    found = cast(list[Json], session.daemon.containers(all=everything, filters=wanted or None))
    if as_json:
        output.write_json(found)
    elif quiet:
        for one in found:
            click.echo(str(one["Id"])[:12])
    else:
        output.write_table(
            ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"),
            [
                (
                    str(one["Id"])[:12],
                    str(one["Image"]),
                    str(one["Command"])[:20],
                    _when(cast(int, one["Created"])),
                    str(one["Status"]),
                    _ports(one),
                    ", ".join(name.lstrip("/") for name in cast(list[str], one["Names"])),
                )
                for one in found
            ],
        )


def _when(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%SZ}"


def _ports(container: Json) -> str:
    shown = []
    for port in cast(list[dict[str, object]], container.get("Ports") or []):
        inside = f"{port['PrivatePort']}/{port['Type']}"
        outside = f"{port['IP']}:{port['PublicPort']}->" if port.get("PublicPort") else ""
        shown.append(outside + inside)
    return ", ".join(shown)


@click.command("logs")
@click.option("-f", "--follow", is_flag=True)
@click.option("-t", "--timestamps", is_flag=True)
@click.option("-n", "--tail", default="all", help="Lines from the end.")
@click.argument("container")
@pass_session
def logs(session: Session, container: str, follow: bool, timestamps: bool, tail: str) -> None:
    """Show what a container wrote."""
    terminal.copy_output(
        session.daemon.logs(
            container,
            stream=True,
            follow=follow,
            timestamps=timestamps,
            tail="all" if tail == "all" else int(tail),
        )
    )


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True)
@click.option("-i", "--interactive", is_flag=True)
@click.option("-t", "--tty", is_flag=True)
@click.option("-e", "--env", multiple=True)
@click.option("-u", "--user", default="")
@click.option("-w", "--workdir", default=None)
@click.option("--privileged", is_flag=True)
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_session
def exec_(
    session: Session,
    container: str,
    command: tuple[str, ...],
    detach: bool,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    user: str,
    workdir: str | None,
    privileged: bool,
) -> int:
    """Run a command in a running container."""
    daemon = session.daemon
    made = daemon.exec_create(
        container,
        list(command),
        stdin=interactive,
        tty=tty,
        environment=list(env),
        user=user,
        workdir=workdir,
        privileged=privileged,
    )
    if detach:
        daemon.exec_start(made["Id"], detach=True)
        return 0
    return terminal.run_exec(daemon, str(made["Id"]), stdin=interactive, tty=tty)


def _each(names: Sequence[str], act: Callable[[str], object], as_json: bool) -> None:
    for name in names:
        act(name)
    output.answer(as_json, {"names": list(names)}, *names)


@click.command("start")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def start(session: Session, containers: tuple[str, ...], as_json: bool) -> None:
    """Start stopped containers."""
    _each(containers, session.daemon.start, as_json)


@click.command("stop")
@click.option("-t", "--timeout", type=int, default=None, help="Seconds until SIGKILL.")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def stop(session: Session, containers: tuple[str, ...], timeout: int | None, as_json: bool) -> None:
    """Stop containers: their stop signal, then SIGKILL after the timeout."""
    _each(containers, lambda name: session.daemon.stop(name, timeout=timeout), as_json)


@click.command("restart")
@click.option("-t", "--timeout", type=int, default=10)
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def restart(session: Session, containers: tuple[str, ...], timeout: int, as_json: bool) -> None:
    """Stop and start containers."""
    _each(containers, lambda name: session.daemon.restart(name, timeout=timeout), as_json)


@click.command("kill")
@click.option("-s", "--signal", "signal_", default="KILL")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def kill(session: Session, containers: tuple[str, ...], signal_: str, as_json: bool) -> None:
    """Send a signal to containers."""
    _each(containers, lambda name: session.daemon.kill(name, signal_), as_json)


@click.command("pause")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def pause(session: Session, containers: tuple[str, ...], as_json: bool) -> None:
    """Freeze containers."""
    _each(containers, session.daemon.pause, as_json)


@click.command("unpause")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def unpause(session: Session, containers: tuple[str, ...], as_json: bool) -> None:
    """Let frozen containers go on."""
    _each(containers, session.daemon.unpause, as_json)


@click.command("rm")
@click.option("-f", "--force", is_flag=True, help="Kill it first if it runs.")
@click.option("-v", "--volumes", is_flag=True, help="Its anonymous volumes too.")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def rm(
    session: Session, containers: tuple[str, ...], force: bool, volumes: bool, as_json: bool
) -> None:
    """Remove containers."""
    _each(
        containers,
        lambda name: session.daemon.remove_container(name, v=volumes, force=force),
        as_json,
    )


@click.command("wait")
@click.argument("containers", nargs=-1, required=True)
@json_option
@pass_session
def wait(session: Session, containers: tuple[str, ...], as_json: bool) -> None:
    """Wait for containers to end; print their exit codes."""
    codes = {name: int(session.daemon.wait(name)["StatusCode"]) for name in containers}
    output.answer(as_json, codes, *map(str, codes.values()))


@click.command("rename")
@click.argument("container")
@click.argument("name")
@json_option
@pass_session
def rename(session: Session, container: str, name: str, as_json: bool) -> None:
    """Give a container another name."""
    session.daemon.rename(container, name)
    output.answer(as_json, {"name": name})


@click.command("top")
@click.argument("container")
@json_option
@pass_session
def top(session: Session, container: str, as_json: bool) -> None:
    """Show a container's processes."""
    found = session.daemon.top(container)
    if as_json:
        output.write_json(found)
    else:
        output.write_table(found["Titles"], found["Processes"] or [])


@click.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_session
def inspect(session: Session, names: tuple[str, ...]) -> None:
    """Describe containers, images, volumes or networks in JSON."""
    output.write_json([_inspect_one(session.daemon, name) for name in names])


def _inspect_one(daemon: Daemon, name: str) -> object:
    import docker.errors

    for look in (
        daemon.inspect_container,
        daemon.inspect_image,
        daemon.inspect_volume,
        daemon.inspect_network,
    ):
        try:
            return look(name)
        except (docker.errors.NotFound, docker.errors.ImageNotFound):
            continue
    raise NotFound(f"no such object: {name}")


@click.command("cp")
@click.argument("source")
@click.argument("target")
@pass_session
def cp(session: Session, source: str, target: str) -> None:
    """Copy between a container and this machine: CONTAINER:PATH on one side, - for a tar."""
    from lazarette.runtime.cli.copying import copy_in, copy_out

    from_container, to_container = ":" in source, ":" in target
    if from_container == to_container:
        raise InvalidArgument("one side of cp must be CONTAINER:PATH")
    if from_container:
        name, _, path = source.partition(":")
        copy_out(session.daemon, name, path, target)
    else:
        name, _, path = target.partition(":")
        copy_in(session.daemon, source, name, path)


COMMANDS = (
    create,
    run,
    ps,
    logs,
    exec_,
    start,
    stop,
    restart,
    kill,
    pause,
    unpause,
    rm,
    wait,
    rename,
    top,
    inspect,
    cp,
)
