"""Which OCI runtime runs containers on this host, found by trying.

crun is preferred: it starts a container in a third of runc's time.  crun refuses to
create on a hybrid cgroup layout whose cgroup2 tree holds a controller ("cgroups in
hybrid mode not supported").  It judges by what is mounted on ``/sys/fs/cgroup/unified``,
so it is started there through a wrapper that takes this mount away in a mount namespace
of its own, where everything else keeps its propagation.  Only ``create`` looks at it;
the other commands run crun itself.  Where even that fails, runc is used.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from lazarette.runtime.containers.cgroups import Hierarchies, Layout
from lazarette.runtime.containers.errors import RuntimeMissing
from lazarette.storage import process
from lazarette.storage.errors import InvalidArgument

_SHELL_WRAPPER = """#!/bin/sh
# Written by lazd at start: crun with {unified} taken away (see containers/oci.py).
exec unshare --mount --propagation unchanged /bin/sh -c \
'mount --make-private {parent} && umount {unified} && exec {crun} "$@"' crun "$@"
"""

# The same in one process instead of five: numbers of unshare, mount and umount2, then
# CLONE_NEWNS and MS_PRIVATE, from the kernel's tables for this machine.
_PERL_WRAPPER = """#!{perl}
# Written by lazd at start: crun with {unified} taken away (see containers/oci.py).
my ($parent, $unified, $none) = ("{parent}", "{unified}", "");
syscall({unshare}, 0x20000) == 0 or die "unshare: $!\\n";
syscall({mount}, $none, $parent, $none, 0x40000, 0) == 0 or die "make $parent private: $!\\n";
syscall({umount2}, $unified, 0) == 0 or die "umount $unified: $!\\n";
exec {{ "{crun}" }} "crun", @ARGV or die "crun: $!\\n";
"""
_CALLS = {
    "x86_64": {"unshare": 272, "mount": 165, "umount2": 166},
    "aarch64": {"unshare": 97, "mount": 40, "umount2": 39},
}


@dataclass(frozen=True)
class OciRuntime:
    """The runtime that was chosen.

    Attributes:
        name: ``crun`` or ``runc``.
        program: the executable for every command but ``create``.
        creator: the executable for ``create``: the program, or a wrapper of it.
        version: what it says of itself.
        reason: why it was chosen, for people.
        root: folder of its state.
    """

    name: str
    program: str
    creator: str
    version: str
    reason: str
    root: Path

    def command(self, *arguments: str) -> list[str]:
        """A command line of it."""
        return [self.program, "--root", str(self.root), *arguments]

    def state_folder(self, container: str) -> Path:
        """Where it keeps a container's state."""
        return self.root / container


def choose(wanted: str, hierarchies: Hierarchies, exec_root: Path) -> OciRuntime:
    """Find the runtime for this host.

    Args:
        wanted: ``crun``, ``runc`` or empty for the best that works.
        hierarchies: the host's control groups.
        exec_root: folder for the wrapper and the runtime's state.

    Raises:
        InvalidArgument: a name that is neither.
        RuntimeMissing: none is installed.
    """
    if wanted not in ("", "crun", "runc"):
        raise InvalidArgument(f'unknown OCI runtime "{wanted}", known are crun and runc')
    crun = shutil.which("crun") if wanted in ("", "crun") else None
    runc = shutil.which("runc") if wanted in ("", "runc") else None
    root = exec_root / "oci"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if crun:
        if hierarchies.layout is not Layout.HYBRID or not hierarchies.unified_controllers:
            reason = f"crun takes this host's {hierarchies.layout.value} control groups as they are"
            return OciRuntime("crun", crun, crun, version(crun), reason, root)
        unified = hierarchies.unified
        held = ", ".join(hierarchies.unified_controllers)
        if unified is not None and shutil.which("unshare"):
            wrapper = _write_wrapper(exec_root, crun, unified)
            reason = f"crun, with the cgroup2 mount that holds {held} taken away for create"
            return OciRuntime("crun", crun, str(wrapper), version(crun), reason, root)
    if runc:
        reason = "runc as configured" if wanted else "crun is not installed or refuses this host"
        return OciRuntime("runc", runc, runc, version(runc), reason, root)
    raise RuntimeMissing("no OCI runtime is installed", hint="apt install crun")


def version(program: str) -> str:
    """The version a runtime or conmon prints, e.g. ``1.8.1``."""
    first = process.run([program, "--version"]).stdout.decode(errors="replace").splitlines()
    return first[0].split()[-1] if first else "unknown"


def _write_wrapper(exec_root: Path, crun: str, unified: Path) -> Path:
    wrapper = exec_root / "crun-create"
    perl, calls = shutil.which("perl"), _CALLS.get(platform.machine())
    values = {"parent": unified.parent, "unified": unified, "crun": crun}
    if perl and calls:
        text = _PERL_WRAPPER.format(perl=perl, **values, **calls)
    else:
        text = _SHELL_WRAPPER.format(**values)
    fresh = wrapper.with_suffix(f".{os.getpid()}")
    fresh.write_text(text)
    fresh.chmod(0o700)
    fresh.replace(wrapper)
    return wrapper


def find_conmon() -> str:
    """The monitor's program.

    Raises:
        RuntimeMissing: it is not installed.
    """
    found = shutil.which("conmon")
    if found is None:
        raise RuntimeMissing("conmon is not installed", hint="apt install conmon")
    return found


def find_init() -> Path | None:
    """A small init for ``--init``: it forwards signals and reaps orphans."""
    for name in ("docker-init", "catatonit", "tini-static", "tini"):
        found = shutil.which(name) or next(
            (p for p in (f"/usr/libexec/podman/{name}",) if os.access(p, os.X_OK)), None
        )
        if found:
            return Path(found)
    return None


def cgroup_parent(exec_root: Path) -> str:
    """The control group all containers of a daemon are below; its own for each exec root."""
    instance = hashlib.sha256(os.fsencode(exec_root.absolute())).hexdigest()[:8]
    return f"/lazarette/{instance}"
