"""Running one stage: each instruction from the cache or for real."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lazarette.runtime.builds import history, metadata
from lazarette.runtime.builds import transfer as transfers
from lazarette.runtime.builds.cache import Record, step_key
from lazarette.runtime.builds.cachemounts import CacheMounts
from lazarette.runtime.builds.cachesources import CacheSources
from lazarette.runtime.builds.devices import StepDevice, edits, parse_device
from lazarette.runtime.builds.errors import DockerfileError, Location, StepFailed, placed
from lazarette.runtime.builds.instructions import (
    Instruction,
    OnBuild,
    Run,
    Transfer,
    Volume,
    Workdir,
    instruction,
)
from lazarette.runtime.builds.parser import parse
from lazarette.runtime.builds.progress import Channel
from lazarette.runtime.builds.run import (
    MountMaker,
    Sandboxes,
    environment,
    expanded_mounts,
    script_of,
    stub_targets,
)
from lazarette.runtime.builds.runner import RunRequest
from lazarette.runtime.builds.sources import SourceTree, select
from lazarette.runtime.builds.stages import Stage
from lazarette.runtime.builds.state import StageState
from lazarette.runtime.builds.stubs import Stubs
from lazarette.runtime.builds.tree import Tree
from lazarette.runtime.builds.work import MadeLayer, Work
from lazarette.storage.errors import NoSpace
from lazarette.storage.idmaps import IdMap, as_root

_SHORT = 12


@dataclass(frozen=True)
class Origin:
    """Where a ``from`` leads.

    Attributes:
        key: cache key of the stage or image; empty for a context, known by its content alone.
        layer: its layer; None for a context or for nothing.
        name: for messages.
        files: opens a context's files.
    """

    key: str
    layer: str | None
    name: str
    files: Callable[[], SourceTree] | None = None


class StageRunner:
    """Runs the steps of one stage.

    Args:
        work: the build.
        stage: what to run.
        state: what FROM gave.
        channel: where its messages go.
        origin: finds what a ``from`` names.
        caches: folders of cache mounts.
        sandboxes: notes network sandboxes.
        numbers: the stage's first step after FROM, and the count of all.
    """

    def __init__(
        self,
        work: Work,
        stage: Stage,
        state: StageState,
        channel: Channel,
        origin: Callable[[str, Instruction], Origin],
        caches: CacheMounts,
        sandboxes: Sandboxes,
        numbers: tuple[int, int],
    ) -> None:
        self._work = work
        self._stage = stage
        self._state = state
        self._channel = channel
        self._origin = origin
        self._caches = caches
        self._sandboxes = sandboxes
        self._number, self._count = numbers
        self._sources = CacheSources(work.services.cache, work.services.images, work.options)
        self._use_cache = not work.options.no_cache and not (
            {stage.name, str(stage.number)} & work.options.no_cache_stages
        )

    def run(self) -> None:
        """Run all steps.

        Raises:
            DockerfileError, StepFailed: with the place of the step.
        """
        for step in self._stage.steps:
            self._channel.text(f"Step {self._number}/{self._count} : {step.text}\n")
            self._number += 1
            self._located(step, step.where)

    def triggers(self, texts: Sequence[str]) -> None:
        """Run the ONBUILD triggers of the base."""
        if not texts:
            return
        plural = "s" if len(texts) > 1 else ""
        self._channel.text(f"# Executing {len(texts)} build trigger{plural}\n")
        for text in texts:
            where = replace(self._stage.origin.where, text=f"ONBUILD {text}")
            for statement in parse(text, "ONBUILD").statements:
                self._located(instruction(statement), where)

    def _located(self, step: Instruction, where: Location) -> None:
        self._work.check()
        try:
            with placed(where):
                self._step(step)
        except OSError as refused:
            if refused.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace("building: no space left", hint="laz builder prune") from refused
            raise StepFailed(f"the step failed: {refused}", 1, where) from refused
        self._channel.text(f" ---> {self._state.key[:_SHORT]}\n")

    def _step(self, step: Instruction) -> None:
        if isinstance(step, Run):
            self._run(step)
        elif isinstance(step, Transfer):
            self._transfer(step)
        elif isinstance(step, Workdir):
            self._workdir(step)
        else:
            self._metadata(step)

    # ---- the cache

    def _cached(self, key: str, created_by: str) -> bool:
        """Take a step from the cache, if it is there and nothing before it was missed."""
        if not self._use_cache or self._state.missed:
            return False
        record = self._sources.find(self._state, key, created_by)
        if record is None:
            self._state.missed = True
            return False
        self._take(record, created_by)
        self._state.key = record.alias or key
        return True

    def _take(self, record: Record, created_by: str) -> None:
        self._channel.text(" ---> Using cache\n")
        if record.diff_id:
            self._state.diff_ids.append(record.diff_id)
        self._state.record(created_by, record.created_ns, empty=not record.diff_id)

    def _remember(
        self, key: str, created_by: str, made: MadeLayer | None, *, kind: str, alias: str = ""
    ) -> None:
        state = self._state
        parent, now = state.key, self._work.now_ns()
        if made is not None:
            state.diff_ids.append(made.diff_id)
        state.record(created_by, now, empty=made is None)
        state.key = key
        self._work.services.cache.add(
            Record(
                key,
                parent,
                kind,
                created_by,
                state.chain,
                made.diff_id if made else "",
                made.size if made else 0,
                now,
                alias=alias,
            )
        )

    # ---- steps

    def _metadata(self, step: Instruction) -> None:
        text = metadata.apply(self._state, step)
        if isinstance(step, Volume | OnBuild):
            text = text.rstrip("\n")
        created_by = history.metadata(self._state.shell, text)
        key = step_key(self._state.key, created_by)
        if not self._cached(key, created_by):
            self._remember(key, created_by, None, kind="metadata")

    def _workdir(self, step: Workdir) -> None:
        path = metadata.workdir(self._state, step)
        self._state.config.working_dir = path
        created_by = history.metadata(self._state.shell, f"WORKDIR {path}")
        key = step_key(self._state.key, created_by)
        if self._cached(key, created_by):
            return
        made: MadeLayer | None = None
        with self._work.active(self._state.layer) as layer:
            if not layer.tree.is_folder(path.encode()):
                try:
                    layer.tree.make_folders(path.encode())
                except OSError as refused:
                    raise StepFailed(f"WORKDIR {path} failed: {refused.strerror}") from refused
                made = layer.keep(self._state.chain)
        self._remember(key, created_by, made, kind="layer" if made else "metadata")

    def _run(self, step: Run) -> None:
        state = self._state
        expander = state.scope.expander(state.env)
        mounts = expanded_mounts(step, expander)
        script = script_of(step, state.shell)
        created_by = history.run(state.scope.run_args(state.env), script.argv)
        devices = [parse_device(text) for text in step.devices]
        self._check_entitled(step, devices)
        origins = [self._origin(m.origin, step).key if m.origin else "" for m in mounts]
        parts = [m.key() for m in mounts] + origins + [step.network, step.security]
        parts += [f"device {device.name}" for device in devices]
        if script.file is not None:
            parts.append(script.file[1].decode("utf-8", "surrogateescape"))
        parts += self._bound_contents(step)
        key = step_key(state.key, "RUN", created_by, *parts)
        if self._cached(key, created_by):
            return
        run_id = secrets.token_hex(32)
        self._channel.text(f" ---> Running in {run_id[:_SHORT]}\n")
        made = self._execute(step, run_id)
        if self._work.options.remove:
            self._channel.text(f" ---> Removed intermediate container {run_id[:_SHORT]}\n")
        self._remember(key, created_by, made, kind="layer")

    def _bound_contents(self, step: Run) -> list[str]:
        """Digests of what is bound from contexts: its change is a change."""
        found: list[str] = []
        for mount in expanded_mounts(step, self._state.scope.expander(self._state.env)):
            files = self._origin(mount.origin, step).files
            if mount.kind.value == "bind" and files is not None:
                for chosen in select(
                    files(), mount.source or ".", parents=False, exclude=(), word="RUN --mount"
                ):
                    found.append(chosen.digest())
        return found

    def _check_entitled(self, step: Run, devices: Sequence[StepDevice]) -> None:
        allowed = self._work.options.entitlements
        if step.network == "host" and "network.host" not in allowed:
            raise DockerfileError(
                "RUN --network=host is not allowed", hint="laz build --allow network.host"
            )
        if step.security == "insecure" and "security.insecure" not in allowed:
            raise DockerfileError(
                "RUN --security=insecure is not allowed",
                hint="laz build --allow security.insecure",
            )
        for device in devices:
            if not device.allowed(allowed):
                raise DockerfileError(
                    f"RUN --device={device.name} is not allowed",
                    hint=f"laz build --allow device={device.name}",
                )

    def _execute(self, step: Run, run_id: str) -> MadeLayer | None:
        work, state, runner = self._work, self._state, self._work.services.runner
        expander = state.scope.expander(state.env)
        script = script_of(step, state.shell)
        idmap = None if step.security == "insecure" else runner.idmap
        with ExitStack() as until, work.active(state.layer, idmap) as layer:

            def source(origin: str, seen: IdMap | None) -> SourceTree:
                return self._opened(self._origin(origin, step), until, seen)

            maker = MountMaker(work, self._caches, source, state.config.working_dir, idmap)
            found, extra = until.enter_context(maker.made(expanded_mounts(step, expander), script))
            stubs = Stubs(layer.tree)
            with as_root(idmap):
                stubs.make({**runner.targets(), **stub_targets(found)})
            try:
                request = RunRequest(
                    id=run_id,
                    root=layer.root,
                    argv=script.argv,
                    env=[*environment(state), *extra],
                    cwd=state.config.working_dir or "/",
                    user=state.config.user,
                    mounts=found,
                    network=step.network if step.network != "default" else work.options.network,
                    sandbox=self._sandboxes.use(work.id),
                    extra_hosts=work.options.extra_hosts,
                    limits=work.options.limits,
                    privileged=step.security == "insecure",
                    devices=edits([parse_device(text) for text in step.devices]),
                    idmap=idmap,
                )
                code = runner.run(request, self._channel.output, work.cancelled)
            finally:
                stubs.clear()
            work.check()
            if code != 0:
                raise StepFailed(
                    f"The command '{' '.join(script.argv)}' returned a non-zero code: {code}", code
                )
            return layer.keep(state.chain, stubs.touched)

    def _opened(self, origin: Origin, until: ExitStack, idmap: IdMap | None = None) -> SourceTree:
        """What a ``from`` leads to; of a layer with its owners mapped."""
        if origin.files is not None:
            return origin.files()
        root = until.enter_context(self._work.mounted(origin.layer, idmap))
        tree = until.enter_context(Tree(root))
        return SourceTree(tree, origin.name, False)

    def _transfer(self, step: Transfer) -> None:
        state = self._state
        words = transfers.substitute(
            step, state.scope.expander(state.env), state.config.working_dir
        )
        origin_name = state.scope.expander(state.env).word(step.origin)
        origin = self._origin(origin_name, step) if step.origin else None
        word = "ADD" if step.add else "COPY"
        quick = ""
        if origin is None and self._known(step, words, word):
            return
        if origin is not None and origin.files is None:
            # What is copied follows from the stage's key: no need to read it again.
            quick = step_key(state.key, word, origin.key, *words.sources, words.key(step))
            if self._quickly(quick):
                return
        with ExitStack() as until:
            source = self._opened(origin, until) if origin else self._work.context.source
            downloads = self._work.folder / "downloads"
            found = until.enter_context(transfers.gather(step, words, source, downloads))
            created_by = self._created_by(words, word, found.digest)
            if origin is None and not found.remote:
                self._work.context.remember(words.memo_key(step), found.digest)
            key = step_key(state.key, word, found.digest, words.key(step))
            before = state.key
            if self._cached(key, created_by):
                if quick:
                    self._alias(quick, before, created_by, key)
                return
            with self._work.active(state.layer) as layer:
                transfers.copy(found, words, step, layer.tree, self._work.now_ns())
                made = layer.keep(state.chain)
            self._remember(key, created_by, made, kind="layer" if made else "metadata")
            if quick:
                self._alias(quick, before, created_by, key)

    def _created_by(self, words: transfers.Words, word: str, digest: str) -> str:
        chown = f"--chown={words.chown} " if words.chown else ""
        chmod = f"--chmod={words.mode_text} " if words.mode_text else ""
        return history.transfer(self._state.shell, word, f"{chown}{chmod}{digest}", words.shown)

    def _known(self, step: Transfer, words: transfers.Words, word: str) -> bool:
        """Take a COPY from the cache whose context had the same bytes before."""
        digest = self._work.context.known(words.memo_key(step))
        if digest is None:
            return False
        key = step_key(self._state.key, word, digest, words.key(step))
        return self._cached(key, self._created_by(words, word, digest))

    def _quickly(self, quick: str) -> bool:
        """Take a COPY --from whose stage is known; no miss if it is not."""
        if not self._use_cache or self._state.missed or self._work.options.cache_from:
            return False
        cache = self._work.services.cache
        alias = cache.find(quick)
        record = cache.find(alias.alias) if alias is not None else None
        if record is None:
            return False
        self._take(record, record.description)
        self._state.key = record.key
        return True

    def _alias(self, quick: str, before: str, created_by: str, key: str) -> None:
        self._work.services.cache.add(
            Record(quick, before, "alias", created_by, "", "", 0, self._work.now_ns(), alias=key)
        )


def branch_origin(result: StageState, name: str) -> Origin:
    """A finished stage as an origin."""
    return Origin(result.key, result.layer, name)
