"""Devices by the Container Device Interface: what is found, and what becomes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lazarette.runtime import cdi
from lazarette.runtime.cdi import DeviceName
from lazarette.storage.errors import InvalidArgument, NotFound

NULL = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.example/null",
    "containerEdits": {"env": ["VENDOR=1"], "additionalGids": [77]},
    "devices": [
        {
            "name": "first",
            "containerEdits": {
                "env": ["DEVICE=first"],
                "deviceNodes": [{"path": "/dev/vendor0", "hostPath": "/dev/null"}],
                "mounts": [
                    {"hostPath": "/usr/lib/vendor", "containerPath": "/lib/v", "options": ["ro"]}
                ],
                "hooks": [{"hookName": "createContainer", "path": "/bin/true", "args": ["true"]}],
            },
        },
        {"name": "0", "containerEdits": {"env": ["DEVICE=zero"]}},
    ],
}
YAML = """
cdiVersion: "0.5.0"
kind: vendor.example/null
devices:
- name: other
  containerEdits:
    env: [DEVICE=other]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "cdi"
    made.mkdir()
    (made / "null.json").write_text(json.dumps(NULL))
    (made / "more.yml").write_text(YAML)
    (made / "notes.txt").write_text("no device")
    return made


def find(folder: Path, *names: str) -> cdi.Edits:
    return cdi.find([DeviceName.parse(name) for name in names], [folder])


def test_edits_of_the_kind_come_once_and_before_those_of_the_devices(folder: Path) -> None:
    found = find(folder, "vendor.example/null=first", "vendor.example/null=0")
    assert found.env == ("VENDOR=1", "DEVICE=first", "DEVICE=zero")
    assert find(folder, "vendor.example/null=other").env == ("VENDOR=1", "DEVICE=other")


def test_what_a_container_gets(folder: Path) -> None:
    configuration: dict[str, object] = {
        "process": {"env": ["A=1"], "user": {"uid": 0}},
        "linux": {"devices": [], "resources": {"devices": [{"allow": False}]}},
        "mounts": [],
    }
    find(folder, "vendor.example/null=first").apply(configuration)
    status = os.stat("/dev/null")
    number = {"type": "c", "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
    assert configuration == {
        "process": {
            "env": ["A=1", "VENDOR=1", "DEVICE=first"],
            "user": {"uid": 0, "additionalGids": [77]},
        },
        "linux": {
            "devices": [{"path": "/dev/vendor0", **number, "fileMode": status.st_mode & 0o7777}],
            "resources": {
                "devices": [{"allow": False}, {"allow": True, **number, "access": "rwm"}]
            },
        },
        "mounts": [
            {
                "destination": "/lib/v",
                "source": "/usr/lib/vendor",
                "type": "bind",
                "options": ["ro", "bind"],
            }
        ],
        "hooks": {"createContainer": [{"path": "/bin/true", "args": ("true",)}]},
    }


def test_a_later_folder_goes_before_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    late = tmp_path / "late"
    late.mkdir()
    (late / "null.yaml").write_text(YAML.replace("=other", "=late"))
    name = DeviceName.parse("vendor.example/null=other")
    assert cdi.find([name], [folder, late]).env == ("DEVICE=late",)
    assert cdi.find([name], [folder, tmp_path / "none"]).env == ("VENDOR=1", "DEVICE=other")


def test_devices_that_are_not_there(folder: Path) -> None:
    for name in ("vendor.example/null=x", "vendor.example/nil"):
        with pytest.raises(NotFound, match="no such device"):
            find(folder, name)


@pytest.mark.parametrize("name", ["gpu", "vendor.example", "/x=1", "vendor/", "a/b/c=1"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidArgument):
        DeviceName.parse(name)


@pytest.mark.parametrize("text", ["{", '{"kind": 1}', '{"cdiVersion": "1"}'])
def test_files_that_are_broken(folder: Path, text: str) -> None:
    (folder / "broken.json").write_text(text)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        find(folder, "vendor.example/null")
