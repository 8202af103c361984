"""RUN steps run by the OCI runtime itself: no monitor, no record, no log.

A step's process belongs to its build, so the runtime runs in the foreground and its end
is the step's end.  The steps of one build share a network namespace.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Final, Protocol

import msgspec

from lazarette.runtime.builds.errors import StepFailed
from lazarette.runtime.builds.options import Limits
from lazarette.runtime.builds.runner import RunMount, RunRequest
from lazarette.runtime.containers import spec, users
from lazarette.runtime.containers.model import ContainerConfig, HostConfig, Ulimit
from lazarette.runtime.containers.networking import JOIN
from lazarette.runtime.containers.oci import OciRuntime
from lazarette.runtime.containers.record import Definition, MountPoint
from lazarette.runtime.containers.rootfs import resolve_user
from lazarette.runtime.networks.model import Endpoint, EndpointRequest
from lazarette.storage import beneath, process
from lazarette.storage.errors import Cancelled, InvalidArgument, LazaretteError
from lazarette.storage.idmaps import IdMap

HOSTNAME: Final = "build"
_CHUNK = 1 << 16
_POLL_MS = 100
_RED, _PLAIN = b"\x1b[91m", b"\x1b[0m"  # how clients know standard error
_MISSING = ("not found", "No such file")
_HOSTS = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


class Networks(Protocol):
    """What steps need of the network manager."""

    def create_sandbox(self, container: str, new: Path | None = None) -> Path:
        """Make a network namespace, or take a new one; one that is there is kept."""
        ...

    def attach(self, container: str, requests: Sequence[EndpointRequest]) -> list[Endpoint]:
        """Join it to networks."""
        ...

    def resolv_conf(self, container: str) -> bytes:
        """Its ``/etc/resolv.conf``."""
        ...

    def teardown(self, container: str) -> None:
        """Remove it."""
        ...


@dataclass(frozen=True)
class Joined:
    """The network of a running container, as a step sees it: namespace and name files."""

    namespace: str
    hosts: bytes
    resolv_conf: bytes


Join = Callable[[str], Joined]


@dataclass(frozen=True)
class _Remapped:
    """What a step with users of its own has: namespaces, and its root as they reach it."""

    namespaces: users.Namespaces
    root: Path


class _Child(Protocol):
    """A started program."""

    def wait(self) -> int: ...
    def kill(self) -> None: ...


class OciStepRunner:
    """See :class:`lazarette.runtime.builds.runner.StepRunner`.

    Args:
        runtime: crun or runc.
        facts: what the host can do.
        folder: for bundles; short-lived.
        cgroup_parent: path below which steps get their control groups.
        networks: the network manager; None gives steps no network but the host's.
        join: finds the network of a container.
        roots: where remapped users reach the root of a step.
    """

    def __init__(
        self,
        runtime: OciRuntime,
        facts: spec.HostFacts,
        folder: Path,
        cgroup_parent: str,
        networks: Networks | None = None,
        join: Join | None = None,
        roots: Path | None = None,
    ) -> None:
        self._roots = roots
        self._runtime = runtime
        self._facts = facts
        self._folder = folder
        self._cgroup_parent = cgroup_parent.strip("/")
        self._networks = networks
        self._join = join
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def idmap(self) -> IdMap | None:
        """See :attr:`StepRunner.idmap`."""
        return self._facts.idmap if self._roots is not None else None

    def targets(self) -> Mapping[str, bool]:
        """See :meth:`StepRunner.targets`."""
        folders = {"/proc": True, "/dev": True, "/sys": True}
        return {**folders, "/etc/hosts": False, "/etc/hostname": False, "/etc/resolv.conf": False}

    def run(self, request: RunRequest, output: Callable[[bytes], None], cancelled: Event) -> int:
        """See :meth:`StepRunner.run`."""
        bundle = self._folder / request.id
        bundle.mkdir(mode=0o700)
        with ExitStack() as until:
            until.callback(beneath.remove_path, bundle)
            owned = None
            if request.idmap is not None:
                owned = until.enter_context(self._remapped(request, request.idmap))
            configuration = self._configuration(request, bundle, owned)
            (bundle / "config.json").write_bytes(msgspec.json.encode(configuration))
            return self._attended(request.id, bundle, output, cancelled)

    @contextmanager
    def _remapped(self, request: RunRequest, idmap: IdMap) -> Iterator[_Remapped]:
        """The namespaces of a step with users of its own, and its root as they reach it."""
        name = request.network
        if name == "host" or name.startswith(JOIN):
            raise StepFailed(
                f"RUN cannot use the network {name} when user namespaces are enabled",
                hint="allow security.insecure, and use RUN --security=insecure",
            )
        assert self._roots is not None
        place = self._roots / request.id
        with users.fresh(idmap) as made:
            try:
                yield _Remapped(made, users.show_root(request.root, place, idmap))
            finally:
                users.hide_root(place)
                self.release(request.id)

    def recover(self) -> None:
        """See :meth:`StepRunner.recover`."""
        for bundle in list(self._folder.iterdir()):
            self._delete(bundle.name)
            beneath.remove_path(bundle)

    def release(self, sandbox: str) -> None:
        """See :meth:`StepRunner.release`."""
        if self._networks is not None:
            self._networks.teardown(sandbox)

    # ---- configuration

    def _configuration(
        self, request: RunRequest, bundle: Path, owned: _Remapped | None
    ) -> dict[str, object]:
        root = os.open(request.root, os.O_PATH | os.O_DIRECTORY)
        try:
            user = resolve_user(root, request.user)
        except InvalidArgument as unknown:
            raise StepFailed(unknown.message, hint=unknown.hint) from unknown
        finally:
            os.close(root)
        definition = self._definition(request)
        namespaces = {"mount": "", "pid": "", "ipc": "", "uts": ""}
        hosts, resolver = self._network(request, namespaces, owned)
        made = spec.Prepared(
            rootfs=request.root if owned is None else owned.root,
            user=user,
            cgroup=f"/{self._cgroup_parent}/{request.id}",
            namespaces=namespaces,
            files=self._files(request, bundle, hosts, resolver),
            mounts=[_placed(mount) for mount in request.mounts],
            hostname=HOSTNAME,
            env=spec.environment(definition, HOSTNAME, user.home),
            idmap=request.idmap,
        )
        configuration = spec.build(definition, made, self._facts)
        request.devices.apply(configuration)
        return configuration

    @staticmethod
    def _definition(request: RunRequest) -> Definition:
        return Definition(
            id=request.id,
            name="build",
            created_ns=0,
            image_id="",
            image_ref="",
            image_layer=None,
            config=ContainerConfig(
                env=list(request.env), working_dir=request.cwd, user=request.user
            ),
            host=_host_config(request.limits, request.privileged),
            command=list(request.argv),
        )

    def _network(
        self, request: RunRequest, namespaces: dict[str, str], owned: _Remapped | None
    ) -> tuple[bytes, bytes]:
        """Choose the network namespace; the texts of ``hosts`` and ``resolv.conf``."""
        sandbox, new = request.sandbox, None
        if owned is not None:
            namespaces["user"] = str(owned.namespaces.user)
            sandbox, new = request.id, owned.namespaces.network
        name = request.network or "default"
        if name == "host":
            return _HOSTS, _host_resolver()
        if name.startswith(JOIN) and self._join is not None:
            try:
                joined = self._join(name.removeprefix(JOIN))
            except LazaretteError as bad:
                raise StepFailed(bad.message, hint=bad.hint) from bad
            namespaces["network"] = joined.namespace
            return joined.hosts, joined.resolv_conf
        if name == "none" or self._networks is None:
            namespaces["network"] = "" if new is None else str(new)
            return _HOSTS, b""
        with self._lock:
            path = self._networks.create_sandbox(sandbox, new)
            network = "bridge" if name == "default" else name
            self._networks.attach(sandbox, [EndpointRequest(network=network)])
            namespaces["network"] = str(path)
            return _HOSTS, self._networks.resolv_conf(sandbox)

    @staticmethod
    def _files(request: RunRequest, bundle: Path, hosts: bytes, resolver: bytes) -> dict[str, Path]:
        for line in request.extra_hosts:
            name, _, address = line.partition("=" if "=" in line else ":")
            hosts += f"{address.strip('[]')}\t{name}\n".encode()
        texts = {"hosts": hosts, "hostname": f"{HOSTNAME}\n".encode()}
        texts["resolv.conf"] = resolver
        for name, text in texts.items():
            (bundle / name).write_bytes(text)
            if request.idmap is not None:
                os.chown(bundle / name, *request.idmap.root)
        return {f"/etc/{name}": bundle / name for name in texts}

    # ---- the process

    def _attended(
        self, run_id: str, bundle: Path, output: Callable[[bytes], None], cancelled: Event
    ) -> int:
        log = bundle / "runtime.log"
        argv = [
            self._runtime.creator,
            "--root",
            str(self._runtime.root),
            "--log",
            str(log),
            "run",
            "--bundle",
            str(bundle),
            run_id,
        ]
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        try:
            child = process.spawn(argv, stdout=ends[0][1], stderr=ends[1][1])
        finally:
            for _, writing in ends:
                os.close(writing)
        try:
            self._forward((ends[0][0], ends[1][0]), output, cancelled, run_id)
            code = child.wait()
        except BaseException:
            self._kill(run_id, child)
            raise
        finally:
            for reading, _ in ends:
                os.close(reading)
        if cancelled.is_set():
            raise Cancelled("build cancelled")
        self._explain(code, log)
        return code if code >= 0 else 128 - code

    def _forward(
        self,
        streams: tuple[int, int],
        output: Callable[[bytes], None],
        cancelled: Event,
        run_id: str,
    ) -> None:
        waiting = select.poll()
        open_ends = set(streams)
        for reading in streams:
            waiting.register(reading, select.POLLIN | select.POLLHUP)
        while open_ends:
            if cancelled.is_set():
                self._delete(run_id)  # again until it ends: it may not have begun yet
            for reading, _ in waiting.poll(_POLL_MS):
                data = os.read(reading, _CHUNK)
                if not data:
                    waiting.unregister(reading)
                    open_ends.discard(reading)
                elif not cancelled.is_set():
                    output(data if reading == streams[0] else _RED + data + _PLAIN)

    def _delete(self, run_id: str) -> None:
        process.run(self._runtime.command("delete", "--force", run_id), check=False)

    def _kill(self, run_id: str, child: _Child) -> None:
        self._delete(run_id)
        child.kill()
        child.wait()

    @staticmethod
    def _explain(code: int, log: Path) -> None:
        """Tell a process that ended badly from one that could not be started."""
        if code == 0 or not log.exists():
            return
        lines = log.read_text(errors="replace").strip().splitlines()
        if not lines:
            return
        missing = any(sign in lines[-1] for sign in _MISSING)
        raise StepFailed(f"starting the step failed: {lines[-1]}", 127 if missing else 126)


def _host_config(limits: Limits, privileged: bool) -> HostConfig:
    return HostConfig(
        privileged=privileged,
        memory=limits.memory,
        memory_swap=limits.memory_swap,
        cpu_shares=limits.cpu_shares,
        cpu_period=limits.cpu_period,
        cpu_quota=limits.cpu_quota,
        cpuset_cpus=limits.cpus,
        cpuset_mems=limits.memory_nodes,
        shm_size=limits.shm_size,
        ulimits=[Ulimit(name=n, soft=s, hard=h) for n, (s, h) in limits.ulimits.items()],
    )


def _placed(mount: RunMount) -> spec.PlacedMount:
    point = MountPoint(
        type="tmpfs" if mount.source is None else "bind",
        source=str(mount.source or ""),
        destination=mount.target,
        rw=mount.writable,
        recursive=False,
        options=list(mount.options),
    )
    return spec.PlacedMount(point, mount.source)


def _host_resolver() -> bytes:
    try:
        return Path("/etc/resolv.conf").read_bytes()
    except OSError:
        return b""
