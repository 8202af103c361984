"""A PostgreSQL image out of Debian packages, for hosts no registry reaches.

``python -m lazarette.runtime.images.postgres OUT.tar`` writes an archive for
``docker load``; the image behaves as people know it from Docker's ``postgres``: see
``files/postgres-entrypoint.sh``.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lazarette.runtime.images.assembly import assemble
from lazarette.runtime.images.mmdebstrap import DEFAULT_CACHE, Rootfs, cached_rootfs, host_suite
from lazarette.runtime.images.model import RunConfig
from lazarette.storage.clock import NANOSECONDS, Clock, SystemClock, rfc3339
from lazarette.storage.errors import LazaretteError

DATA = "/var/lib/postgresql/data"
_BIN = "/usr/lib/postgresql/current/bin"
_PACKAGES = ("postgresql", "libnss-wrapper", "zstd", "xz-utils")

# The user exists before its package asks for one, so that its number is the one volumes of
# Docker's image have; the package makes no cluster: the first start does.
_BEFORE = (
    "echo 'postgres:x:999:' >> \"$1/etc/group\"",
    "echo 'postgres:x:999:999::/var/lib/postgresql:/bin/bash' >> \"$1/etc/passwd\"",
    "echo 'postgres:*:19000:0:99999:7:::' >> \"$1/etc/shadow\"",
    'mkdir -p "$1/etc/postgresql-common"',
    "echo 'create_main_cluster = false' > \"$1/etc/postgresql-common/createcluster.conf\"",
)
_AFTER = (
    'cd "$1/usr/lib/postgresql" && ln -s [0-9]* current',
    "sed -i \"s/^#listen_addresses = .*/listen_addresses = '*'/\""
    ' "$1"/usr/share/postgresql/[0-9]*/postgresql.conf.sample',
    'mkdir -p "$1/docker-entrypoint-initdb.d"',
    f'install -d -o 999 -g 999 -m 1777 "$1{DATA}"',
    'chown 999:999 "$1/var/lib/postgresql"',
)


def config() -> RunConfig:
    """The image's container defaults."""
    return RunConfig(
        env=[
            f"PATH={_BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG=C.UTF-8",
            f"PGDATA={DATA}",
        ],
        entrypoint=["docker-entrypoint.sh"],
        cmd=["postgres"],
        exposed_ports={"5432/tcp": {}},
        volumes={DATA: {}},
        stop_signal="SIGINT",
    )


def build(
    output: Path,
    *,
    tags: Sequence[str] = ("postgres:latest",),
    cache: Path = DEFAULT_CACHE,
    clock: Clock | None = None,
) -> str:
    """Write the image as a Docker archive.

    Args:
        output: the archive; replaced only by a whole one.
        tags: names the image gets when loaded.
        cache: folder for the root filesystem.
        clock: tells the cache's age.

    Returns:
        The image's id.

    Raises:
        MissingFeature: mmdebstrap is not installed, or the host is not Debian.
        CommandFailed: packages could not be fetched or installed.
    """
    wanted = Rootfs(_PACKAGES, host_suite(), _BEFORE, _AFTER)
    rootfs = cached_rootfs(wanted, cache=cache, clock=clock)
    created = rfc3339(rootfs.stat().st_mtime_ns // NANOSECONDS * NANOSECONDS)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".image-") as folder:
        scripts = Path(folder) / "scripts.tar"
        scripts.write_bytes(_scripts())
        made = Path(folder) / "image.tar"
        with made.open("wb") as target:
            image_id = assemble(
                target,
                [
                    (rootfs, f"mmdebstrap {wanted.suite} {' '.join(_PACKAGES)}"),
                    (scripts, "COPY docker-entrypoint.sh /usr/local/bin/"),
                ],
                config=config(),
                tags=tags,
                created=created,
            )
        os.rename(made, output)
    return image_id


def _scripts() -> bytes:
    """The layer with the entry point and the socket's folder; the same bytes every time."""
    source = resources.files("lazarette.runtime.images") / "files" / "postgres-entrypoint.sh"
    script = source.read_bytes()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("usr/local/bin/docker-entrypoint.sh")
        entry.size, entry.mode = len(script), 0o755
        tar.addfile(entry, io.BytesIO(script))
        # mmdebstrap empties /run, so the folder of the socket comes in this layer.
        sockets = tarfile.TarInfo("run/postgresql")
        sockets.type, sockets.mode, sockets.uid, sockets.gid = tarfile.DIRTYPE, 0o3777, 999, 999
        tar.addfile(sockets)
    return packed.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lazarette.runtime.images.postgres OUT.tar [TAG...]``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        print("usage: python -m lazarette.runtime.images.postgres OUT.tar [TAG...]")
        return 2
    try:
        image_id = build(
            Path(given[0]).absolute(), tags=given[1:] or ("postgres:latest",), clock=SystemClock()
        )
    except LazaretteError as error:
        print(f"postgres image: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(image_id)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
