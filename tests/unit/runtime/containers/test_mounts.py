from __future__ import annotations

from pathlib import Path

import pytest

from lazarette.runtime.containers.model import (
    BindOptions,
    ContainerConfig,
    HostConfig,
    Mount,
    TmpfsOptions,
    VolumeOptions,
)
from lazarette.runtime.containers.mounts import collect, from_mount, parse_bind
from lazarette.runtime.containers.record import Definition, MountPoint
from lazarette.storage.errors import InvalidArgument


def nobody(reference: str) -> Definition:
    raise AssertionError(reference)


def test_a_bind_and_a_volume() -> None:
    bind = parse_bind("/host/./x:/data:ro,rslave")
    assert (bind.type, bind.source, bind.destination) == ("bind", "/host/x", "/data")
    assert (bind.rw, bind.propagation, bind.create_source) == (False, "rslave", True)
    volume = parse_bind("pgdata:/data/:nocopy")
    assert (volume.type, volume.name, volume.destination) == ("volume", "pgdata", "/data")
    assert not volume.copy
    anonymous = parse_bind("/cache")
    assert anonymous.anonymous
    assert anonymous.copy


@pytest.mark.parametrize(
    "text",
    ["a:b:c:d", ":/x", "/a:relative", "name:/", "/a:/b:wat", "v1:/b:rslave", "/a:/b:ro,rw", "x:/y"],
)
def test_wrong_binds(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_bind(text)


def test_two_mounts_of_one_target_are_refused() -> None:
    host = HostConfig(binds=["vol1:/data", "vol2:/data/"])
    with pytest.raises(InvalidArgument, match="Duplicate mount point: /data"):
        collect(host, [], nobody)


def test_image_volumes_give_way_to_what_was_asked_for() -> None:
    host = HostConfig(binds=["named:/data"], tmpfs={"/run": "size=1m"})
    points = {p.destination: p for p in collect(host, ["/data", "/run", "/other"], nobody)}
    assert points["/data"].name == "named"
    assert points["/run"].type == "tmpfs"
    assert points["/other"].anonymous


def test_parents_are_mounted_before_children() -> None:
    host = HostConfig(binds=["deep:/a/b/c", "top:/a"])
    assert [p.destination for p in collect(host, [], nobody)] == ["/a", "/a/b/c"]


def test_volumes_from_read_only() -> None:
    other = Definition(
        id="0" * 64,
        name="other",
        created_ns=0,
        image_id="",
        image_ref="",
        image_layer=None,
        config=ContainerConfig(),
        host=HostConfig(),
        mounts=[MountPoint(type="volume", name="v1", destination="/v", copy=True)],
    )
    (point,) = collect(HostConfig(volumes_from=["other:ro"]), [], lambda _name: other)
    assert (point.name, point.rw, point.copy) == ("v1", False, False)


def test_a_missing_bind_source_is_refused_through_mounts_only(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(InvalidArgument, match="bind source path does not exist"):
        from_mount(Mount(type="bind", source=gone, target="/x"), (1, 50))
    made = from_mount(
        Mount(
            type="bind",
            source=gone,
            target="/x",
            bind_options=BindOptions(create_mountpoint=True),
        ),
        (1, 50),
    )
    assert made.create_source


def test_read_only_binds_are_recursive_from_1_44_on(tmp_path: Path) -> None:
    mount = Mount(type="bind", source=str(tmp_path), target="/x", read_only=True)
    assert from_mount(mount, (1, 44)).read_only_recursive == "if-possible"
    assert from_mount(mount, (1, 43)).read_only_recursive == "disabled"


@pytest.mark.parametrize("subpath", ["/abs", "a/../b", ".."])
def test_subpaths_stay_inside(subpath: str) -> None:
    mount = Mount(
        type="volume", source="vol", target="/x", volume_options=VolumeOptions(subpath=subpath)
    )
    with pytest.raises(InvalidArgument):
        from_mount(mount, (1, 50))


def test_tmpfs_options() -> None:
    mount = Mount(
        type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(size_bytes=1024, mode=0o1770)
    )
    assert from_mount(mount, (1, 50)).options == ["size=1024", "mode=1770"]


def test_options_of_another_type_are_refused() -> None:
    mount = Mount(type="tmpfs", target="/t", volume_options=VolumeOptions())
    with pytest.raises(InvalidArgument, match="VolumeOptions must not be specified"):
        from_mount(mount, (1, 50))
