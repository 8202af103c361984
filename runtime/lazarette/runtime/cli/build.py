"""``laz build`` and ``laz builder``: images from Dockerfiles, and the cache behind them."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import click
import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.builds.context import Located, locate, pack, sent_along
from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.mounts import parse_size
from lazarette.runtime.builds.named import IMAGE
from lazarette.runtime.builds.output import unpack_tree
from lazarette.runtime.cli import output
from lazarette.runtime.cli.context import Session, json_option, pass_session
from lazarette.runtime.cli.failures import failure, unreachable
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.layers.tar import streamed

if TYPE_CHECKING:
    import requests

    from lazarette.runtime.cli.client import Daemon

_PIECE = 1 << 18
_REMOTE = re.compile(r"https?://|git://|git@|ssh://|github\.com/")
_STDIN = "-"


@click.command("build", context_settings={"help_option_names": ["--help"]})
@click.option("-t", "--tag", "tags", multiple=True, help="NAME[:TAG]")
@click.option("-f", "--file", "dockerfile", default="", help="The Dockerfile, - for stdin.")
@click.option("--build-arg", "args", multiple=True, help="NAME=VALUE, or NAME from here.")
@click.option("--label", "labels", multiple=True, help="NAME=VALUE")
@click.option("--target", default="", help="Stage to build.")
@click.option("--platform", default="", help="os/arch[/variant]")
@click.option("--no-cache", is_flag=True)
@click.option("--no-cache-filter", multiple=True, help="Stage built without cache.")
@click.option("--cache-from", multiple=True, help="Image whose history is the cache.")
@click.option("--pull", is_flag=True, help="Look for newer base images.")
@click.option("-q", "--quiet", is_flag=True, help="Only the image's id.")
@click.option("--squash", is_flag=True, help="One layer on the base.")
@click.option("--network", default="", help="Network of RUN.")
@click.option("--add-host", "hosts", multiple=True, help="NAME:ADDRESS")
@click.option("-m", "--memory", default="")
@click.option("--memory-swap", default="")
@click.option("--cpu-shares", type=int, default=None)
@click.option("--cpu-period", type=int, default=None)
@click.option("--cpu-quota", type=int, default=None)
@click.option("--cpuset-cpus", default="")
@click.option("--cpuset-mems", default="")
@click.option("--shm-size", default="")
@click.option("--ulimit", "ulimits", multiple=True, help="NAME=SOFT[:HARD]")
@click.option("--secret", "secrets", multiple=True, help="id=NAME[,src=FILE|,env=VARIABLE]")
@click.option("--ssh", "agents", multiple=True, help="default or NAME=SOCKET")
@click.option("--allow", multiple=True, help="network.host, security.insecure or device[=NAME]")
@click.option(
    "--build-context",
    "contexts",
    multiple=True,
    help="NAME=FOLDER, NAME=URL or NAME=docker-image://IMAGE",
)
@click.option("-o", "--output", "outputs", default="", help="Folder, or type=tar,dest=FILE")
@click.argument("context", default=".")
@json_option
@pass_session
def build(session: Session, /, context: str, outputs: str, as_json: bool, **given: object) -> None:
    """Make an image from a Dockerfile.

    CONTEXT is a folder, a git or http URL, or - for a tar or Dockerfile on standard input.
    """
    query = _query(given)
    daemon = session.daemon
    dockerfile = cast(str, given["dockerfile"])
    secrets = cast(Sequence[str], given["secrets"])
    agents = cast(Sequence[str], given["agents"])
    if secrets or agents:
        query.append(("session-secrets", _hand_over(daemon, secrets, agents)))
    quiet = bool(given["quiet"])
    contexts = _contexts(daemon, cast(Sequence[str], given["contexts"]))
    if contexts:
        query.append(("contexts", msgspec.json.encode(contexts).decode()))
    with ExitStack() as until:
        body, more = _body(context, dockerfile, until)
        image = _post(daemon, query + more, body, quiet, silent=as_json)
    if outputs:
        _write(daemon, image, _destination(outputs))
    if as_json:
        output.write_json({"id": image})


def _query(given: dict[str, object]) -> list[tuple[str, str]]:
    """The parameters of ``POST /build`` for the options."""
    found: list[tuple[str, str]] = []

    def texts(name: str) -> Sequence[str]:
        return cast(Sequence[str], given[name])

    found += [("t", tag) for tag in texts("tags")]
    found += [("extrahosts", host) for host in texts("hosts")]
    found += [("allow", one) for one in texts("allow")]
    found += [("nocachefilter", one) for one in texts("no_cache_filter")]
    for flag, key in (("no_cache", "nocache"), ("pull", "pull"), ("squash", "squash")):
        if given[flag]:
            found.append((key, "1"))
    if given["quiet"]:
        found.append(("q", "1"))
    for name, key in (
        ("target", "target"),
        ("platform", "platform"),
        ("network", "networkmode"),
        ("cpuset_cpus", "cpusetcpus"),
        ("cpuset_mems", "cpusetmems"),
        ("cpu_shares", "cpushares"),
        ("cpu_period", "cpuperiod"),
        ("cpu_quota", "cpuquota"),
    ):
        if given[name]:
            found.append((key, str(given[name])))
    for name, key in (("memory", "memory"), ("memory_swap", "memswap"), ("shm_size", "shmsize")):
        size = cast(str, given[name])
        if size:
            found.append((key, size if size == "-1" else str(parse_size(size))))
    tables: tuple[tuple[str, object], ...] = (
        ("buildargs", _arguments(texts("args"))),
        ("labels", dict(_pair(text) for text in texts("labels"))),
        ("cachefrom", list(texts("cache_from"))),
        ("ulimits", [_ulimit(text) for text in texts("ulimits")]),
    )
    found += [(key, msgspec.json.encode(table).decode()) for key, table in tables if table]
    return found


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _arguments(texts: Sequence[str]) -> dict[str, str | None]:
    """``NAME=VALUE``; a name alone has the value it has here."""
    found: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _ulimit(text: str) -> dict[str, object]:
    name, _, values = text.partition("=")
    soft, _, hard = values.partition(":")
    try:
        return {"Name": name, "Soft": int(soft), "Hard": int(hard or soft)}
    except ValueError as bad:
        raise InvalidArgument(f"invalid ulimit {text}: use NAME=SOFT[:HARD]") from bad


def _hand_over(daemon: Daemon, secrets: Sequence[str], agents: Sequence[str]) -> str:
    """Give secrets to the daemon beside the request; the token that names them."""
    body: dict[str, object] = {
        "secrets": dict(_secret(text) for text in secrets),
        "ssh": dict(_agent(text) for text in agents),
    }
    return str(daemon.ask("POST", "/builds/secrets", body)["session"])


def _contexts(daemon: Daemon, texts: Sequence[str]) -> dict[str, str]:
    """Values of named contexts for the daemon; folders are sent to it first."""
    found: dict[str, str] = {}
    for text in texts:
        name, value = _pair(text)
        if not name or not value:
            raise InvalidArgument(f"invalid build context {text}", hint="NAME=FOLDER or NAME=URL")
        remote = _REMOTE.match(value) or value.startswith(IMAGE)
        found[name] = value if remote else _sent(daemon, Path(value))
    return found


def _sent(daemon: Daemon, folder: Path) -> str:
    if not folder.is_dir():
        raise ContextError(f"build context {folder} is not a folder")
    with streamed(lambda out: pack(folder, out, None)) as stream:
        answer = daemon.request(
            "POST",
            f"{daemon.base_url}/lazarette/v1/builds/contexts",
            data=_pieces(stream),
            timeout=None,
        )
    with answer:
        if answer.status_code >= 400:
            raise failure(answer.content, answer.status_code)
        return str(jsontext.decode(answer.content, type=dict[str, str])["context"])


def _secret(text: str) -> tuple[str, str]:
    fields = dict(_pair(part) for part in text.split(","))
    name = fields.get("id", "")
    source = fields.get("src") or fields.get("source") or ""
    variable = fields.get("env", "")
    if not name:
        raise InvalidArgument(f"secret {text} has no id", hint="--secret id=NAME,src=FILE")
    if variable or (not source and name in os.environ):
        value = os.environ.get(variable or name)
        if value is None:
            raise InvalidArgument(f"secret {name}: variable {variable} is not set")
        data = value.encode("utf-8", "surrogateescape")
    else:
        try:
            data = Path(source or name).read_bytes()
        except OSError as refused:
            raise InvalidArgument(f"secret {name} cannot be read: {refused}") from refused
    return name, base64.b64encode(data).decode()


def _agent(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    path = path if equals else os.environ.get("SSH_AUTH_SOCK", "")
    if not path:
        raise InvalidArgument(f"ssh {name}: SSH_AUTH_SOCK is not set", hint="start ssh-agent")
    return name, str(Path(path).absolute())


def _body(
    context: str, dockerfile: str, until: ExitStack
) -> tuple[BinaryIO | None, list[tuple[str, str]]]:
    """The request's body, and the parameters that go with it."""
    if context == _STDIN:
        return _from_stdin(dockerfile)
    if _REMOTE.match(context):
        named = [("dockerfile", dockerfile)] if dockerfile else []
        return None, [("remote", context), *named]
    folder = Path(context)
    if dockerfile == _STDIN:
        located = sent_along(sys.stdin.buffer.read())
    else:
        located = locate(folder, dockerfile, Path.cwd())
    stream = until.enter_context(streamed(lambda out: pack(folder, out, located)))
    return stream, [("dockerfile", located.name)]


