"""What is kept with a volume's data so that a host can be rebuilt from a bucket.

JSON, read leniently: a newer writer may add fields.
"""

from __future__ import annotations

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.containers.model import ContainerConfig, EndpointSettings, HostConfig
from lazarette.runtime.networks.model import NetworkSpec
from lazarette.storage.errors import DamagedData

PROJECT = "com.docker.compose.project"


class VolumeDefinition(msgspec.Struct, frozen=True):
    """How a volume was made."""

    name: str
    driver: str = ""
    options: dict[str, str] = {}
    labels: dict[str, str] = {}


class ContainerDefinition(msgspec.Struct, frozen=True):
    """How a container was made.

    Attributes:
        name: its name.
        image: the reference it was created with.
        image_id: digest of the image's configuration.
        config: the Engine API's configuration.
        host: the Engine API's host part.
        endpoints: networks by name.
        running: whether it ran when the volume was backed up.
    """

    name: str
    image: str
    image_id: str
    config: ContainerConfig
    host: HostConfig
    endpoints: dict[str, EndpointSettings] = {}
    running: bool = False


class Definitions(msgspec.Struct, frozen=True):
    """Everything that belongs to one volume.

    Attributes:
        format: 1.
        volume: how it was made.
        containers: those that use it.
        networks: of all containers here.
        policy: its own one, as it was set; JSON.
        project: the other containers of the compose projects these are of; a service without a
            volume comes back with its project.
    """

    format: int = 1
    volume: VolumeDefinition | None = None
    containers: list[ContainerDefinition] = []
    networks: list[NetworkSpec] = []
    policy: str = ""
    project: list[ContainerDefinition] = []

    @property
    def projects(self) -> set[str]:
        """The compose projects that the volume or its containers belong to."""
        labels = [one.config.labels for one in self.containers]
        if self.volume is not None:
            labels.append(self.volume.labels)
        return {said[PROJECT] for said in labels if said.get(PROJECT)}

    @classmethod
    def parse(cls, meta: bytes) -> Definitions:
        """Read what :meth:`text` wrote; nothing gives an empty object.

        Raises:
            DamagedData: it is something else.
        """
        if not meta.strip():
            return cls()
        try:
            return jsontext.decode(meta, type=cls)
        except msgspec.DecodeError as bad:
            raise DamagedData(f"the definitions kept with a backup cannot be read: {bad}") from bad

    def text(self) -> str:
        """JSON."""
        return msgspec.json.encode(self).decode()
