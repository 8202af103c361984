"""The builder: an image from a context and a Dockerfile.

Stages that the target does not need are left out; the others run side by side, each when
what it needs is finished.  Everything runs in threads; messages go to one callback in the
order of the file.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from lazarette.runtime.builds import context as contexts
from lazarette.runtime.builds import remote
from lazarette.runtime.builds.cache import BuildCache
from lazarette.runtime.builds.cachemounts import CacheMounts
from lazarette.runtime.builds.context import Context, Memo, Memos
from lazarette.runtime.builds.errors import DockerfileError, placed
from lazarette.runtime.builds.instructions import Instruction, Label
from lazarette.runtime.builds.named import NamedContexts, Uploads
from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.builds.parser import decode, parse
from lazarette.runtime.builds.progress import Emit, Ordered
from lazarette.runtime.builds.run import Sandboxes
from lazarette.runtime.builds.runner import StepRunner
from lazarette.runtime.builds.scope import BuildArgs, GlobalScope, StageScope, platform_args
from lazarette.runtime.builds.squash import squashed
from lazarette.runtime.builds.stage import Origin, StageRunner, branch_origin
from lazarette.runtime.builds.stages import SCRATCH, Plan, Stage, make_plan, stage_origin
from lazarette.runtime.builds.state import StageState, copy_config, with_path
from lazarette.runtime.builds.tree import Tree
from lazarette.runtime.builds.work import Pull, Services, Work, remove_leftovers
from lazarette.runtime.images import reference
from lazarette.runtime.images.model import Image, Platform, digest_of, host, parse_platform
from lazarette.runtime.images.reference import Reference
from lazarette.runtime.images.store import ImageStore
from lazarette.storage import beneath
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Cancelled, NotFound
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.state import State

_PARALLEL = 4


def no_pull(ref: str, platform: str, options: BuildOptions, emit: Emit) -> None:
    """For a builder without registries: only images of the store are known."""
    raise NotFound(f"no such image: {ref}", hint=f"laz pull {ref}")


@dataclass(frozen=True)
class Built:
    """What a build gave: the image's id."""

    image_id: str


