"""The union without privileges: mounted through fusermount3, xattrs under ``user.``."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import stat
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazarette.fuse import mount, syscalls
from lazarette.fuse.server import Server
from lazarette.fuse.union import UnionFilesystem, UnionOptions

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
    pytest.mark.skipif(shutil.which("fusermount3") is None, reason="no fusermount3"),
]

USER = pwd.getpwnam("nobody").pw_uid  # fusermount3 wants a user with a name
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="laz-user-"))
    os.chown(path, USER, USER)
    yield path
    shutil.rmtree(path)


def use_union(base: Path) -> None:
    """As an ordinary user: mount, change, unmount, mount again, look."""
    for name in ("low", "up", "work", "merged"):
        (base / name).mkdir()
    for name in ("a", "b"):
        (base / "low" / name).write_text(name)
    (base / "low" / "d").mkdir()
    (base / "low" / "d" / "x").write_text("x")
    root, number = base / "merged", 0
    for again in range(2):
        device = mount.mount(str(root), mount.MountOptions(allow_other=False))
        options = UnionOptions([str(base / "low")], str(base / "up"), str(base / "work"))
        server = Server(UnionFilesystem(options), device)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            server.ready.wait(10)
            assert not server.passthrough and "CAP_SYS_ADMIN" in server.reason
            assert mount.is_mounted(str(root))
            if not again:
                number = (root / "a").stat().st_ino
                (root / "a").write_text("new")
                (root / "b").unlink()
                (root / "d" / "x").unlink()
                (root / "d").rmdir()
                (root / "d").mkdir()
            assert (root / "a").stat().st_ino == number
            assert sorted(os.listdir(root)) == ["a", "d"]
            assert os.listdir(root / "d") == []
        finally:
            mount.unmount(str(root))
            thread.join(10)
    assert not mount.is_mounted(str(root))


def open_device(base: Path) -> None:
    """Give this process a ``/dev/fuse`` that everyone may open, as distributions have it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    syscalls.mount("none", "/", "none", MS_REC | MS_PRIVATE, "")
    node = base / "device"
    os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
    os.chmod(node, 0o666)
    syscalls.mount(str(node), "/dev/fuse", "none", MS_BIND, "")


def test_ordinary_user_mounts_a_union(folder: Path) -> None:
    # The interpreter may lie where an ordinary user cannot reach it: fork instead of starting one.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            open_device(folder)
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            use_union(folder)
            status = 0
        except BaseException:  # noqa: BLE001 - shown, and the child ends
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert stat.S_ISCHR((folder / "up" / "b").lstat().st_mode)
    assert os.getxattr(folder / "up" / "d", "user.overlay.opaque") == b"y"
