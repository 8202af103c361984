"""The engine: the only place that wires drivers, stores, services and the clock."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from lazarette.backup.policy.journal import Journal
from lazarette.runtime.builds.builder import Builder
from lazarette.runtime.builds.ocirunner import Joined, OciStepRunner
from lazarette.runtime.builds.pulling import RegistryPull
from lazarette.runtime.committing import ContainerImages
from lazarette.runtime.config import Config
from lazarette.runtime.containers import recover
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.networking import Networking
from lazarette.runtime.events import EventBus
from lazarette.runtime.hands import EngineHands, StoreArchives, VolumeUsers
from lazarette.runtime.images.endpoints import RegistryConfig
from lazarette.runtime.images.registries import Registries
from lazarette.runtime.images.store import ImageStore
from lazarette.runtime.networks.etcd import cluster_of
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.protection.backups import BackupService
from lazarette.runtime.protection.branches import BranchService
from lazarette.runtime.protection.describe import Describer
from lazarette.runtime.protection.drills import Drills
from lazarette.runtime.protection.fencing import Fencing
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.follower import PolicyFollower
from lazarette.runtime.protection.holding import Stillness
from lazarette.runtime.protection.images import ImageKeep
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.recovery import HostRecovery
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import RestoreService
from lazarette.runtime.protection.runs import RunBook
from lazarette.runtime.protection.safeties import Safeties
from lazarette.runtime.protection.service import Protection
from lazarette.runtime.protection.standby import StandbyService
from lazarette.runtime.protection.telling import Teller
from lazarette.runtime.protection.wal import WalService
from lazarette.storage.clock import Clock
from lazarette.storage.files import write_atomic
from lazarette.storage.registry import AUTOMATIC, VolumeDrivers, open_layers
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)


class Engine:
    """All services of one daemon; made by :meth:`start`, ended by :meth:`stop`.

    Args:
        config: where it keeps things.
        clock: time.

    Attributes:
        id: of this engine, for ever.
        layer_choice: which layer driver, and why.
        volume_choice: which default volume driver, and why.
        database_choice: which one for databases, and why.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        config.exec_root.mkdir(parents=True, exist_ok=True, mode=0o711)
        # Layers hold setuid programs and devices of anybody's making: no other user of the
        # host may reach them, not even by a name he knows.
        config.data_root.mkdir(parents=True, exist_ok=True)
        config.data_root.chmod(0o700)
        self.config = config
        self.clock = clock
        self.state = State(config.state_file)
        config.state_file.chmod(0o600)
        self.id = _identity(config.data_root / "engine-id")
        self.events = EventBus(clock)
        self._make_storage()
        self._make_runtime()
        self._make_protection()

    def _make_storage(self) -> None:
        config = self.config
        self.layers, self.layer_choice = open_layers(
            config.data_root / "layers", self.clock, config.layer_driver or AUTOMATIC
        )
        self._drivers = VolumeDrivers(
            config.data_root / "volumes", self.clock, config.volume_driver or AUTOMATIC
        )
        self.volume_choice, self.database_choice = self._drivers.choice, self._drivers.databases
        self.volumes = VolumeManager(
            *(self.state, self._drivers, self.clock, self.volume_choice.name),
            databases=self.database_choice.name,
        )

    def _make_runtime(self) -> None:
        config = self.config
        self.images = ImageStore(
            config.data_root / "images", self.layers, self.state, self.events, self.clock
        )
        self.registries = Registries(
            self.images,
            RegistryConfig(mirrors=config.registry_mirrors, insecure=config.insecure_registries),
        )
        self.networks = NetworkManager(
            self.state,
            config.exec_root,
            config.bridge,
            self.events,
            self.clock,
            cluster_of(config.etcd, config.advertise_address),
        )
        self.containers = ContainerManager(
            config,
            self.state,
            self.images,
            self.layers,
            self.volumes,
            Networking(self.networks),
            self.events,
            self.clock,
        )
        self.container_images = ContainerImages(self.containers, self.images)
        self.builder = Builder(
            self.images,
            self.layers,
            OciStepRunner(
                self.containers.runtime,
                self.containers.facts,
                config.exec_root / "steps",
                self.containers.cgroup_parent,
                self.networks,
                self._network_of,
                self.containers.places.roots,
            ),
            self.state,
            self.clock,
            config.data_root / "builds",
            RegistryPull(self.registries, asyncio.get_running_loop()),
        )

    def _make_protection(self) -> None:
        config, root = self.config, self.config.data_root
        jobs = JobRunner(root / "jobs")
        repositories = RepositoryBook(root / "repositories", root / "cache", self.clock)
        journal = Journal(self.state, self.clock)
        book = PolicyBook(self.state, self.volumes, self._users, config.policy_file)
        self.fills = FillService(
            self.volumes,
            repositories,
            self.state,
            config.exec_root / "fills",
            config.store_patience,
        )
        keep = ImageKeep(
            StoreArchives(self.images), repositories, jobs, config.exec_root / "images"
        )
        describer = Describer(self.volumes, self.containers, self.networks, book)
        runs = RunBook(self.state, self.clock)
        teller = Teller(book, journal, runs, self.state, self.clock)
        stillness = Stillness(self.containers, self.volumes, book, self.state, self.clock)
        fencing = Fencing(
            self.id,
            repositories,
            self.volumes,
            runs,
            self.containers,
            self.state,
            self.events,
            self.clock,
        )
        backups = BackupService(
            self.volumes,
            self.containers,
            stillness,
            teller,
            repositories,
            self.fills,
            fencing,
            runs,
            journal,
            jobs,
            describer,
            keep,
            config.exec_root / "changes",
            self.events,
            self.clock,
        )
        users = VolumeUsers(self.containers)
        restores = RestoreService(self.volumes, repositories, self.fills, jobs, self.state, users)
        branches = BranchService(
            self.volumes,
            repositories,
            restores,
            self.fills,
            runs,
            lambda volume: [one.id for one in self.containers.using_volume(volume)],
            self.events,
            self.state,
        )
        self.fills.replaced = self._restart_users
        hands = EngineHands(self.images, keep, self.networks, self.containers)
        recovery = HostRecovery(repositories, restores, self.fills, self.volumes, book, hands)
        standbys = StandbyService(
            self.volumes,
            repositories,
            restores,
            recovery,
            fencing,
            jobs,
            self.state,
            self.clock,
        )
        log_keeper = WalService(
            self.volumes,
            self.containers,
            self.fills,
            book,
            repositories,
            fencing,
            jobs,
            root / "wal",
            self.state,
            self.clock,
        )
        drills = Drills(
            self.containers,
            self.volumes,
            restores,
            book,
            journal,
            teller,
            self.events,
            self.clock,
        )
        follower = PolicyFollower(
            book,
            backups,
            restores,
            repositories,
            jobs,
            journal,
            config.state_file,
            self.events,
            drills,
            self.clock,
            config.parallel_backups,
        )
        self.protection = Protection(
            self.volumes,
            repositories,
            backups,
            restores,
            follower,
            self.fills,
            recovery,
            journal,
            jobs,
            stillness,
            teller,
            drills,
            fencing,
            standbys,
            branches,
            log_keeper,
            Safeties(
                self.volumes,
                lambda: {one.volume for one in restores.in_place.unfinished()},
                config.safety_days,
                self.clock,
            ),
        )

    def _network_of(self, container: str) -> Joined:
        """What ``--network container:…`` of a build joins."""
        namespace, folder = self.containers.preparer.network_of(container)
        hosts, resolv_conf = (
            file.read_bytes() if file.exists() else b""
            for file in (folder / "hosts", folder / "resolv.conf")
        )
        return Joined(namespace, hosts, resolv_conf)

    def _users(self, volume: str) -> list[tuple[str, dict[str, str]]]:
        return [
            (one.name.lstrip("/"), one.definition.config.labels)
            for one in self.containers.using_volume(volume)
        ]

    async def _restart_users(self, volume: str) -> None:
        """Start containers anew whose mount died with its server, and say so."""
        restarted = await self.protection.restores.in_place.restart(volume)
        if restarted:
            names = ", ".join(restarted)
            log.warning("restarted %s: the mount of volume %s had died", names, volume)
        self.events.publish("volume", "remount", volume, {"restarted": ",".join(restarted)})

    async def start(self) -> None:
        """Repair what an earlier daemon left, find its containers, follow the policies."""
        await self._recover()
        await self.protection.start()

    async def release(self) -> None:
        """Repair what a dead daemon left and release what it held; nothing else is begun."""
        await self._recover()
        await self.protection.release()

    async def _recover(self) -> None:
        await asyncio.to_thread(self.layers.recover)
        await asyncio.to_thread(self.volumes.recover)
        await asyncio.to_thread(self.builder.recover)
        await asyncio.to_thread(self.images.recover)
        await self.fills.start()
        await asyncio.to_thread(self.protection.restores.in_place.prepare)
        running = recover.load(self.containers)
        await asyncio.to_thread(self.networks.recover, running)
        await recover.resume(self.containers)
        await self.fills.resumed()

    async def stop(self, shutdown: bool) -> None:
        """Let go of everything; containers go on unless ``shutdown`` is asked for.

        Args:
            shutdown: stop all containers (their timeout honoured), unmount volumes and
                pools, take networks down.
        """
        async with AsyncExitStack() as ending:
            ending.callback(self.state.close)
            if shutdown:
                ending.push_async_callback(self._unmount)
            ending.callback(self.networks.close, take_down=shutdown)
            ending.push_async_callback(self.containers.close)
            if shutdown:
                ending.push_async_callback(self._stop_containers)
            ending.push_async_callback(self.fills.stop)
            ending.push_async_callback(self.protection.stop)

    async def _stop_containers(self) -> None:
        running = [one for one in self.containers.all() if one.state.running]
        stopped = await asyncio.gather(
            *(self.containers.lifecycle.stop(one) for one in running), return_exceptions=True
        )
        for one, fault in zip(running, stopped, strict=True):
            if isinstance(fault, BaseException):
                log.error("container %s does not stop: %s", one.name, fault)

    async def _unmount(self) -> None:
        # what a task had begun in a thread when it was cancelled goes on there: a volume that
        # is being settled keeps its pool busy
        try:
            await asyncio.get_running_loop().shutdown_default_executor()
        finally:
            self._unmount_all()

    def _unmount_all(self) -> None:
        """Each step whatever becomes of those before it."""
        with ExitStack() as ending:
            ending.callback(self.layers.close)
            ending.callback(self._drivers.close)
            ending.callback(self._unmount_volumes)
            ending.callback(self.fills.unmount_all)

    def _unmount_volumes(self) -> None:
        with ExitStack() as ending:
            for volume in self.volumes.list():
                ending.callback(self.volumes.driver(volume.driver).unmount, volume.name)


def _identity(path: Path) -> str:
    """The engine's id: made at its first start, 36 characters as Docker's."""
    if not path.exists():
        write_atomic(path, str(uuid.uuid4()).encode(), 0o644)
    return path.read_text()
