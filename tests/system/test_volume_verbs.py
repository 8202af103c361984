"""Every verb of a volume by hand, on every driver: ``laz volume …`` against a real daemon."""

import io
import json
import secrets
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.daemon import Daemon

MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A driver with options, and what it is said to refuse.

    Attributes:
        grows, shrinks: its limit can be changed so.
        rolls_back: it can be set back in place.
        clone: the driver of its clones, where it is another one.
    """

    driver: str
    options: dict[str, str] = field(default_factory=dict)
    grows: bool = False
    shrinks: bool = False
    rolls_back: bool = True
    clone: str | None = None
    kind: str = "gated"


KINDS = {
    "overlay": Kind("overlay"),
    "overlay-size": Kind("overlay", {"size": "64m"}, grows=True, kind="atomic"),
    "btrfs": Kind("btrfs", grows=True, shrinks=True, kind="atomic"),
    "fuse": Kind("fuse"),
    "fuse-size": Kind("fuse", {"size": "64m"}, grows=True, kind="atomic"),
    "tmpfs": Kind("tmpfs", grows=True, shrinks=True),
    "bind": Kind("bind", clone="btrfs", rolls_back=False, kind="unsafe"),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("verbs"))
    made.start()
    try:
        yield made
    finally:
        made.end()


def tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return out.getvalue()


def content(daemon: Daemon, name: str) -> dict[str, bytes]:
    """The files of a volume or ``NAME@SNAPSHOT``."""
    exported = daemon.laz("volume", "export", name).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        for entry in archive:
            if (file := archive.extractfile(entry)) is not None:
                found[entry.name.removeprefix("./")] = file.read()
    return found


def refused(daemon: Daemon, *arguments: str) -> str:
    done = daemon.laz(*arguments, check=False)
    assert done.returncode != 0, arguments
    said = done.stderr.decode()
    assert "Traceback" not in said
    return said


def driver_of(daemon: Daemon, name: str) -> str:
    """The driver whose folder a volume is in; the default one is shown as ``local``."""
    (seen,) = json.loads(daemon.laz("volume", "inspect", name).stdout)
    return Path(seen["Mountpoint"]).relative_to(daemon.root / "data/volumes").parts[0]


@pytest.mark.slow
@pytest.mark.parametrize("id", KINDS)
def test_every_verb_by_hand(daemon: Daemon, id: str) -> None:
    kind, name = KINDS[id], f"v-{id}-{secrets.token_hex(2)}"
    options = [f"--opt={key}={value}" for key, value in kind.options.items()]
    made = daemon.json("volume", "create", "-d", kind.driver, *options, "--label", "a=b", name)
    assert isinstance(made, dict)
    assert made["Labels"] == {"a": "b"}
    assert name in daemon.laz("volume", "ls", "-q").stdout.decode().split()

    # more than any buffer on the way holds: what refuses it need not read it
    archive = tar(f=b"one", same=b"s" * 100_000, more=bytes(MIB // 2))
    daemon.laz("volume", "import", name, stdin=archive)
    said = daemon.laz("volume", "import", name, stdin=archive, check=False)
    assert said.returncode != 0
    assert "not empty" in said.stderr.decode()
    taken = daemon.json("volume", "snapshot", "--name", "s1", name)
    assert isinstance(taken, dict)
    (info,) = taken["snapshots"]
    assert info["kind"] == kind.kind
    assert info["pause_ns"] > 0
    assert content(daemon, f"{name}@s1")["f"] == b"one"

    clone = daemon.json("volume", "clone", f"{name}@s1", f"{name}-copy", "--label", "c=d")
    assert isinstance(clone, dict)
    assert driver_of(daemon, f"{name}-copy") == (kind.clone or kind.driver)
    assert clone["Labels"] == {"c": "d"}
    assert content(daemon, f"{name}-copy")["f"] == b"one"
    daemon.json("volume", "clone", name, f"{name}-other", "-d", "btrfs")
    assert driver_of(daemon, f"{name}-other") == "btrfs"
    assert content(daemon, f"{name}-other") == content(daemon, name)

    root = Path(made["Mountpoint"])
    if kind.driver not in ("fuse",) and "size" not in kind.options:
        (root / "f").write_bytes(b"two")
    daemon.json("volume", "snapshot", "--name", "s2", name)
    lines = daemon.laz("volume", "diff", name, "s1", "s2", "--json").stdout.splitlines()
    changed = {json.loads(line)["path"] for line in lines if json.loads(line)["bytes"] != 0}
    assert changed == ({"f"} if (root / "f").exists() else set())
    if kind.rolls_back:
        undo = daemon.json("volume", "rollback", name, "s1")
        assert isinstance(undo, dict)
        assert content(daemon, name)["f"] == b"one"
        assert undo["safety"] in daemon.laz("volume", "snapshots", name).stdout.decode()
    else:
        refused(daemon, "volume", "rollback", name, "s1")

    usage = daemon.json("volume", "usage", name)
    assert isinstance(usage, dict)
    assert 100_000 <= usage["referenced"] < MIB
    if kind.grows:
        daemon.json("volume", "resize", name, "96m")
        seen = daemon.json("volume", "usage", name)
        assert isinstance(seen, dict)
        assert seen["limit"] == 96 * MIB
    else:
        refused(daemon, "volume", "resize", name, "96m")
    if kind.shrinks:
        daemon.json("volume", "resize", name, "32m")
    else:
        refused(daemon, "volume", "resize", name, "32m")

    daemon.json("volume", "snapshot-rm", name, "s1")
    assert "s1" in refused(daemon, "volume", "export", f"{name}@s1")
    daemon.json("volume", "label", name, "e=f")
    daemon.json("volume", "rename", name, f"{name}-new")
    (seen,) = json.loads(daemon.laz("volume", "inspect", f"{name}-new").stdout)
    assert seen["Labels"] == {"e": "f"}
    assert content(daemon, f"{name}-new")["same"] == b"s" * 100_000
    daemon.json("volume", "rm", f"{name}-new", f"{name}-copy", f"{name}-other")
    assert name not in daemon.laz("volume", "ls", "-q").stdout.decode()


@pytest.mark.parametrize("driver", ["overlay", "btrfs", "fuse", "tmpfs", "bind"])
@pytest.mark.parametrize("option", ["encryption=aes", "nodatacow=true", "compression=zstd"])
def test_an_option_works_or_is_refused_with_those_that_do(
    daemon: Daemon, driver: str, option: str
) -> None:
    key = option.partition("=")[0]
    name = f"o-{driver}-{key}"
    if driver == "btrfs" and key != "encryption":
        daemon.laz("volume", "create", "-d", driver, "-o", option, name)
        daemon.laz("volume", "rm", name)
        return
    said = refused(daemon, "volume", "create", "-d", driver, "-o", option, name)
    assert key in said
    assert "valid options:" in said
