from __future__ import annotations

import msgspec
import pytest

from lazarette.runtime.containers.model import CreateRequest, HostConfig, parse
from lazarette.storage.errors import InvalidArgument


def test_names_are_read_in_any_case_and_null_is_the_zero_value() -> None:
    request = parse(
        CreateRequest,
        {
            "image": "busybox",
            "CMD": None,
            "hostconfig": {
                "portbindings": {"80/tcp": [{"hostport": "8080"}], "81/tcp": None},
                "Memory": None,
                "Mounts": [{"type": "bind", "BindOptions": {"propagation": "rslave"}}],
            },
            "Unknown": {"x": 1},
        },
    )
    assert request.image == "busybox"
    assert request.cmd is None
    host = request.host_config
    assert host.memory == 0
    assert host.port_bindings is not None
    assert host.port_bindings["80/tcp"] is not None
    assert host.port_bindings["80/tcp"][0].host_port == "8080"
    assert host.port_bindings["81/tcp"] is None
    assert isinstance(host.mounts, list)
    assert host.mounts[0].bind_options is not None
    assert host.mounts[0].bind_options.propagation == "rslave"


def test_keys_of_maps_keep_their_case() -> None:
    request = parse(
        CreateRequest,
        {"Labels": {"Com.Example": "A"}, "Volumes": {"/Data": {}}, "ExposedPorts": {"80/tcp": {}}},
    )
    assert request.labels == {"Com.Example": "A"}
    assert list(request.volumes or {}) == ["/Data"]
    assert isinstance(request.exposed_ports, dict)
    assert list(request.exposed_ports) == ["80/tcp"]


@pytest.mark.parametrize("cmd", ["true", ["true", "x"]])
def test_a_command_is_text_or_a_list(cmd: object) -> None:
    assert parse(CreateRequest, {"Cmd": cmd}).cmd == cmd


def test_a_wrong_type_names_its_place() -> None:
    with pytest.raises(InvalidArgument, match=r"HostConfig\.Memory"):
        parse(CreateRequest, {"HostConfig": {"Memory": "much"}})


def test_host_config_is_echoed_with_the_names_of_the_engine() -> None:
    told = msgspec.to_builtins(HostConfig(blkio_device_read_i_ops=[], uts_mode="host"))
    assert told["UTSMode"] == "host"
    assert told["BlkioDeviceReadIOps"] == []
    assert told["CpuShares"] == 0
    assert "Init" not in told
    assert "Tmpfs" not in told
