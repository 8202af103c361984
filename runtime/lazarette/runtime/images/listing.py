"""``docker images``, ``history`` and ``inspect``: what is told of an image, and filters.

Names and shapes are the Engine API's (``ImageSummary``, ``HistoryResponseItem``,
``ImageInspect``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lazarette.runtime.images import reference
from lazarette.runtime.images.errors import InvalidReference, NoSuchPlatform
from lazarette.runtime.images.instructions import duration_ns
from lazarette.runtime.images.manifests import ManifestSummary, manifests_of, target_of
from lazarette.runtime.images.model import Descriptor, Image, ImageConfig, Platform, time_ns
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import NANOSECONDS, Clock, rfc3339
from lazarette.storage.errors import InvalidArgument

LIST_FILTERS = ("before", "dangling", "label", "label!", "reference", "since", "until")
PRUNE_FILTERS = ("dangling", "label", "label!", "until")

Condition = Callable[[Image], bool]


class Summary(msgspec.Struct, rename="pascal", kw_only=True):
    """One line of ``docker images``."""

    id: str
    parent_id: str
    repo_tags: list[str]
    repo_digests: list[str]
    created: int
    size: int
    shared_size: int
    containers: int
    labels: dict[str, str] | None
    descriptor: Descriptor | msgspec.UnsetType = msgspec.UNSET
    manifests: list[ManifestSummary] | msgspec.UnsetType = msgspec.UNSET


class HistoryItem(msgspec.Struct, rename="pascal", kw_only=True):
    """One line of ``docker history``."""

    id: str
    created: int
    created_by: str
    tags: list[str] | None
    size: int
    comment: str


class GraphDriver(msgspec.Struct, rename="pascal", kw_only=True):
    """Where the layers are unpacked."""

    name: str
    data: dict[str, str] | None


class RootFSView(msgspec.Struct, rename="pascal", kw_only=True, omit_defaults=True):
    """The digests of the layers' tars, lowest first."""

    type: str
    layers: list[str] = []


class Metadata(msgspec.Struct, rename="pascal", kw_only=True):
    """What only this host knows of the image."""

    last_tag_time: str


class Inspect(msgspec.Struct, rename="pascal", kw_only=True, omit_defaults=True):
    """``docker image inspect``; the fields with a default are left out when empty."""

    id: str
    repo_tags: list[str]
    repo_digests: list[str]
    parent: str
    comment: str
    created: str = ""
    docker_version: str
    author: str
    config: dict[str, object]
    architecture: str
    variant: str = ""
    os: str
    os_version: str = ""
    size: int
    virtual_size: int = 0
    graph_driver: GraphDriver
    root_fs: RootFSView = msgspec.field(name="RootFS")
    metadata: Metadata
    descriptor: Descriptor | None = None
    manifests: list[ManifestSummary] = []


def conditions(store: ImageStore, filters: Mapping[str, Sequence[str]]) -> Condition:
    """Filters as one condition: values of a key are alternatives, except labels.

    Raises:
        ImageNotFound: ``before`` or ``since`` names no image.
        InvalidArgument: a value is malformed.
    """
    tests: list[Condition] = []
    for key, values in filters.items():
        if key == "dangling":
            wanted = truth(values)
            tests.append(lambda image, wanted=wanted: (not image.tags) is wanted)  # type: ignore[misc]
        elif key == "label":
            tests.append(lambda image, v=values: all(_has_label(image, x) for x in v))  # type: ignore[misc]
        elif key == "label!":
            tests.append(lambda image, v=values: not any(_has_label(image, x) for x in v))  # type: ignore[misc]
        elif key == "reference":
            tests.append(lambda image, v=values: any(_is_named(image, x) for x in v))  # type: ignore[misc]
        elif key == "before":
            limit = min(store.get(value).created_ns for value in values)
            tests.append(lambda image, limit=limit: image.created_ns < limit)  # type: ignore[misc]
        elif key == "since":
            limit = max(store.get(value).created_ns for value in values)
            tests.append(lambda image, limit=limit: image.created_ns > limit)  # type: ignore[misc]
        elif key == "until":
            limit = until_ns(values, store.clock)
            tests.append(lambda image, limit=limit: image.created_ns < limit)  # type: ignore[misc]
    return lambda image: all(test(image) for test in tests)


