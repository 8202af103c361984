"""``lazd``: the daemon.

Killed or stopped, it leaves containers, mounts and jobs as they are and finds them again
at its next start; ``--stop-containers`` or ``POST /lazarette/v1/shutdown`` ends them too.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
from aiohttp import web

from lazarette.runtime.api.http import Api, Call, Route, empty
from lazarette.runtime.api.routes import all_routes
from lazarette.runtime.api.server import TlsFiles, check_hosts, serve
from lazarette.runtime.config import (
    DEFAULT_DATA_ROOT,
    DEFAULT_EXEC_ROOT,
    DEFAULT_HOST,
    Config,
)
from lazarette.runtime.engine import Engine
from lazarette.runtime.protection.guardian import anything_held
from lazarette.runtime.protection.guarding import Guarding
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import Conflict, InvalidArgument, LazaretteError, NotRoot

log = logging.getLogger("lazarette")

_LOCK_S, _RELEASE_S = 1.0, 120.0
_RELEASING = b"releasing"
_CONFIG_KEYS = (
    *("volume_driver", "layer_driver", "runtime", "userns_remap", "bridge", "advertise_address"),
)
_CONFIG_PATHS = ("policy_file",)
_CONFIG_NUMBERS = ("parallel_backups", "safety_days", "store_patience")
_CONFIG_LISTS = ("etcd", "insecure_registries", "registry_mirrors", "labels")

_CONFIG_ALL = _CONFIG_KEYS + _CONFIG_PATHS + _CONFIG_NUMBERS + _CONFIG_LISTS


class AlreadyRunning(Conflict):
    """Another daemon holds the data root."""

    number = 373
    exit_code = 52


@click.command()
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    default=DEFAULT_DATA_ROOT,
    show_default=True,
    help="What survives a reboot.",
)
@click.option(
    "--exec-root",
    type=click.Path(path_type=Path),
    default=DEFAULT_EXEC_ROOT,
    show_default=True,
    help="What does not.",
)
@click.option("-H", "--host", "hosts", multiple=True, help="unix://PATH or tcp://HOST:PORT")
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="TOML file of settings.",
)
@click.option("--bridge", default=None, help="Name of the default bridge.")
@click.option("--etcd", multiple=True, help="URL of an etcd, for networks over several hosts.")
@click.option(
    "--userns-remap",
    default=None,
    metavar="default|USER[:GROUP]",
    help="Whose subordinate ids the users of containers are.",
)
@click.option("--advertise-address", default=None, help="Address other hosts reach this one at.")
@click.option("--tlscacert", default=None, help="Clients must have a certificate of this CA.")
@click.option("--tlscert", default=None)
@click.option("--tlskey", default=None)
@click.option("--stop-containers", is_flag=True, help="Stop the containers at the end.")
@click.option("--debug", is_flag=True)
@click.option("--release-holds", is_flag=True, hidden=True, help="Release what is held, and end.")
def lazd(
    data_root: Path,
    exec_root: Path,
    hosts: tuple[str, ...],
    config_file: Path | None,
    bridge: str | None,
    etcd: tuple[str, ...],
    userns_remap: str | None,
    advertise_address: str | None,
    tlscacert: str | None,
    tlscert: str | None,
    tlskey: str | None,
    stop_containers: bool,
    debug: bool,
    release_holds: bool,
) -> None:
    """The Lazarette daemon."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("botocore", "boto3", "urllib3", "asyncio", "apscheduler", "pyroute2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if os.geteuid() != 0:
        raise NotRoot("lazd needs root", hint="run it as root")
    config = Config(
        data_root=data_root.absolute(),
        exec_root=exec_root.absolute(),
        hosts=hosts or (DEFAULT_HOST,),
    )
    if config_file is not None:
        config = with_file(config, config_file)
    if bridge is not None:
        config = replace(config, bridge=bridge)
    if etcd:
        config = replace(config, etcd=etcd)
    if userns_remap is not None:
        config = replace(config, userns_remap=userns_remap)
    if advertise_address is not None:
        config = replace(config, advertise_address=advertise_address)
    tls = tls_files(tlscacert, tlscert, tlskey)
    check_hosts(config.hosts, tls)
    if release_holds:
        with _in_place_of_the_dead(config) as alone:
            if alone:
                asyncio.run(_release(config))
        return
    with _only_one(config.data_root):
        asyncio.run(_run(config, tls, stop_containers))