def _from_stdin(dockerfile: str) -> tuple[BinaryIO, list[tuple[str, str]]]:
    """A tar as it comes, or a Dockerfile alone, told apart by their beginning."""
    source = cast(io.BufferedReader, sys.stdin.buffer)
    head = source.peek(512)[:512]
    text = bool(head) and not head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f"))
    if text and b"\0" not in head:
        return _alone(Located("Dockerfile", source.read())), []
    return cast(BinaryIO, source), [("dockerfile", dockerfile)] if dockerfile else []


def _alone(located: Located) -> BinaryIO:
    """A context of a Dockerfile and nothing else."""
    made = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="laz-context-") as nothing:
        pack(Path(nothing), made, located)
    made.seek(0)
    return made


def _pieces(body: BinaryIO) -> Iterator[bytes]:
    while data := body.read(_PIECE):
        yield data


def _post(
    daemon: Daemon,
    query: list[tuple[str, str]],
    body: BinaryIO | None,
    quiet: bool,
    silent: bool,
) -> str:
    """Build; the image's id."""
    import requests
    from docker import auth as docker_auth

    headers = {"Content-Type": "application/x-tar"}
    config = docker_auth.load_config()
    if config.get_all_credentials():
        raw = msgspec.json.encode(config.get_all_credentials())
        headers["X-Registry-Config"] = base64.urlsafe_b64encode(raw).decode()
    try:
        answer = daemon.request(
            "POST",
            f"{daemon.base_url}/v1.44/build",
            params=query,
            data=_pieces(body) if body is not None else None,
            headers=headers,
            stream=True,
            timeout=None,
        )
    except requests.exceptions.ConnectionError as gone:
        raise unreachable(daemon.address) from gone
    with answer:
        if answer.status_code >= 400:
            raise failure(answer.content, answer.status_code)
        return _follow(answer, quiet, silent)


