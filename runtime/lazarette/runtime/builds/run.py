"""RUN: the process, what is mounted for it, and what it sees."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lazarette.runtime.builds.cachemounts import CacheMounts
from lazarette.runtime.builds.errors import StepFailed
from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.builds.instructions import Run
from lazarette.runtime.builds.mounts import MountKind, StepMount, parse_mount
from lazarette.runtime.builds.runner import RunMount
from lazarette.runtime.builds.sources import SourceTree
from lazarette.runtime.builds.state import StageState
from lazarette.runtime.builds.work import Work
from lazarette.storage import copying, mounts
from lazarette.storage.beneath import opened, remove_path
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.overlay import stack

AGENT_FOLDER: Final = "/run/buildkit"
_SOLE_HEREDOC = re.compile(r"\d*<<-?\s*[^<\s]+")


@dataclass(frozen=True)
class Script:
    """What a RUN executes.

    Attributes:
        argv: the process.
        file: name and bytes of a script that is mounted at ``/dev/pipes``; None without.
    """

    argv: tuple[str, ...]
    file: tuple[str, bytes] | None = None


def script_of(step: Run, shell: Sequence[str]) -> Script:
    """The process of a RUN: exec form, shell form, or a heredoc.

    A RUN that is only a heredoc has it as its script, run by the interpreter its first
    line names, or by the shell; else the shell gets the line and the heredocs' bodies.
    """
    if not step.shell:
        return Script(step.words)
    line = step.words[0]
    if not step.heredocs:
        return Script((*shell, line))
    only = step.heredocs[0]
    if len(step.heredocs) == 1 and _SOLE_HEREDOC.fullmatch(line.strip()):
        if only.content.startswith("#!"):
            path = f"/dev/pipes/{only.name}"
            return Script((path,), (path, only.content.encode("utf-8", "surrogateescape")))
        return Script((*shell, only.content))
    bodies = "".join(f"{doc.content}{doc.name}\n" for doc in step.heredocs)
    return Script((*shell, f"{line}\n{bodies}"))


def environment(state: StageState) -> list[str]:
    """What the process sees: ENV, then declared ARGs and proxies that ENV does not name."""
    env = list(state.config.env or [])
    known = state.env
    extra = {**state.scope.proxies(known), **state.scope.run_args(known)}
    return env + [f"{name}={value}" for name, value in extra.items()]


def expanded_mounts(step: Run, expander: Expander) -> list[StepMount]:
    """The mounts of a RUN with variables substituted."""
    return [parse_mount(text, expander) for text in step.mounts]


class MountMaker:
    """Makes the host side of a step's mounts, for the length of a block.

    Args:
        work: the build.
        caches: folders of cache mounts.
        origin: opens what ``from`` names, a layer with an id map; the build context for an
            empty name.
        working_dir: targets may be relative to it.
        idmap: whom the users of the step are on the host; it sees its mounts with it.
    """

    def __init__(
        self,
        work: Work,
        caches: CacheMounts,
        origin: Callable[[str, IdMap | None], SourceTree],
        working_dir: str,
        idmap: IdMap | None,
    ) -> None:
        self._work = work
        self._caches = caches
        self._origin = origin
        self._cwd = working_dir or "/"
        self._idmap = idmap
        self._env: list[str] = []

    @contextmanager
    def made(
        self, wanted: Sequence[StepMount], script: Script
    ) -> Iterator[tuple[list[RunMount], list[str]]]:
        """Mounts for the runner, and variables that go with them.

        Raises:
            StepFailed: a source, secret or agent is missing.
        """
        with ExitStack() as until:
            found: list[RunMount] = []
            for mount in wanted:
                one = self._make(mount, until)
                if one is not None:
                    found.append(one)
            if script.file is not None:
                path, content = script.file
                file = self._temporary(until) / "script"
                file.write_bytes(content)
                file.chmod(0o755)
                found.append(RunMount(path, self._mapped(file, until), False))
            yield found, self._env

    def _target(self, mount: StepMount) -> str:
        return os.path.normpath(os.path.join("/", self._cwd, mount.target))

    def _make(self, mount: StepMount, until: ExitStack) -> RunMount | None:
        if mount.kind is MountKind.TMPFS:
            size = (f"size={mount.size}",) if mount.size else ()
            return RunMount(self._target(mount), None, True, ("exec", "mode=1777", *size))
        if mount.kind is MountKind.BIND:
            return self._bind(mount, until)
        if mount.kind is MountKind.CACHE:
            return self._cache(mount, until)
        if mount.kind is MountKind.SECRET:
            return self._secret(mount, until)
        return self._agent(mount, until)

    def _bind(self, mount: StepMount, until: ExitStack) -> RunMount:
        tree = self._origin(mount.origin, self._idmap)
        source = self._host_path(mount, tree)
        if tree.is_context:
            source = self._mapped(source, until)
        if not mount.writable:
            return RunMount(self._target(mount), source, False)
        if not source.is_dir():
            copy = self._temporary(until) / source.name
            with opened(source.parent) as above, opened(copy.parent) as into:
                name = os.fsencode(source.name)
                status = os.stat(name, dir_fd=above, follow_symlinks=False)
                copying.copy_entry(above, name, status, into, name)
            return RunMount(self._target(mount), copy, True)
        return RunMount(self._target(mount), self._discarded(source, until), True)

    def _discarded(self, source: Path, until: ExitStack) -> Path:
        """The folder with a layer on it that takes writes and is thrown away."""
        base = self._temporary(until)
        for name in ("upper", "work", "merged"):
            (base / name).mkdir()
        if self._idmap is not None:
            os.chown(base / "upper", *self._idmap.root)
        stack([source], base / "upper", base / "work", base / "merged")
        until.callback(mounts.unmount, base / "merged")
        return base / "merged"

    def _mapped(self, path: Path, until: ExitStack) -> Path:
        """A file or folder of ours as the step is to see it, with the owners it knows."""
        if self._idmap is None:
            return path
        place = self._temporary(until) / path.name
        if path.is_dir():
            place.mkdir()
        else:
            place.touch()
        mounts.bind(path, place, recursive=False, user_namespace=self._idmap.namespace)
        until.callback(mounts.unmount, place, detach=True)
        return place

    @staticmethod
    def _host_path(mount: StepMount, tree: SourceTree) -> Path:
        path = os.fsencode(mount.source or "/")
        if tree.tree.status(path, follow=True) is None:
            where = mount.origin or "the build context"
            raise StepFailed(f"RUN --mount failed: {mount.source} is not in {where}")
        return tree.tree.root / os.fsdecode(tree.tree.real(path))

    def _cache(self, mount: StepMount, until: ExitStack) -> RunMount:
        initial: Path | None = None
        if mount.origin:
            initial = self._host_path(mount, self._origin(mount.origin, None))
        folder = until.enter_context(self._caches.used(mount, initial, self._work.cancelled))
        return RunMount(self._target(mount), self._mapped(folder, until), mount.writable)

    def _secret(self, mount: StepMount, until: ExitStack) -> RunMount | None:
        secret = self._work.options.secrets.get(mount.id)
        if secret is None:
            if mount.required:
                raise StepFailed(
                    f"secret {mount.id}: not found",
                    hint=f"pass it with laz build --secret id={mount.id},src=FILE",
                )
            return None
        if mount.env:
            self._env.append(f"{mount.env}={secret.data.decode('utf-8', 'surrogateescape')}")
            if not mount.target:
                return None
        folder = self._memory(until)
        file = folder / "secret"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with open(descriptor, "wb") as target:
            target.write(secret.data)
            os.fchown(descriptor, mount.uid, mount.gid)
            os.fchmod(descriptor, 0o400 if mount.mode is None else mount.mode)
        return RunMount(self._target(mount), self._mapped(file, until), False)

    def _agent(self, mount: StepMount, until: ExitStack) -> RunMount | None:
        path = self._work.options.ssh.get(mount.id)
        if path is None:
            if mount.required:
                raise StepFailed(
                    f"ssh agent {mount.id}: not found", hint="pass it with laz build --ssh default"
                )
            return None
        if not Path(path).is_socket():
            raise StepFailed(f"ssh agent {mount.id}: {path} is not a socket")
        number = sum(line.startswith("SSH_AUTH_SOCK=") for line in self._env)
        target = mount.target or f"{AGENT_FOLDER}/ssh_agent.{number}"
        if number == 0:
            self._env.append(f"SSH_AUTH_SOCK={target}")
        return RunMount(target, self._mapped(Path(path), until), True)

    def _temporary(self, until: ExitStack) -> Path:
        folder = self._work.folder / "mounts" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        until.callback(remove_path, folder)
        return folder

    def _memory(self, until: ExitStack) -> Path:
        """A folder that never reaches a disk, for secrets."""
        folder = self._temporary(until)
        mounts.mount("tmpfs", folder, {"source": "secrets", "mode": "0700", "size": "8m"})
        until.callback(mounts.unmount, folder, detach=True)
        return folder


def stub_targets(found: Sequence[RunMount]) -> dict[str, bool]:
    """Where a step's mounts go, and whether each is a folder."""
    return {
        mount.target: mount.source is None or mount.source.is_dir()
        for mount in found
        if not mount.target.startswith(("/dev/", "/proc/", "/sys/"))
    }


class Sandboxes:
    """Remembers whether a build has a network sandbox to give back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def use(self, name: str) -> str:
        """A step uses it."""
        with self._lock:
            self._names.add(name)
        return name

    def names(self) -> set[str]:
        """All that were used."""
        with self._lock:
            return set(self._names)