def tls_files(authority: str | None, certificate: str | None, key: str | None) -> TlsFiles | None:
    """The files of the TLS options; None when none is given.

    Raises:
        InvalidArgument: some are given and some are not: who asks for TLS gets no plain TCP.
    """
    if authority and certificate and key:
        return TlsFiles(Path(certificate), Path(key), Path(authority))
    if authority or certificate or key:
        raise InvalidArgument(
            "TLS needs --tlscacert, --tlscert and --tlskey",
            hint="clients must have a certificate of the authority in --tlscacert",
        )
    return None


def with_file(config: Config, path: Path) -> Config:
    """Settings of a TOML file over those of the command line's defaults.

    Raises:
        InvalidArgument: it cannot be read, or has an unknown key.
    """
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as bad:  # no UTF-8 and no TOML are ValueErrors
        raise InvalidArgument(f"config file {path} cannot be read: {bad}") from bad
    for key, value in given.items():
        if key in _CONFIG_KEYS and isinstance(value, str):
            config = replace(config, **{key: value})  # type: ignore[arg-type]
        elif key in _CONFIG_PATHS and isinstance(value, str):
            config = replace(config, **{key: Path(value)})  # type: ignore[arg-type]
        elif key in _CONFIG_NUMBERS and type(value) is int and value > 0:
            config = replace(config, **{key: value})  # type: ignore[arg-type]
        elif key in _CONFIG_LISTS and isinstance(value, list):
            config = replace(config, **{key: tuple(map(str, value))})  # type: ignore[arg-type]
        else:
            raise InvalidArgument(
                f"config file {path}: unknown key {key} or wrong type",
                hint=f"known keys: {', '.join(_CONFIG_ALL)}",
            )
    return config


@contextmanager
def _only_one(data_root: Path) -> Iterator[None]:
    """Hold the data root's lock; one that releases a dead daemon's holds is waited for."""
    lock = _lock_file(data_root)
    try:
        now = time.monotonic()
        impatient, patient = now + _LOCK_S, now + _RELEASE_S
        while not _locked(lock):
            now = time.monotonic()
            if now > (patient if os.pread(lock, 16, 0) == _RELEASING else impatient):
                raise AlreadyRunning(
                    f"another daemon uses {data_root}", hint="give this one its own --data-root"
                )
            time.sleep(0.05)
        os.ftruncate(lock, 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def _in_place_of_the_dead(config: Config) -> Iterator[bool]:
    """Hold the lock of a daemon that died; False when nothing is held (any more)."""
    lock = _lock_file(config.data_root)
    try:
        while held := anything_held(str(config.state_file)):
            if _locked(lock):
                os.pwrite(lock, _RELEASING, 0)
                break
            time.sleep(0.3)
        yield held
        if held:
            os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def _lock_file(data_root: Path) -> int:
    data_root.mkdir(parents=True, exist_ok=True, mode=0o711)
    return os.open(data_root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _releasing_command() -> list[str]:
    """This very daemon, as it was started, in the form that only releases."""
    program = [sys.executable, "-c", "from lazarette.runtime.daemon import main; main()"]
    return [*program, *sys.argv[1:], "--release-holds"]


async def _release(config: Config) -> None:
    engine = Engine(config, SystemClock())
    await engine.release()
    await engine.stop(shutdown=False)


async def _run(config: Config, tls: TlsFiles | None, stop_containers: bool) -> None:
    ended = asyncio.Event()
    shutdown = stop_containers

    async def end_all(call: Call) -> web.StreamResponse:
        nonlocal shutdown
        shutdown = True
        ended.set()
        return empty(202)

    engine = Engine(config, SystemClock())
    guarding = Guarding(config.state_file, _releasing_command(), config.data_root / "guardian.log")
    guarding.start()
    await engine.start()
    routes = [*all_routes(engine), Route("POST", "/lazarette/v1/shutdown", end_all)]
    server = await serve(config.hosts, Api(routes), tls)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    log.info("listening on %s", ", ".join(config.hosts))
    await ended.wait()
    try:
        guarding.stop()
        await server.close()
    finally:
        await engine.stop(shutdown)


def main() -> None:
    """Run the daemon; no traceback reaches a person."""
    try:
        lazd.main(standalone_mode=False)
    except click.ClickException as bad:
        bad.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except LazaretteError as error:
        sys.stderr.write(f"lazd: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        sys.exit(error.exit_code)