class Builder:
    """Builds images.

    Args:
        images: image store.
        layers: layer driver, the store's own.
        runner: runs RUN steps.
        state: the daemon's database.
        clock: dates everything.
        root: folder for contexts and cache mounts.
        pull: fetches base images.
    """

    def __init__(
        self,
        images: ImageStore,
        layers: LayerDriver,
        runner: StepRunner,
        state: State,
        clock: Clock,
        root: Path,
        pull: Pull = no_pull,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.cache = BuildCache(state, clock, lambda chain: images.layers.get(chain) is not None)
        self.mounts = CacheMounts(root / "cache", clock)
        self.root = root
        self._memos = Memos()
        self.uploads = Uploads(root / "uploads", clock)
        images.holders.append(self.held_layers)
        self._services = Services(images, layers, runner, self.cache, clock, root, pull)

    def recover(self) -> None:
        """Remove what the builds of a killed daemon left; called once at start."""
        self._services.runner.recover()
        remove_leftovers(self._services.layers, self.root)
        self.uploads.recover()

    def held_layers(self) -> set[str]:
        """Chain ids the cache keeps, with all that is below them."""
        held: set[str] = set()
        for chain in self.cache.chains():
            layer = self._services.images.layers.get(chain)
            while layer is not None and layer.chain not in held:
                held.add(layer.chain)
                layer = self._services.images.layers.get(layer.parent) if layer.parent else None
        return held

    @property
    def images(self) -> ImageStore:
        """The store built images go to."""
        return self._services.images

    async def build(self, stream: BinaryIO | None, options: BuildOptions, emit: Emit) -> Built:
        """Build an image.

        Args:
            stream: the context's tar, read in a thread; None with ``options.remote``.
            options: everything else.
            emit: called in the event loop with each message.

        Raises:
            DockerfileError, ContextError, StageNotFound: before anything runs.
            StepFailed: a step ended badly.
            Cancelled: by cancelling the task.
        """
        loop = asyncio.get_running_loop()
        stop = threading.Event()

        def tell(message: Mapping[str, object]) -> None:
            loop.call_soon_threadsafe(emit, message)

        running = asyncio.ensure_future(
            asyncio.to_thread(self.build_blocking, stream, options, tell, stop)
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            try:
                await running
            except Cancelled:
                pass
            raise

    def build_blocking(
        self,
        stream: BinaryIO | None,
        options: BuildOptions,
        emit: Emit,
        stop: threading.Event | None = None,
    ) -> Built:
        """As :meth:`build`, in the calling thread; ``stop`` cancels."""
        folder = self.root / "running" / secrets.token_hex(8)
        folder.mkdir(parents=True, mode=0o700)
        try:
            with ExitStack() as until:
                work = Work(
                    self._services,
                    options,
                    self._context(stream, options, folder, until),
                    NamedContexts(options.contexts, self.uploads, folder, until),
                    folder,
                )
                if stop is not None:
                    work.cancelled = stop
                with self._services.images.working():
                    return Build(work, self.mounts, emit).run()
        finally:
            self.cache.flush()
            beneath.remove_path(folder)

    def _context(
        self, stream: BinaryIO | None, options: BuildOptions, folder: Path, until: ExitStack
    ) -> Context:
        root = folder / "context"
        if options.remote:
            fetched = remote.fetch_context(options.remote, folder / "remote")
            given = fetched if isinstance(fetched, bytes) else None
            root.mkdir()
            tree = until.enter_context(Tree(root if isinstance(fetched, bytes) else fetched))
            return Context(lambda: tree, options.dockerfile, Memo(), given)
        packed = folder / "context.tar"
        digest = contexts.spool(stream or io.BytesIO(), packed)

        @cache
        def opened() -> Tree:
            root.mkdir()
            with packed.open("rb") as file:
                contexts.unpack(file, root)
            packed.unlink()
            return until.enter_context(Tree(root))

        return Context(opened, options.dockerfile, self._memos.of(digest))


class Build:
    """One build.

    Args:
        work: context, options, services.
        mounts: cache mounts.
        emit: where messages go.
    """

    def __init__(self, work: Work, mounts: CacheMounts, emit: Emit) -> None:
        self._work = work
        self._options = work.options
        self._mounts = mounts
        self._emit = emit
        self._sandboxes = Sandboxes()
        self._results: dict[int, Future[StageState]] = {}
        self._late = threading.Lock()
        self._host = host()
        self._platform = parse_platform(self._options.platform) or self._host
        given = {n: v for n, v in self._options.build_args.items() if v is not None}
        self._args = BuildArgs(given)

    def run(self) -> Built:
        """Parse, run, store, tag."""
        names = [self._name(tag) for tag in self._options.tags]
        plan = self._plan()
        try:
            state = self._run_stages(plan)
        finally:
            for sandbox in self._sandboxes.names():
                self._work.services.runner.release(sandbox)
        image = self._store(state)
        self._emit({"aux": {"ID": image.id}})
        unused = self._args.unused()
        if unused:
            shown = " ".join(unused)
            self._emit(
                {"stream": f"[Warning] One or more build-args [{shown}] were not consumed\n"}
            )
        self._emit({"stream": f"Successfully built {image.short_id}\n"})
        images = self._work.services.images
        images.announce("create", image.id, image.id)
        for name in names:
            named = images.find(str(name))
            if named is None or named.id != image.id:
                images.tag(image.id, name)
            self._emit({"stream": f"Successfully tagged {name.familiar}\n"})
        return Built(image.id)

    @staticmethod
    def _name(tag: str) -> Reference:
        return reference.parse(tag).with_default_tag()

    def _plan(self) -> Plan:
        context = self._work.context
        file = parse(decode(context.dockerfile, context.name), context.name)
        automatic = platform_args(self._platform, self._host, self._options.target)
        self._globals = GlobalScope(self._args, automatic, file.escape)
        plan = make_plan(file, self._globals, self._options.target, self._work.named)
        if self._options.labels:
            plan.target.steps.append(self._labels(plan))
        return plan

    def _labels(self, plan: Plan) -> Label:
        pairs = tuple(
            (_literal(name), _literal(value))
            for name, value in sorted(self._options.labels.items())
        )
        shown = " ".join(f"{name}={value}" for name, value in sorted(self._options.labels.items()))
        return Label(plan.target.origin.where, f"LABEL {shown}", pairs)

    # ---- stages

    def _run_stages(self, plan: Plan) -> StageState:
        self._ordered = ordered = Ordered(self._emit, list(plan.needed))
        for number, step in enumerate(plan.arguments, 1):
            self._emit({"stream": f"Step {number}/{plan.step_count} : {step.text}\n"})
        workers = min(_PARALLEL, len(plan.needed))
        with ThreadPoolExecutor(workers, thread_name_prefix="build") as pool:
            for number in plan.needed:
                # Submitted in file order: whatever a stage waits for was begun before it.
                self._results[number] = pool.submit(self._stage, plan, number, ordered)
            return self._outcome(plan)

    def _outcome(self, plan: Plan) -> StageState:
        failure: BaseException | None = None
        for number in plan.needed:
            error = self._results[number].exception()
            if error is not None and (failure is None or isinstance(failure, Cancelled)):
                failure = error
        if failure is not None:
            raise failure
        return self._results[plan.needed[-1]].result()

    def _stage(self, plan: Plan, number: int, ordered: Ordered) -> StageState:
        stage = plan.stages[number]
        try:
            for need in sorted(stage.needs):
                self._ensure(plan, need)
                self._wait(need)
            return self._run_stage(plan, stage, ordered)
        except Cancelled:
            raise
        except BaseException:
            self._work.cancelled.set()  # the others need not go on
            raise
        finally:
            ordered.finish(number)

    def _ensure(self, plan: Plan, number: int) -> None:
        """Run a stage nobody could know to be needed: one that a trigger of the base or a
        variable names."""
        with self._late:
            if number in self._results:
                return
            result: Future[StageState] = Future()
            self._results[number] = result
        try:
            result.set_result(self._stage(plan, number, self._ordered))
        except BaseException as failed:
            result.set_exception(failed)
            raise

    def _wait(self, number: int) -> StageState:
        try:
            return self._results[number].result()
        except Exception as failed:
            raise Cancelled("a stage this one needs failed") from failed

    def _run_stage(self, plan: Plan, stage: Stage, ordered: Ordered) -> StageState:
        channel = ordered.channel(stage.number)
        first = plan.first_step(stage.number)
        channel.text(f"Step {first}/{plan.step_count} : {stage.origin.text}\n")
        with placed(stage.origin.where):
            state = self._begin(stage)
        triggers = list(state.config.on_build or [])
        state.config.on_build = None
        channel.text(f" ---> {_shown_base(state)}\n")

        def origin(name: str, step: Instruction) -> Origin:
            return self._origin(name, plan, stage, step)

        runner = StageRunner(
            self._work,
            stage,
            state,
            channel,
            origin,
            self._mounts,
            self._sandboxes,
            (first + 1, plan.step_count),
        )
        runner.triggers(triggers)
        runner.run()
        return state

    def _begin(self, stage: Stage) -> StageState:
        scope = StageScope(self._globals)
        if stage.base_stage is not None:
            before = self._results[stage.base_stage].result()
            scope.declared = dict(before.scope.declared)
            return before.branch(scope)
        platform = parse_platform(stage.platform) or self._platform
        if stage.base == SCRATCH and SCRATCH not in self._work.named:
            state = StageState(scope, platform, key=f"scratch {platform}")
            with_path(state.config)
            return state
        return self._from_image(self._image(stage.base, str(platform)), scope)

    def _from_image(self, image: Image, scope: StageScope) -> StageState:
        config = image.config
        state = StageState(
            scope,
            Platform(
                architecture=config.architecture, os=config.os or "linux", variant=config.variant
            ),
            config=copy_config(config.run),
            diff_ids=list(config.rootfs.diff_ids),
            base_layers=len(config.rootfs.diff_ids),
            history=list(config.history or []),
            base_history=len(config.history or []),
            author=config.author,
            key=image.id,
            created_ns=image.created_ns,
            base_id=image.id,
        )
        with_path(state.config)
        return state

    def _image(self, ref: str, platform: str) -> Image:
        if self._work.named.files(ref) is not None:
            raise DockerfileError(
                f"build context {ref} is a folder and cannot be a base",
                hint=f"COPY --from={ref} . / in a stage FROM scratch",
            )
        ref = self._work.named.image(ref) or ref
        images = self._work.services.images
        image = images.find(ref)
        wanted = self._options.platform
        fits = image is None or not wanted or _fits(image, wanted)
        if image is not None and fits and not self._options.pull:
            return image
        try:
            self._work.services.pull(ref, wanted, self._options, self._emit)
        except NotFound:
            if image is None or not fits or self._options.pull:
                raise
        return images.get(ref)

    def _origin(self, name: str, plan: Plan, stage: Stage, step: Instruction) -> Origin:
        if not name:
            return Origin("", None, "the build context", lambda: self._work.context.source)
        files = self._work.named.files(name)
        if files is not None:
            return Origin("", None, files.name, lambda: files)
        hidden = name in self._work.named
        other = None if hidden else stage_origin(name, stage, plan.stages, step)
        if other is not None:
            self._ensure(plan, other.number)
            return branch_origin(self._wait(other.number), f"stage {name}")
        if name.lower() == SCRATCH and not hidden:
            return Origin("scratch", None, SCRATCH)
        image = self._image(name, str(self._platform))
        return Origin(image.id, image.layer, f"image {name}")

    # ---- the image

    def _store(self, state: StageState) -> Image:
        images = self._work.services.images
        if self._options.squash:
            squashed(self._work, state)
        if not state.created_ns:
            state.created_ns = self._work.now_ns()
        config = state.image_config()
        known = images.find(digest_of(config))
        return known or images.add(config, parent=state.base_id)


def _shown_base(state: StageState) -> str:
    """What a stage begins with, as the stream names it: nothing for scratch."""
    if state.key.startswith(f"{SCRATCH} "):
        return ""
    return (state.base_id.removeprefix("sha256:") or state.key)[:12]


def _fits(image: Image, wanted: str) -> bool:
    platform = parse_platform(wanted)
    config = image.config
    has = Platform(architecture=config.architecture, os=config.os, variant=config.variant)
    return platform is None or platform.accepts(has)


def _literal(text: str) -> str:
    """A text that substitution leaves as it is."""
    return "'" + text.replace("'", "'\"'\"'") + "'"