def truth(values: Sequence[str]) -> bool:
    """The value of a yes-or-no filter.

    Raises:
        InvalidArgument: neither, or both.
    """
    lowered = {value.strip().lower() for value in values}
    if lowered <= {"1", "true"}:
        return True
    if lowered <= {"0", "false"}:
        return False
    raise InvalidArgument(f"invalid filter 'dangling={list(values)}'")


def until_ns(values: Sequence[str], clock: Clock) -> int:
    """The ``until`` filter: a Unix time, an RFC 3339 time or a Go duration before now.

    Raises:
        InvalidArgument: several values, or none of these forms.
    """
    if len(values) != 1:
        raise InvalidArgument("more than one until filter specified")
    text = values[0]
    whole, _, fraction = text.partition(".")
    if whole.isdecimal() and (not fraction or fraction.isdecimal()):
        return int(whole) * NANOSECONDS + int(fraction[:9].ljust(9, "0"))
    if moment := time_ns(text):
        return moment
    return clock.now_ns() - duration_ns(text)


def _has_label(image: Image, text: str) -> bool:
    key, equals, value = text.partition("=")
    return key in image.labels and (not equals or image.labels[key] == value)


def _is_named(image: Image, pattern: str) -> bool:
    return any(_fits(name, (pattern,)) for name in (*image.tags, *image.digests))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tag or digest fits a pattern (every one fits none): ``*`` does not cross a
    slash, a bare name fits any tag."""
    return not patterns or any(_fits_one(name, pattern) for pattern in patterns)


def _fits_one(name: str, pattern: str) -> bool:
    bare = name.partition("@")[0]
    repository = bare.rpartition(":")[0] if ":" in bare.rpartition("/")[2] else bare
    if any(_glob(candidate, pattern) for candidate in (name, bare, repository)):
        return True
    try:
        full = reference.parse(pattern)
    except InvalidReference:
        return False
    return full.familiar == name or (not full.suffix and reference.parse(name).name == full.name)


def _glob(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def summaries(
    store: ImageStore,
    filters: Mapping[str, Sequence[str]],
    *,
    everything: bool = False,
    shared_size: bool = False,
    manifests: bool = False,
) -> list[Summary]:
    """The list of images, newest first.

    Args:
        store: the images.
        filters: by :data:`LIST_FILTERS`.
        everything: also untagged images others were built on.
        shared_size: count bytes shared with other images (else -1).
        manifests: tell them too.
    """
    wanted = conditions(store, filters)
    patterns = filters.get("reference", ())
    images = store.all()
    parents = {image.parent for image in images}
    uses = _layer_uses(images) if shared_size else {}
    found = []
    for image in images:
        named = image.tags or image.digests
        if not wanted(image) or (not everything and not named and image.id in parents):
            continue
        target = target_of(store, image) if manifests else None
        found.append(
            Summary(
                id=image.id,
                parent_id=image.parent,
                repo_tags=[tag for tag in image.tags if _fits(tag, patterns)],
                repo_digests=[one for one in image.digests if _fits(one, patterns)],
                created=image.created_ns // NANOSECONDS,
                size=image.size,
                shared_size=_shared(store, image, uses) if shared_size else -1,
                containers=-1,
                labels=image.config.run.labels,
                descriptor=target or msgspec.UNSET,
                manifests=manifests_of(store, image, target) if target else msgspec.UNSET,
            )
        )
    return found


def _layer_uses(images: Sequence[Image]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for image in images:
        for chain in image.chain:
            uses[chain] = uses.get(chain, 0) + 1
    return uses


def _shared(store: ImageStore, image: Image, uses: Mapping[str, int]) -> int:
    return sum(layer.size for layer in store.layers_of(image) if uses[layer.chain] > 1)


def require_platform(name: str, config: ImageConfig | Inspect, wanted: Platform | None) -> None:
    """Refuse an image that is for another platform than the one asked for.

    Raises:
        NoSuchPlatform: it is.
    """
    has = Platform(
        os=config.os or "linux", architecture=config.architecture, variant=config.variant
    )
    if wanted is not None and not wanted.accepts(has):
        raise NoSuchPlatform(
            f"image with reference {name} was found but does not match the specified platform: "
            f"wanted {wanted}, actual: {has}"
        )


def history(store: ImageStore, ref: str) -> list[HistoryItem]:
    """How an image came about, newest step first.

    Raises:
        ImageNotFound: no such image.
    """
    image = store.get(ref)
    layers = store.layers_of(image)
    items: list[HistoryItem] = []
    for step in image.config.history or []:
        size = 0
        if not step.empty_layer and layers:
            size = layers.pop(0).size
        items.append(
            HistoryItem(
                id="<missing>",
                created=time_ns(step.created) // NANOSECONDS,
                created_by=step.created_by,
                tags=None,
                size=size,
                comment=step.comment,
            )
        )
    items.reverse()
    ancestor: Image | None = image
    for item in items:
        if ancestor is None:
            break
        item.id, item.tags = ancestor.id, list(ancestor.tags) or None
        ancestor = store.find(ancestor.parent) if ancestor.parent else None
    return items


def inspect(
    store: ImageStore, ref: str, version: tuple[int, int], *, manifests: bool = False
) -> Inspect:
    """All that is known of an image.

    Args:
        store: the images.
        ref: which one.
        version: API version asked for; fields come and go with it.
        manifests: tell them too.

    Raises:
        ImageNotFound: no such image.
    """
    image = store.get(ref)
    config = image.config
    target = target_of(store, image) if version >= (1, 48) else None
    return Inspect(
        id=image.id,
        repo_tags=list(image.tags),
        repo_digests=list(image.digests),
        parent=image.parent,
        comment=config.comment or _last_comment(config),
        created=config.created or "",
        docker_version=config.docker_version,
        author=config.author,
        config=config_view(config, version),
        architecture=config.architecture,
        variant=config.variant,
        os=config.os or "linux",
        os_version=config.os_version,
        size=image.size,
        virtual_size=image.size if version < (1, 44) else 0,
        graph_driver=GraphDriver(name=store.layers.driver.capabilities.name, data=None),
        root_fs=RootFSView(type="layers", layers=list(config.rootfs.diff_ids)),
        metadata=Metadata(last_tag_time=rfc3339(image.tagged_ns)),
        descriptor=target,
        manifests=manifests_of(store, image, target) if manifests and target else [],
    )


def _last_comment(config: ImageConfig) -> str:
    return config.history[-1].comment if config.history else ""


def config_view(config: ImageConfig, version: tuple[int, int]) -> dict[str, object]:
    """An image's ``Config`` as the API shows it: with the old fields below 1.50."""
    run = config.run
    view: dict[str, object] = {}
    if version < (1, 50):
        view |= {
            "Hostname": run.hostname,
            "Domainname": run.domainname,
            "AttachStdin": run.attach_stdin,
            "AttachStdout": run.attach_stdout,
            "AttachStderr": run.attach_stderr,
            "Tty": run.tty,
            "OpenStdin": run.open_stdin,
            "StdinOnce": run.stdin_once,
            "Image": run.image,
        }
    view |= {
        "User": run.user,
        "Env": run.env,
        "Cmd": run.cmd,
        "Volumes": run.volumes,
        "WorkingDir": run.working_dir,
        "Entrypoint": run.entrypoint,
        "OnBuild": run.on_build,
        "Labels": run.labels,
    }
    optional: dict[str, object] = {
        "ExposedPorts": run.exposed_ports,
        "Healthcheck": run.healthcheck,
        "ArgsEscaped": run.args_escaped,
        "StopSignal": run.stop_signal,
        "StopTimeout": run.stop_timeout,
        "Shell": run.shell,
    }
    return view | {key: value for key, value in optional.items() if value}
