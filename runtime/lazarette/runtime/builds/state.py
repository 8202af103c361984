"""What a stage has become so far: its configuration, layers, history and cache key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.builds.history import DEFAULT_SHELL
from lazarette.runtime.builds.scope import DEFAULT_PATH, StageScope, env_map
from lazarette.runtime.images.model import (
    History,
    ImageConfig,
    Platform,
    RootFS,
    RunConfig,
    chain_ids,
    encode,
    layer_key,
)
from lazarette.storage.clock import rfc3339


@dataclass
class StageState:
    """Changed by every step.

    Attributes:
        scope: variables.
        config: container defaults.
        platform: what it is for.
        diff_ids: layers, lowest first.
        base_layers: how many of them come from the base image.
        history: texts so far.
        base_history: how many of them come from the base image.
        author: of MAINTAINER.
        key: cache key after the last step.
        created_ns: when the last step ran.
        base_id: id of the base image; empty for scratch.
        cmd_set: CMD was given in this stage.
        missed: a step was not in the cache; the rest is not looked up.
    """

    scope: StageScope
    platform: Platform
    config: RunConfig = field(default_factory=RunConfig)
    diff_ids: list[str] = field(default_factory=list)
    base_layers: int = 0
    history: list[History] = field(default_factory=list)
    base_history: int = 0
    author: str = ""
    key: str = ""
    created_ns: int = 0
    base_id: str = ""
    cmd_set: bool = False
    missed: bool = False

    @property
    def chain(self) -> str:
        """Chain id of the topmost layer; empty if there is none."""
        return chain_ids(self.diff_ids)[-1] if self.diff_ids else ""

    @property
    def layer(self) -> str | None:
        """Key of the topmost layer for the layer driver."""
        return layer_key(self.chain) if self.diff_ids else None

    @property
    def env(self) -> dict[str, str]:
        """The configuration's variables."""
        return env_map(self.config.env or [])

    @property
    def shell(self) -> Sequence[str]:
        """What runs shell forms."""
        return self.config.shell or DEFAULT_SHELL

    def record(self, created_by: str, created_ns: int, *, empty: bool, comment: str = "") -> None:
        """Add a line to the history."""
        self.created_ns = created_ns
        self.history.append(
            History(
                created=rfc3339(created_ns),
                author=self.author,
                created_by=created_by,
                comment=comment,
                empty_layer=empty,
            )
        )

    def image_config(self) -> bytes:
        """The image's configuration as it is kept."""
        return encode(
            ImageConfig(
                architecture=self.platform.architecture,
                os=self.platform.os,
                variant=self.platform.variant,
                created=rfc3339(self.created_ns),
                author=self.author,
                config=self.config,
                rootfs=RootFS(diff_ids=list(self.diff_ids)),
                history=list(self.history),
            )
        )

    def branch(self, scope: StageScope) -> StageState:
        """The beginning of a stage built on this one."""
        return StageState(
            scope=scope,
            platform=self.platform,
            config=copy_config(self.config),
            diff_ids=list(self.diff_ids),
            base_layers=self.base_layers,
            history=list(self.history),
            base_history=self.base_history,
            author=self.author,
            key=self.key,
            created_ns=self.created_ns,
            base_id=self.base_id,
        )


def copy_config(config: RunConfig) -> RunConfig:
    """A configuration that can be changed without changing the original."""
    return jsontext.decode(msgspec.json.encode(config), type=RunConfig)


def with_path(config: RunConfig) -> None:
    """Add the default PATH where the base has none."""
    env = config.env or []
    if "PATH" not in env_map(env):
        config.env = [*env, f"PATH={DEFAULT_PATH}"]
