"""Steps that change only the image's configuration, and the text each leaves in the history."""

from __future__ import annotations

import posixpath
import re
import signal
from collections.abc import Callable

from lazarette.runtime.builds import history
from lazarette.runtime.builds.errors import DockerfileError
from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.builds.instructions import (
    Arg,
    Cmd,
    Command,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    OnBuild,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
)
from lazarette.runtime.builds.scope import set_env
from lazarette.runtime.builds.state import StageState
from lazarette.runtime.images import model

_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_LAST_PORT = 65535


def apply(state: StageState, step: Instruction) -> str:
    """Change a stage's configuration as a step says.

    Returns:
        The step's text for history and cache key, without the shell's prefix.

    Raises:
        DockerfileError: a value that cannot be.
    """
    for kind, change in _CHANGES.items():
        if isinstance(step, kind):
            return change(state, step)
    raise DockerfileError(f"{step.text} does not only change the configuration")


def is_metadata(step: Instruction) -> bool:
    """Whether a step is one of these; WORKDIR is not, it makes a folder."""
    return isinstance(step, tuple(_CHANGES))


def workdir(state: StageState, step: Workdir) -> str:
    """The absolute working folder a WORKDIR leads to."""
    path = _expander(state).word(step.value).strip()
    if not path:
        raise DockerfileError("WORKDIR requires a path that is not blank")
    current = state.config.working_dir or "/"
    return posixpath.normpath(posixpath.join("/", current, path)).replace("//", "/", 1)


def _expander(state: StageState) -> Expander:
    return state.scope.expander(state.env)


def _env(state: StageState, step: Env) -> str:
    expander = _expander(state)
    made = [(expander.word(name), expander.word(value)) for name, value in step.pairs]
    env = list(state.config.env or [])
    for name, value in made:
        if not name:
            raise DockerfileError("ENV names can not be blank")
        set_env(env, name, value)
    state.config.env = env
    return "ENV " + " ".join(f"{name}={value}" for name, value in made)


def _label(state: StageState, step: Label) -> str:
    expander = _expander(state)
    made = [(expander.word(name), expander.word(value)) for name, value in step.pairs]
    labels = dict(state.config.labels or {})
    for name, value in made:
        if not name:
            raise DockerfileError("LABEL names can not be blank")
        labels[name] = value
    state.config.labels = labels
    return "LABEL " + " ".join(f"{name}={value}" for name, value in made)


def _arg(state: StageState, step: Arg) -> str:
    made = state.scope.declare(step.names, state.env)
    return "ARG " + " ".join(
        name if default is None else f"{name}={default}" for name, default in made
    )


def _argv(state: StageState, step: Command) -> list[str]:
    if not step.shell:
        return list(step.words)
    return [*state.shell, step.words[0]] if step.words and step.words[0] else []


def _cmd(state: StageState, step: Cmd) -> str:
    argv = _argv(state, step)
    state.config.cmd = argv
    state.cmd_set = True
    return "CMD " + history.quoted(argv)


def _entrypoint(state: StageState, step: Entrypoint) -> str:
    argv = _argv(state, step)
    state.config.entrypoint = argv or None
    if not state.cmd_set:
        state.config.cmd = None
    return "ENTRYPOINT " + history.quoted(argv)


def _maintainer(state: StageState, step: Maintainer) -> str:
    state.author = step.value
    return f"MAINTAINER {step.value}"


def _expose(state: StageState, step: Expose) -> str:
    expander = _expander(state)
    words = [word for text in step.words for word in expander.words(text)]
    ports = dict(state.config.exposed_ports or {})
    for word in words:
        for port in _ports(word):
            ports[port] = {}
    state.config.exposed_ports = dict(sorted(ports.items()))
    return "EXPOSE " + " ".join(sorted(words))


def _ports(word: str) -> list[str]:
    match = _PORT.fullmatch(word)
    first = int(match[1]) if match else 0
    final = int(match[2] or match[1]) if match else 0
    if match is None or not 0 < first <= final <= _LAST_PORT:
        raise DockerfileError(f"invalid containerPort: {word}")
    return [f"{port}/{(match[3] or 'tcp').lower()}" for port in range(first, final + 1)]


def _volume(state: StageState, step: Volume) -> str:
    expander = _expander(state)
    paths = [expander.word(word).strip() for word in step.words]
    if not all(paths):
        raise DockerfileError("VOLUME specified can not be an empty string")
    volumes = dict(state.config.volumes or {})
    for path in paths:
        volumes[path] = {}
    state.config.volumes = volumes
    return "VOLUME " + history.plain(paths)


def _user(state: StageState, step: User) -> str:
    user = _expander(state).word(step.value)
    if not user:
        raise DockerfileError("USER requires a name that is not blank")
    state.config.user = user
    return f"USER {user}"


def _stop_signal(state: StageState, step: StopSignal) -> str:
    name = _expander(state).word(step.value)
    if not _is_signal(name):
        raise DockerfileError(f"Invalid signal: {name}")
    state.config.stop_signal = name
    return f"STOPSIGNAL {name}"


def _is_signal(name: str) -> bool:
    if name.isdecimal():
        return 0 < int(name) <= signal.SIGRTMAX
    plain = name.upper().removeprefix("SIG")
    if real_time := re.fullmatch(r"RT(MIN|MAX)(?:([+-])(\d{1,2}))?", plain):
        return int(real_time[3] or 0) <= signal.SIGRTMAX - signal.SIGRTMIN
    return f"SIG{plain}" in signal.Signals.__members__


def _shell(state: StageState, step: Shell) -> str:
    state.config.shell = list(step.words)
    return "SHELL " + history.plain(step.words)


def _onbuild(state: StageState, step: OnBuild) -> str:
    state.config.on_build = [*(state.config.on_build or []), step.value]
    return f"ONBUILD {step.value}"


def _healthcheck(state: StageState, step: Healthcheck) -> str:
    test = list(step.test)
    check = model.Healthcheck(
        test=test,
        interval=step.interval,
        timeout=step.timeout,
        start_period=step.start_period,
        start_interval=step.start_interval,
        retries=step.retries,
    )
    state.config.healthcheck = check
    return history.healthcheck(check)


_CHANGES: dict[type[Instruction], Callable[..., str]] = {
    Env: _env,
    Label: _label,
    Arg: _arg,
    Cmd: _cmd,
    Entrypoint: _entrypoint,
    Maintainer: _maintainer,
    Expose: _expose,
    Volume: _volume,
    User: _user,
    StopSignal: _stop_signal,
    Shell: _shell,
    OnBuild: _onbuild,
    Healthcheck: _healthcheck,
}
