"""What a container needs on the host for one run, made before it and undone after it.

Everything is found again by the container's id, so that undoing works after a crash at
any point: it never asks what was made, it removes what is there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from lazarette.runtime.containers import links, spec, users
from lazarette.runtime.containers.cgroups import Group
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.networking import Networking
from lazarette.runtime.containers.oci import OciRuntime
from lazarette.runtime.containers.record import MountPoint
from lazarette.runtime.containers.rootfs import (
    make_folders,
    make_target,
    open_in_root,
    resolve_user,
)
from lazarette.runtime.containers.services import ImageSource
from lazarette.runtime.containers.spec import HostFacts, PlacedMount, Prepared
from lazarette.storage import beneath
from lazarette.storage import mounts as kernel_mounts
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, LazaretteError, NotFound
from lazarette.storage.idmaps import as_root
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.volumes.manager import VolumeManager

Lookup = Callable[[str], Container]
JOIN = "container:"
_SHM, _SHOWN = "shm", "mount-"


class Preparer:
    """Makes and unmakes the surroundings of runs.

    Args:
        layers: roots of containers.
        images: for image mounts.
        volumes: named volumes.
        networking: network namespaces and endpoints.
        facts: what the host can do.
        cgroup_parent: path below which containers get their control groups.
        runtime: whose state of a run is removed after it.
        lookup: finds another container by id or name, to share namespaces.
        clock: for deadlines.
    """

    def __init__(
        self,
        layers: LayerDriver,
        images: ImageSource,
        volumes: VolumeManager,
        networking: Networking,
        facts: HostFacts,
        cgroup_parent: str,
        runtime: OciRuntime,
        lookup: Lookup,
        clock: Clock,
    ) -> None:
        self._layers = layers
        self._images = images
        self._volumes = volumes
        self._networking = networking
        self._facts = facts
        self.cgroup_parent = cgroup_parent
        self._runtime = runtime
        self._lookup = lookup
        self._clock = clock

    def group(self, container: Container) -> Group:
        """The container's control group."""
        parent = container.definition.host.cgroup_parent or self.cgroup_parent
        path = f"/{parent.strip('/')}/{container.id}"
        return Group(self._facts.hierarchies, path)

    # ---- the run

    def prepare(self, container: Container) -> Prepared:
        """Make everything a run needs; what was made stays for :meth:`release` on a fault."""
        definition = container.definition
        container.bundle.mkdir(parents=True, exist_ok=True, mode=0o700)
        container.data.mkdir(parents=True, exist_ok=True, mode=0o710)
        users.begin(container, self._facts.idmap)
        rootfs = self.mount_root(container)
        with users.namespaces(container, self._others(container)) as owned:
            namespaces = self._namespaces(container, owned)
        hostname = self.hostname(container)
        files = self._networking.files(
            container, hostname, self._joined(container), links.linked(container, self._lookup)
        )
        mounts = [self._place(container, point) for point in definition.mounts]
        root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY)
        try:
            groups = tuple(definition.host.group_add or ())
            user = resolve_user(root, definition.config.user, groups)
            with as_root(container.idmap):
                self._make_working_dir(root, container)
                self._make_targets(root, [*mounts], files)
        finally:
            os.close(root)
        return Prepared(
            rootfs=rootfs,
            user=user,
            cgroup=self.group(container).path,
            namespaces=namespaces,
            files=files,
            mounts=mounts,
            hostname=hostname,
            domainname=definition.config.domainname,
            shm=self._shm(container),
            env=[
                *self._link_variables(container),
                *spec.environment(definition, hostname, user.home),
            ],
            idmap=container.idmap,
        )

    def write_names(self, container: Container) -> None:
        """Write the name files of a running container again: its networks changed."""
        self._networking.write_names(
            container, self.hostname(container), links.linked(container, self._lookup)
        )

    def mount_root(self, container: Container) -> Path:
        """Mount the container's root for its run."""
        rootfs = self._layers.mount(container.definition.layer, container.idmap)
        if container.root_mounted:
            self._layers.unmount(container.definition.layer)
        container.root_mounted = True
        return users.show_root(rootfs, container.shown_root, container.idmap)

    def _unmount_root(self, container: Container) -> None:
        users.hide_root(container.shown_root)
        if container.root_mounted:
            self._layers.unmount(container.definition.layer)
            container.root_mounted = False

    def hostname(self, container: Container) -> str:
        """The name a process sees as its host's."""
        host = container.definition.host
        if host.uts_mode == "host" or (
            host.network_mode == "host" and not container.definition.config.hostname
        ):
            return os.uname().nodename
        return container.definition.config.hostname or container.definition.short_id

    def _link_variables(self, container: Container) -> list[str]:
        if container.definition.host.network_mode != "bridge":
            return []
        return links.environment(container, self._lookup, self._networking.address)

    def _others(self, container: Container) -> list[Container]:
        """The running containers whose namespaces a container joins."""
        host = container.definition.host
        modes = (host.network_mode, host.pid_mode, host.ipc_mode)
        found = [self._lookup(m.removeprefix(JOIN)) for m in modes if m.startswith(JOIN)]
        return [one for one in found if one.state.running]

    def _namespaces(self, container: Container, owned: users.Namespaces | None) -> dict[str, str]:
        host = container.definition.host
        made: dict[str, str] = {"mount": ""}
        if owned is not None:
            made["user"] = str(owned.user)
        for kind, mode in (("pid", host.pid_mode), ("ipc", host.ipc_mode)):
            if mode.startswith(JOIN):
                made[kind] = self._namespace_of(mode.removeprefix(JOIN), kind)
            elif mode != "host":
                made[kind] = ""
        if host.uts_mode != "host":
            made["uts"] = ""
        if host.cgroupns_mode == "private":
            made["cgroup"] = ""
        if host.network_mode.startswith(JOIN):
            made["network"] = self._namespace_of(host.network_mode.removeprefix(JOIN), "net")
        elif host.network_mode != "host":
            path = self._networking.connect(container, owned.network if owned else None)
            made["network"] = "" if path is None else str(path)
        return made

    def network_of(self, reference: str) -> tuple[str, Path]:
        """Network namespace of a running container, and the folder of its name files.

        Raises:
            WrongState: it does not run.
        """
        namespace = self._namespace_of(reference, "net")
        one = self._lookup(reference)
        return namespace, (self._joined(one) or one).data

    def _joined(self, container: Container) -> Container | None:
        mode = container.definition.host.network_mode
        return self._lookup(mode.removeprefix(JOIN)) if mode.startswith(JOIN) else None

    def _namespace_of(self, reference: str, kind: str) -> str:
        other = self._lookup(reference)
        if not other.state.running:
            raise WrongState(f"cannot join the {kind} namespace of {other.name}: it is not running")
        return f"/proc/{other.state.pid}/ns/{kind}"

    def _shm(self, container: Container) -> Path | None:
        mode = container.definition.host.ipc_mode
        if mode == "host":
            return Path("/dev/shm")
        if mode.startswith(JOIN):
            other = self._lookup(mode.removeprefix(JOIN))
            if other.definition.host.ipc_mode != "shareable":
                raise InvalidArgument(
                    f"cannot join IPC of {other.name}: its IPC mode is not shareable"
                )
            return other.bundle / _SHM
        if mode != "shareable":
            return None
        folder = container.bundle / _SHM
        folder.mkdir(exist_ok=True)
        if not os.path.ismount(folder):
            size = container.definition.host.shm_size or spec.DEFAULT_SHM_SIZE
            uid, gid = container.owner
            options = {"mode": "1777", "size": str(size), "uid": str(uid), "gid": str(gid)}
            kernel_mounts.mount("tmpfs", folder, options)
        return folder

    @staticmethod
    def _make_working_dir(root: int, container: Container) -> None:
        path = container.definition.config.working_dir
        if path and path != "/":
            try:
                os.close(open_in_root(root, path, os.O_PATH))
            except FileNotFoundError:
                os.close(make_folders(root, path))

    # ---- mounts

    def _place(self, container: Container, point: MountPoint) -> PlacedMount:
        if point.type == "tmpfs":
            return PlacedMount(point, None)
        if point.type == "volume":
            source = self._volumes.mount(point.name, container.id)
            return PlacedMount(point, self._below(source, point, container))
        if point.type == "image":
            image = self._images.get(point.source)
            if image.layer is None:
                raise InvalidArgument(f"mount {point.source}: the image is empty")
            source = self._layers.mount(image.layer, container.idmap)
            return PlacedMount(point, self._below(source, point, container))
        source = Path(point.source)
        if not os.path.lexists(source):
            if not point.create_source:
                raise InvalidArgument(
                    f'invalid mount config for type "bind": bind source path does not exist: '
                    f"{source}"
                )
            source.mkdir(parents=True, exist_ok=True)
        return PlacedMount(point, source)

    def _below(self, folder: Path, point: MountPoint, container: Container) -> Path:
        """What a mount shows of a volume or image, with owners as the container has them.

        A subpath is held by a bind mount so that nothing can swap it.
        """
        idmap = container.idmap
        mapped = idmap if idmap is not None and self._maps_owners(point) else None
        if not point.subpath and mapped is None:
            return folder
        root = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            inside = open_in_root(root, point.subpath or "/", os.O_PATH)
        except OSError as bad:
            raise InvalidArgument(
                f'cannot access path "{point.subpath}" of {point.name or point.source}: '
                f"{(bad.strerror or str(bad)).lower()}"
            ) from bad
        finally:
            os.close(root)
        try:
            key = point.destination.strip("/").replace("/", "-")
            target = container.bundle / f"{_SHOWN}{key}"
            if stat.S_ISDIR(os.fstat(inside).st_mode):
                target.mkdir(exist_ok=True)
            else:
                target.touch()
            if not os.path.ismount(target):
                kernel_mounts.bind(
                    inside, target, user_namespace=None if mapped is None else mapped.namespace
                )
            return target
        finally:
            os.close(inside)

    def _maps_owners(self, point: MountPoint) -> bool:
        """Whether the owners of a mount are mapped here: an image's are already."""
        if point.type != "volume":
            return False
        driver = self._volumes.driver(self._volumes.get(point.name).driver)
        return not driver.capabilities.of_host

    @staticmethod
    def _make_targets(root: int, mounts: list[PlacedMount], files: dict[str, Path]) -> None:
        """Make mount points that are missing, following links inside the root only."""
        wanted: list[tuple[str, bool]] = [(target, False) for target in files]
        for placed in mounts:
            folder = placed.source is None or placed.source.is_dir()
            wanted.append((placed.point.destination, folder))
        for target, folder in wanted:
            make_target(root, target, folder)

    # ---- undoing

    def release(self, container: Container) -> None:
        """Undo a run: kill leftovers, remove group and namespaces, unmount everything.

        Idempotent; each step is tried even when another fails, the first fault is raised.
        """
        group = self.group(container)
        steps: list[Callable[[], object]] = [
            lambda: group.kill(self._clock),
            lambda: group.remove(self._clock),
            lambda: self._networking.disconnect(container),
            lambda: self._unmount_bundle(container),
            *(partial(self._displace, container, point) for point in container.definition.mounts),
            lambda: self._unmount_root(container),
            lambda: _discard(container.bundle),
            lambda: shutil.rmtree(self._runtime.state_folder(container.id), ignore_errors=True),
            lambda: users.end(container),
        ]
        faults: list[OSError | LazaretteError] = []
        for step in steps:
            try:
                step()
            except NotFound:
                continue
            except (OSError, LazaretteError) as bad:
                faults.append(bad)
        if faults:
            raise faults[0]

    def _displace(self, container: Container, point: MountPoint) -> None:
        if point.type == "volume":
            self._volumes.unmount(point.name, container.id)
        elif point.type == "image":
            layer = self._images.get(point.source).layer
            if layer is not None:
                self._layers.unmount(layer, container.idmap)

    @staticmethod
    def _unmount_bundle(container: Container) -> None:
        if not container.bundle.is_dir():
            return
        for entry in container.bundle.iterdir():
            if entry.name in (_SHM, users.NAMESPACE) or entry.name.startswith(_SHOWN):
                kernel_mounts.unmount(entry, detach=True)


def _discard(folder: Path) -> None:
    """Delete a bundle, never what is mounted in it: volumes may be.

    Raises:
        InUse: something is.
    """
    with suppress(OSError), beneath.opened(folder.parent) as parent:
        beneath.remove_tree(parent, os.fsencode(folder.name))
