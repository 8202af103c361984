"""All routes of a daemon, in the order they are tried."""

from __future__ import annotations

from lazarette.runtime.api import (
    absent,
    archive,
    containers,
    distribution,
    exec,
    images,
    system,
)
from lazarette.runtime.api.builds import BuildRoutes
from lazarette.runtime.api.http import Route
from lazarette.runtime.api.lazarette import ProtectionRoutes
from lazarette.runtime.api.networks import NetworkRoutes
from lazarette.runtime.api.openapi import described
from lazarette.runtime.api.standbys import StandbyRoutes
from lazarette.runtime.api.volumes import VolumeRoutes
from lazarette.runtime.engine import Engine


def all_routes(engine: Engine) -> list[Route]:
    """The Engine API and ours."""

    def referrers(volume: str) -> list[str]:
        return [one.id for one in engine.containers.using_volume(volume)]

    volumes = VolumeRoutes(
        engine.volumes,
        engine.containers,
        referrers,
        engine.fills.require_ordinary,
        engine.fills.remove,
        engine.events,
    )
    builds = BuildRoutes(engine.builder, engine.clock)
    routes = [
        *system.routes(
            engine.containers,
            engine.images,
            engine.volumes,
            engine.networks,
            engine.id,
            builds.usage.shown,
            [
                ("Layers", f"{engine.layer_choice.name}: {engine.layer_choice.reason}"),
                ("Volumes", f"{engine.volume_choice.name}: {engine.volume_choice.reason}"),
                (
                    "Volumes of databases",
                    f"{engine.database_choice.name}: {engine.database_choice.reason}",
                ),
            ],
        ),
        *builds.routes(),
        *containers.routes(engine.containers),
        *archive.routes(engine.containers),
        *exec.routes(engine.containers),
        *images.routes(
            engine.images, registry=engine.registries, committer=engine.container_images
        ),
        *distribution.routes(engine.registries),
        *NetworkRoutes(engine.networks, engine.containers).routes(),
        *volumes.routes(),
        *ProtectionRoutes(engine.protection, engine.events).routes(),
        *StandbyRoutes(engine.protection).routes(),
        *absent.routes(),
    ]
    return [described(routes), *routes]