def _follow(answer: requests.Response, quiet: bool, silent: bool) -> str:
    image = ""
    for line in answer.iter_lines(chunk_size=1):
        if not line:
            continue
        record = jsontext.decode(line, type=dict[str, object])
        if "error" in record:
            detail = cast(dict[str, object], record.get("errorDetail") or {})
            output.write_error(str(record["error"]), str(record.get("hint", "")))
            raise click.exceptions.Exit(cast(int, detail.get("code") or 1))
        if isinstance(aux := record.get("aux"), dict) and "ID" in aux:
            image = str(aux["ID"])
        text = str(record.get("stream", ""))
        if quiet and text.startswith("sha256:"):
            image = text.strip()
        if silent:
            continue
        if text:
            click.echo(text, nl=False)
        elif record.get("status") and not record.get("progressDetail"):
            click.echo(str(record["status"]))
    return image


@dataclass(frozen=True)
class _Destination:
    """Where ``--output`` goes: a folder, or a tar; a path of ``-`` is standard output."""

    path: str
    tar: bool


def _destination(text: str) -> _Destination:
    if text == _STDIN:
        return _Destination(_STDIN, True)
    if "=" not in text:
        return _Destination(text, False)
    fields = dict(_pair(part) for part in text.split(","))
    kind, path = fields.get("type", "local"), fields.get("dest", "")
    if kind not in ("local", "tar") or not path:
        raise InvalidArgument(
            f"invalid output {text}", hint="-o FOLDER, type=local,dest=FOLDER or type=tar,dest=FILE"
        )
    return _Destination(path, kind == "tar")


