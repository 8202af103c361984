"""An image of Debian with Node and Go, made of packages once on this machine."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path

from tests.support.images import CREATED, PATH_ENV

from lazarette.runtime.images.assembly import assemble
from lazarette.runtime.images.mmdebstrap import Rootfs, cached_rootfs, host_suite
from lazarette.runtime.images.model import RunConfig

IMAGE = "toolchain:latest"
PACKAGES = ("nodejs", "golang-go", "ca-certificates")


def archive() -> Path:
    """The image as a docker archive."""
    path = Path(tempfile.gettempdir()) / "lazarette-tests" / "toolchain.tar"
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            rootfs = cached_rootfs(Rootfs(PACKAGES, host_suite()))
            beside = path.with_suffix(".new")
            config = RunConfig(env=[PATH_ENV], cmd=["bash"])
            with beside.open("wb") as target:
                layers = [(rootfs, "mmdebstrap " + " ".join(PACKAGES))]
                assemble(target, layers, config=config, tags=[IMAGE], created=CREATED)
            beside.rename(path)
    return path
