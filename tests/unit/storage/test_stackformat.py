"""Layers written by a kernel that was configured otherwise are read right as well."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from lazarette.storage import beneath, mounts
from lazarette.storage.layers.stackformat import layer_changes, write_diff
from lazarette.storage.layers.tar import TreeWriter


def test_a_file_of_which_only_the_metadata_was_copied_up(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"content" * 1000)
    mounts.mount(
        "overlay",
        tmp_path / "merged",
        [
            ("metacopy", "on"),
            ("lowerdir+", os.fsencode(tmp_path / "lower")),
            ("upperdir", os.fsencode(tmp_path / "upper")),
            ("workdir", os.fsencode(tmp_path / "work")),
        ],
    )
    try:
        (tmp_path / "merged" / "f").chmod(0o600)
        assert os.getxattr(tmp_path / "upper" / "f", "trusted.overlay.metacopy") is not None
        out = io.BytesIO()
        with (
            beneath.opened(tmp_path / "upper") as root,
            beneath.opened(tmp_path / "lower") as below,
            beneath.opened(tmp_path / "merged") as merged,
        ):
            writer = TreeWriter(out)
            write_diff(writer, root, merged)
            writer.close()
            changes = list(layer_changes(root, below, merged))
    finally:
        mounts.unmount(tmp_path / "merged")
    assert [change.path for change in changes] == [b"f"]
    out.seek(0)
    with tarfile.open(fileobj=out) as read:
        (member,) = read.getmembers()
        assert member.mode == 0o600
        content = read.extractfile(member)
        assert content is not None
        assert content.read() == b"content" * 1000
