"""JSON as Go reads it."""

from __future__ import annotations

import msgspec
import pytest

from lazarette.runtime import gojson
from lazarette.runtime.api.networks import CreateBody as NetworkBody
from lazarette.runtime.api.volumes import CreateBody as VolumeBody
from lazarette.runtime.images.credentials import Credentials


def test_names_in_any_case() -> None:
    given = {"name": "n", "ipam": {"CONFIG": [{"subnet": "10.0.0.0/8"}]}, "enableipv6": True}
    made = gojson.convert(given, NetworkBody)
    assert made.name == "n" and made.enable_ipv6 is True
    assert made.ipam is not None and made.ipam.config is not None
    assert made.ipam.config[0].subnet == "10.0.0.0/8"
    assert gojson.convert({"Username": "u", "PASSWORD": "p"}, Credentials).password == "p"


def test_null_is_not_there() -> None:
    made = gojson.convert({"Name": None, "Labels": None, "DriverOpts": None}, VolumeBody)
    assert made == VolumeBody()


def test_names_inside_maps_stay() -> None:
    made = gojson.convert({"labels": {"Name": "x", "name": "y"}}, VolumeBody)
    assert made.labels == {"Name": "x", "name": "y"}


@pytest.mark.parametrize("value", [[], "x", 3, {"name": []}, {"labels": {"a": 1}}])
def test_other_forms_are_refused(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        gojson.convert(value, VolumeBody)
