"""Root filesystems of packages: what is cached for how long, and for which release."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazarette.runtime.images import mmdebstrap
from lazarette.runtime.images.mmdebstrap import MAX_AGE, Rootfs, build_rootfs, host_suite
from lazarette.storage.clock import FakeClock
from lazarette.storage.errors import MissingFeature
from lazarette.storage.process import CommandFailed


def test_the_release_is_read_from_os_release(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=debian\nVERSION_CODENAME="trixie"\nX\n')
    assert host_suite(release) == "trixie"
    release.write_text("ID=arch\n")
    with pytest.raises(MissingFeature, match="names no Debian release"):
        host_suite(release)
    with pytest.raises(MissingFeature):
        host_suite(tmp_path / "absent")


def test_the_key_differs_with_what_matters_only() -> None:
    one = Rootfs(("a", "b"), "bookworm", ("x",), ("y",))
    assert one.key() == Rootfs(("b", "a"), "bookworm", ("x",), ("y",)).key()
    others = [
        Rootfs(("a",), "bookworm", ("x",), ("y",)),
        Rootfs(("a", "b"), "trixie", ("x",), ("y",)),
        Rootfs(("a", "b"), "bookworm", ("y",), ("y",)),
        Rootfs(("a", "b"), "bookworm", ("x",), ()),
    ]
    assert len({one.key(), *(other.key() for other in others)}) == 5


def test_a_cached_one_is_used_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    wanted = Rootfs(("no-such-package",), host_suite())
    cached = tmp_path / f"{wanted.key()}.tar"
    cached.write_bytes(b"tar")
    now = clock.now_ns()
    os.utime(cached, ns=(now, now))
    output = tmp_path / "out.tar"
    build_rootfs(["no-such-package"], output, cache=tmp_path, clock=clock)
    assert output.read_bytes() == b"tar"
    # Too old, and it cannot be made again: the old one is better than none.
    clock.advance(MAX_AGE + 1)
    monkeypatch.setattr(mmdebstrap, "_SOURCES", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    build_rootfs(["no-such-package"], output, cache=tmp_path, clock=clock)
    assert output.read_bytes() == b"tar"
    cached.unlink()
    with pytest.raises((MissingFeature, CommandFailed)):
        build_rootfs(["no-such-package"], output, cache=tmp_path, clock=clock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{wanted.key()}.lock", "out.tar"]