def _write(daemon: Daemon, image: str, where: _Destination) -> None:
    if not image:
        raise ContextError("the daemon did not say which image it made")
    answer = daemon.request(
        "GET", f"{daemon.base_url}/lazarette/v1/images/{image}/files", stream=True, timeout=None
    )
    with answer:
        if answer.status_code >= 400:
            raise failure(answer.content, answer.status_code)
        if not where.tar:
            unpack_tree(cast(BinaryIO, answer.raw), Path(where.path))
            return
        target = sys.stdout.buffer if where.path == _STDIN else open(where.path, "wb")  # noqa: SIM115
        with target:
            for piece in answer.iter_content(_PIECE):
                target.write(piece)


@click.group("builder")
def builder() -> None:
    """The build cache."""


@builder.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Also what images have.")
@click.option("--keep-storage", default="", help="Bytes that may stay, e.g. 10g.")
@click.option("--filter", "filters", multiple=True, help="until=24h")
@json_option
@pass_session
def prune(
    session: Session,
    everything: bool,
    keep_storage: str,
    filters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Remove what the build cache does not need."""
    query = {"all": "1" if everything else "0"}
    if keep_storage:
        query["reserved-space"] = str(parse_size(keep_storage))
    if filters:
        table: dict[str, list[str]] = {}
        for text in filters:
            name, value = _pair(text)
            table.setdefault(name, []).append(value)
        query["filters"] = msgspec.json.encode(table).decode()
    daemon = session.daemon
    answer = daemon.request("POST", f"{daemon.base_url}/v1.44/build/prune", params=query)
    with answer:
        if answer.status_code >= 400:
            raise failure(answer.content, answer.status_code)
        gone = jsontext.decode(answer.content, type=dict[str, object])
    caches = cast(list[str], gone["CachesDeleted"] or [])
    freed = output.size_text(cast(int, gone["SpaceReclaimed"]))
    output.answer(as_json, gone, *caches, f"reclaimed {freed}")


@builder.command("du")
@json_option
@pass_session
def usage(session: Session, as_json: bool) -> None:
    """Show what the build cache holds."""
    found = cast(list[dict[str, object]], session.daemon.df().get("BuildCache") or [])
    if as_json:
        output.write_json(found)
        return
    rows = [
        (
            str(one["ID"])[:12],
            str(one["Type"]),
            output.size_text(cast(int, one["Size"])),
            str(one["LastUsedAt"] or "")[:19],
            str(one["Description"])[:60],
        )
        for one in found
    ]
    output.write_table(("ID", "TYPE", "SIZE", "LAST USED", "DESCRIPTION"), rows)


COMMANDS = (build, builder)
