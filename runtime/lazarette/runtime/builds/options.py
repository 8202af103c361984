"""What a caller may ask of one build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources of a step's process; 0 and empty mean no limit.

    Attributes:
        memory: bytes.
        memory_swap: bytes of memory and swap together; -1 for unlimited swap.
        cpu_shares: relative weight.
        cpu_period: microseconds.
        cpu_quota: microseconds a period.
        cpus: processors, e.g. ``0-2``.
        memory_nodes: NUMA nodes.
        shm_size: bytes of ``/dev/shm``.
        ulimits: name to soft and hard limit.
    """

    memory: int = 0
    memory_swap: int = 0
    cpu_shares: int = 0
    cpu_period: int = 0
    cpu_quota: int = 0
    cpus: str = ""
    memory_nodes: str = ""
    shm_size: int = 0
    ulimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret's bytes; never shown, never part of a cache key."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything of a build beside its context.

    Attributes:
        tags: names for the image.
        dockerfile: path of the file within the context.
        build_args: values for ARG; None stands for "as if not given".
        labels: added to the image.
        target: stage to build; empty for the last.
        platform: ``os[/arch[/variant]]``; empty for the host's.
        no_cache: do not look into the cache.
        no_cache_stages: names of stages whose cache is not looked into.
        cache_from: images whose history serves as cache.
        pull: look for a newer base image.
        quiet: only the image's id at the end.
        squash: merge the layers of this build into one.
        network: network of RUN: ``default``, ``none``, ``host``, a network's name or
            ``container:ID``.
        extra_hosts: ``name:address`` lines for RUN.
        limits: resources of RUN.
        remove: remove intermediate containers after success.
        force_remove: and after a failure.
        remote: URL of a context that the daemon fetches itself.
        secrets: for ``RUN --mount=type=secret``, by id.
        ssh: paths of agent sockets on this host for ``RUN --mount=type=ssh``, by id.
        contexts: named contexts, see :mod:`lazarette.runtime.builds.named`.
        entitlements: ``network.host``, ``security.insecure``, ``device``, ``device=NAME``.
        auths: ``X-Registry-Auth`` values by registry host.
    """

    tags: tuple[str, ...] = ()
    dockerfile: str = ""
    build_args: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    platform: str = ""
    no_cache: bool = False
    no_cache_stages: frozenset[str] = frozenset()
    cache_from: tuple[str, ...] = ()
    pull: bool = False
    quiet: bool = False
    squash: bool = False
    network: str = "default"
    extra_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    remove: bool = True
    force_remove: bool = False
    remote: str = ""
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    ssh: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, str] = field(default_factory=dict)
    entitlements: frozenset[str] = frozenset()
    auths: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def source_date_epoch(self) -> int | None:
        """Seconds since the epoch that all times of the image are to have, if asked for."""
        value = self.build_args.get("SOURCE_DATE_EPOCH")
        return int(value) if value is not None and value.isdecimal() else None
