"""Commands for containers: run, create, ps, logs, exec, stop and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import cast

import click
from docker.types import LogConfig
from docker.utils import parse_bytes, parse_env_file

from lazarette.runtime.cli import output, terminal
from lazarette.runtime.cli.client import Daemon, Json
from lazarette.runtime.cli.context import Session, json_option, pass_session
from lazarette.storage.errors import InvalidArgument, NotFound

_CREATE_OPTIONS = (
    click.option("--name", help="The container's name."),
    click.option("-v", "--volume", "binds", multiple=True, help="SOURCE:TARGET[:ro] or TARGET."),
    click.option("--mount", "mounts", multiple=True, help="type=volume,src=NAME,dst=PATH,…"),
    click.option("--tmpfs", multiple=True, help="PATH[:OPTIONS]"),
    click.option("-p", "--publish", multiple=True, help="[[IP:]HOST:]CONTAINER[/PROTO]"),
    click.option("-P", "--publish-all", is_flag=True, help="Publish all exposed ports."),
    click.option("-e", "--env", multiple=True, help="NAME=VALUE, or NAME to pass ours on."),
    click.option("--env-file", multiple=True, type=click.Path(exists=True, dir_okay=False)),
    click.option("-l", "--label", "labels", multiple=True, help="KEY[=VALUE]"),
    click.option("-u", "--user", default="", help="USER[:GROUP]"),
    click.option("-w", "--workdir", default="", help="Working folder."),
    click.option("-h", "--hostname", default="", help="Host name inside."),
    click.option("--entrypoint", default=None, help="Replaces the image's."),
    click.option("--network", default="", help="Network, or host, none, container:ID."),
    click.option("--network-alias", "aliases", multiple=True, help="Name on that network."),
    click.option("--add-host", "extra_hosts", multiple=True, help="NAME:ADDRESS"),
    click.option("--dns", multiple=True),
    click.option("--restart", default="", help="no, always, unless-stopped, on-failure[:N]"),
    click.option("--rm", "remove", is_flag=True, help="Remove it when it ends."),
    click.option("-i", "--interactive", is_flag=True, help="Keep standard input open."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.option("-m", "--memory", default="", help="Limit, e.g. 512m."),
    click.option("--cpus", type=float, default=None),
    click.option("--pids-limit", type=int, default=None),
    click.option("--shm-size", default="", help="Size of /dev/shm."),
    click.option("--stop-signal", default=""),
    click.option("--stop-timeout", type=int, default=None, help="Seconds until SIGKILL."),
    click.option("--cap-add", multiple=True),
    click.option("--cap-drop", multiple=True),
    click.option("--security-opt", multiple=True),
    click.option("--privileged", is_flag=True),
    click.option("--read-only", is_flag=True, help="Read-only root filesystem."),
    click.option("--init", "init", is_flag=True, help="Reap zombies with a small init."),
    click.option("--sysctl", "sysctls", multiple=True, help="KEY=VALUE"),
    click.option("--platform", default=""),
)


def _create_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(_CREATE_OPTIONS):
        command = option(command)
    return command


def _pairs(items: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def _environment(given: dict[str, object]) -> list[str]:
    import os

    found: list[str] = []
    for path in cast(tuple[str, ...], given["env_file"]):
        found += [f"{key}={value}" for key, value in parse_env_file(path).items()]
    for item in cast(tuple[str, ...], given["env"]):
        if "=" in item:
            found.append(item)
        elif item in os.environ:
            found.append(f"{item}={os.environ[item]}")
    return found


def _port(spec: str) -> tuple[str, list[dict[str, str]]]:
    rest, _, protocol = spec.partition("/")
    host, _, container = rest.rpartition(":")
    address, _, host_port = host.rpartition(":")
    return f"{container}/{protocol or 'tcp'}", [
        {"HostIp": address.strip("[]"), "HostPort": host_port}
    ]


def _mount(spec: str) -> dict[str, object]:
    given = _pairs(spec.split(","))
    flag = {"", "true", "1"}
    made: dict[str, object] = {
        "Type": given.get("type", "volume"),
        "Target": given.get("dst") or given.get("target") or given.get("destination") or "",
        "Source": given.get("src") or given.get("source") or "",
        "ReadOnly": ("ro" in given and given["ro"] in flag)
        or ("readonly" in given and given["readonly"] in flag),
    }
    if not made["Target"]:
        raise InvalidArgument(f"mount {spec} names no target", hint="add dst=PATH")
    options: dict[str, object] = {}
    if "volume-nocopy" in given:
        options["NoCopy"] = given["volume-nocopy"] in flag
    if "volume-subpath" in given:
        options["Subpath"] = given["volume-subpath"]
    if options:
        made["VolumeOptions"] = options
    return made


def _restart(spec: str) -> dict[str, object]:
    name, _, count = spec.partition(":")
    if count and not count.isdigit():
        raise InvalidArgument(f"restart policy {spec} has no number after the colon")
    return {"Name": name or "no", "MaximumRetryCount": int(count or 0)}


def _host_config(given: dict[str, object]) -> dict[str, object]:
    ports: dict[str, list[dict[str, str]]] = {}
    for spec in cast(tuple[str, ...], given["publish"]):
        port, bindings = _port(spec)
        ports.setdefault(port, []).extend(bindings)
    binds = [spec for spec in cast(tuple[str, ...], given["binds"]) if ":" in spec]
    cpus = cast(float | None, given["cpus"])
    made: dict[str, object] = {
        "Binds": binds,
        "Mounts": [_mount(spec) for spec in cast(tuple[str, ...], given["mounts"])],
        "Tmpfs": {
            path: options
            for path, _, options in (
                spec.partition(":") for spec in cast(tuple[str, ...], given["tmpfs"])
            )
        },
        "PortBindings": ports,
        "PublishAllPorts": given["publish_all"],
        "NetworkMode": given["network"] or "default",
        "ExtraHosts": list(cast(tuple[str, ...], given["extra_hosts"])),
        "Dns": list(cast(tuple[str, ...], given["dns"])),
        "RestartPolicy": _restart(str(given["restart"])),
        "AutoRemove": given["remove"],
        "Memory": parse_bytes(str(given["memory"])) if given["memory"] else 0,
        "NanoCpus": round(cpus * 1e9) if cpus else 0,
        "ShmSize": parse_bytes(str(given["shm_size"])) if given["shm_size"] else 0,
        "CapAdd": list(cast(tuple[str, ...], given["cap_add"])),
        "CapDrop": list(cast(tuple[str, ...], given["cap_drop"])),
        "SecurityOpt": list(cast(tuple[str, ...], given["security_opt"])),
        "Privileged": given["privileged"],
        "ReadonlyRootfs": given["read_only"],
        "Sysctls": _pairs(cast(tuple[str, ...], given["sysctls"])),
        "LogConfig": {"Type": LogConfig.types.JSON, "Config": {}},
    }
    if given["pids_limit"] is not None:
        made["PidsLimit"] = given["pids_limit"]
    if given["init"]:
        made["Init"] = True
    return made


def create_body(
    image: str, command: Sequence[str], given: dict[str, object], attach: bool
) -> dict[str, object]:
    """The body of ``POST /containers/create`` for a command line."""
    host = _host_config(given)
    anonymous = [spec for spec in cast(tuple[str, ...], given["binds"]) if ":" not in spec]
    ports = cast(dict[str, object], host["PortBindings"])
    body: dict[str, object] = {
        "Image": image,
        "Cmd": list(command) or None,
        "Env": _environment(given),
        "Labels": _pairs(cast(tuple[str, ...], given["labels"])),
        "User": given["user"],
        "WorkingDir": given["workdir"],
        "Hostname": given["hostname"],
        "Tty": given["tty"],
        "OpenStdin": given["interactive"],
        "StdinOnce": bool(given["interactive"]) and attach,
        "AttachStdin": bool(given["interactive"]) and attach,
        "AttachStdout": attach,
        "AttachStderr": attach,
        "ExposedPorts": {port: {} for port in ports},
        "Volumes": {path: {} for path in anonymous},
        "HostConfig": host,
    }
    if given["entrypoint"] is not None:
        body["Entrypoint"] = [given["entrypoint"]] if given["entrypoint"] else [""]
    if given["stop_signal"]:
        body["StopSignal"] = given["stop_signal"]
    if given["stop_timeout"] is not None:
        body["StopTimeout"] = given["stop_timeout"]
    if given["aliases"]:
        body["NetworkingConfig"] = {
            "EndpointsConfig": {
                str(given["network"]): {"Aliases": list(cast(tuple[str, ...], given["aliases"]))}
            }
        }
    return body


def _create(
    daemon: Daemon, image: str, command: Sequence[str], given: dict[str, object], attach: bool
) -> str:
    import docker.errors

    body = create_body(image, command, given, attach)
    name = cast(str | None, given["name"])
    try:
        made = daemon.create_container_from_config(body, name, given["platform"] or None)
    except docker.errors.ImageNotFound:
        from lazarette.runtime.cli.images import pull_image

        pull_image(daemon, image, quiet=False)
        made = daemon.create_container_from_config(body, name, given["platform"] or None)
    for warning in made.get("Warnings") or []:
        click.echo(f"WARNING: {warning}", err=True)
    return str(made["Id"])


@click.command(
    "create", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False}
)
@_create_options
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@json_option
@pass_session
def create(
    session: Session, /, image: str, command: tuple[str, ...], as_json: bool, **given: object
) -> None:
    """Make a container without starting it."""
    made = _create(session.daemon, image, command, given, attach=False)
    output.answer(as_json, {"id": made}, made)


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Do not wait for it.")
@_create_options
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
    container = _create(daemon, image, command, given, attach=not detach)
    if detach:
        try:
            daemon.start(container)
        except Exception:
            if given["remove"]:
                daemon.remove_container(container, force=True)
            raise
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
