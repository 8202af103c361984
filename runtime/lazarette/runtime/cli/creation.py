"""What a container of ``create`` and ``run`` is: their options as the API's request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import click

from lazarette.runtime.cli.context import parse_bytes
from lazarette.storage.errors import InvalidArgument

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon

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
    click.option("--userns", default="", help="host: its users are the host's."),
    click.option("--read-only", is_flag=True, help="Read-only root filesystem."),
    click.option("--init", "init", is_flag=True, help="Reap zombies with a small init."),
    click.option("--sysctl", "sysctls", multiple=True, help="KEY=VALUE"),
    click.option("--platform", default=""),
)


def create_options(command: click.decorators.FC) -> click.decorators.FC:
    """The options that ``create`` and ``run`` share."""
    for option in reversed(_CREATE_OPTIONS):
        command = option(command)
    return command


def _pairs(items: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def _environment(given: dict[str, object]) -> list[str]:
    import os

    from docker.utils import parse_env_file

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
    if count and not count.isdecimal():
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
        "UsernsMode": given["userns"],
        "ReadonlyRootfs": given["read_only"],
        "Sysctls": _pairs(cast(tuple[str, ...], given["sysctls"])),
        "LogConfig": {"Type": "json-file", "Config": {}},
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


def make(
    daemon: Daemon, image: str, command: Sequence[str], given: dict[str, object], attach: bool
) -> str:
    """Make a container, its image fetched if it is not here; its id."""
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
