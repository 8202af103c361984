"""Commands for networks."""

from __future__ import annotations

from typing import cast

import click

from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Json, Session, json_option, pass_session


@click.group("network")
def network() -> None:
    """Networks between containers."""


@network.command("create")
@click.option("-d", "--driver", default="bridge")
@click.option("--subnet", "subnets", multiple=True)
@click.option("--gateway", default=None)
@click.option("--ip-range", default=None)
@click.option("--internal", is_flag=True, help="No way out.")
@click.option("--attachable", is_flag=True)
@click.option("--ipv6", is_flag=True)
@click.option("-o", "--opt", "options", multiple=True, help="NAME=VALUE")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@click.argument("name")
@json_option
@pass_session
def create(
    session: Session,
    name: str,
    driver: str,
    subnets: tuple[str, ...],
    gateway: str | None,
    ip_range: str | None,
    internal: bool,
    attachable: bool,
    ipv6: bool,
    options: tuple[str, ...],
    labels: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a network."""
    from docker.types import IPAMConfig, IPAMPool

    pools = [IPAMPool(subnet=subnet, gateway=gateway, iprange=ip_range) for subnet in subnets]
    made = session.daemon.create_network(
        name,
        driver,
        options=dict(item.split("=", 1) for item in options),
        ipam=IPAMConfig(pool_configs=pools) if pools else None,
        internal=internal,
        labels={k: v for k, _, v in (item.partition("=") for item in labels)},
        enable_ipv6=ipv6,
        attachable=attachable,
    )
    output.answer(as_json, {"id": made["Id"]}, str(made["Id"]))


@network.command("ls")
@click.option("-q", "--quiet", is_flag=True)
@json_option
@pass_session
def ls(session: Session, quiet: bool, as_json: bool) -> None:
    """List networks."""
    found = cast(list[Json], session.daemon.networks())
    if as_json:
        output.write_json(found)
    elif quiet:
        for one in found:
            click.echo(str(one["Id"])[:12])
    else:
        output.write_table(
            ("NETWORK ID", "NAME", "DRIVER", "SCOPE"),
            [
                (str(one["Id"])[:12], str(one["Name"]), str(one["Driver"]), str(one["Scope"]))
                for one in found
            ],
        )


@network.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_session
def inspect(session: Session, names: tuple[str, ...]) -> None:
    """Describe networks in JSON."""
    output.write_json([session.daemon.inspect_network(name) for name in names])


@network.command("rm")
@click.argument("names", nargs=-1, required=True)
@json_option
@pass_session
def rm(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Remove networks nobody uses."""
    for name in names:
        session.daemon.remove_network(name)
    output.answer(as_json, {"names": list(names)}, *names)


@network.command("prune")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def prune(session: Session, force: bool, as_json: bool) -> None:
    """Remove networks nobody uses."""
    if not force:
        click.confirm("Remove all networks that no container uses?", abort=True)
    gone = session.daemon.prune_networks()["NetworksDeleted"] or []
    output.answer(as_json, {"names": gone}, *gone)


@network.command("connect")
@click.option("--alias", "aliases", multiple=True)
@click.option("--ip", default=None)
@click.argument("network_name", metavar="NETWORK")
@click.argument("container")
@pass_session
def connect(
    session: Session, network_name: str, container: str, aliases: tuple[str, ...], ip: str | None
) -> None:
    """Put a container on a network."""
    session.daemon.connect_container_to_network(
        container, network_name, ipv4_address=ip, aliases=list(aliases) or None
    )


@network.command("disconnect")
@click.option("-f", "--force", is_flag=True)
@click.argument("network_name", metavar="NETWORK")
@click.argument("container")
@pass_session
def disconnect(session: Session, network_name: str, container: str, force: bool) -> None:
    """Take a container off a network."""
    session.daemon.disconnect_container_from_network(container, network_name, force=force)


COMMANDS = (network,)
