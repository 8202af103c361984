from __future__ import annotations

import pytest

from lazarette.runtime.containers import creation, resources
from lazarette.runtime.containers.cgroups import Hierarchies, Layout
from lazarette.runtime.containers.model import (
    ContainerConfig,
    CreateRequest,
    Device,
    Healthcheck,
    HostConfig,
    RestartPolicy,
    Ulimit,
    UpdateRequest,
)
from lazarette.runtime.containers.spec import HostFacts, security_options
from lazarette.runtime.images.model import Healthcheck as ImageHealth
from lazarette.runtime.images.model import RunConfig
from lazarette.storage.errors import InvalidArgument

FACTS = HostFacts(Hierarchies(Layout.V2), frozenset(), False, True, None)
RUN = RunConfig(
    env=["PATH=/bin", "A=image"],
    cmd=["serve"],
    entrypoint=["/entry"],
    user="app",
    working_dir="/srv",
    labels={"from": "image", "both": "image"},
    exposed_ports={"80/tcp": {}},
    stop_signal="SIGINT",
    healthcheck=ImageHealth(test=["CMD", "ok"], interval=5_000_000_000),
)


def merged(request: CreateRequest, run: RunConfig = RUN) -> ContainerConfig:
    return creation.merged_config(request, run, "ab" * 32)


def test_the_image_fills_what_was_left_open() -> None:
    config = merged(CreateRequest(env=["A=mine", "B=2"], labels={"both": "mine"}))
    assert config.env == ["PATH=/bin", "A=mine", "B=2"]
    assert config.labels == {"from": "image", "both": "mine"}
    assert (config.user, config.working_dir, config.stop_signal) == ("app", "/srv", "SIGINT")
    assert (config.entrypoint, config.cmd) == (["/entry"], ["serve"])
    assert config.hostname == "ab" * 6
    assert isinstance(config.exposed_ports, dict)
    assert list(config.exposed_ports) == ["80/tcp"]


def test_commands() -> None:
    assert merged(CreateRequest(cmd=["other"])).entrypoint == ["/entry"]
    own = merged(CreateRequest(entrypoint=["/mine"]))
    assert (own.entrypoint, own.cmd) == (["/mine"], None)
    cleared = merged(CreateRequest(entrypoint=[""], cmd=["x"]))
    assert (cleared.entrypoint, cleared.cmd) == (None, ["x"])


def test_health_is_merged_field_by_field() -> None:
    config = merged(CreateRequest(healthcheck=Healthcheck(retries=9)))
    assert isinstance(config.healthcheck, Healthcheck)
    assert config.healthcheck.test == ["CMD", "ok"]
    assert (config.healthcheck.interval, config.healthcheck.retries) == (5_000_000_000, 9)
    off = merged(CreateRequest(healthcheck=Healthcheck(test=["NONE"])))
    assert isinstance(off.healthcheck, Healthcheck)
    assert off.healthcheck.test == ["NONE"]


def test_the_engine_fills_the_host_part() -> None:
    host = creation.filled_host(HostConfig(memory=10 << 20, port_bindings={"80": None}), FACTS)
    assert (host.network_mode, host.ipc_mode, host.cgroupns_mode) == (
        "bridge",
        "private",
        "private",
    )
    assert (host.log_config.type, host.restart_policy.name) == ("json-file", "no")
    assert host.memory_swap == 20 << 20
    assert host.port_bindings is not None
    assert host.port_bindings["80/tcp"] is not None
    assert host.port_bindings["80/tcp"][0].host_port == ""


@pytest.mark.parametrize(
    "host",
    [
        HostConfig(restart_policy=RestartPolicy(name="sometimes")),
        HostConfig(restart_policy=RestartPolicy(name="always", maximum_retry_count=2)),
        HostConfig(auto_remove=True, restart_policy=RestartPolicy(name="always")),
        HostConfig(memory=1024),
        HostConfig(memory_swap=10 << 20),
        HostConfig(memory=20 << 20, memory_swap=10 << 20),
        HostConfig(nano_cpus=10**12),
        HostConfig(nano_cpus=10**9, cpu_quota=1000),
        HostConfig(pid_mode="container:"),
        HostConfig(ipc_mode="public"),
        HostConfig(runtime="kata"),
        HostConfig(security_opt=["magic=1"]),
        HostConfig(ulimits=[Ulimit(name="bogus", soft=1, hard=1)]),
        HostConfig(ulimits=[Ulimit(name="nofile", soft=2, hard=1)]),
        HostConfig(network_mode="none", extra_hosts=["justaname"]),
    ],
)
def test_what_cannot_be_is_refused(host: HostConfig) -> None:
    filled = creation.filled_host(HostConfig(), FACTS)
    with pytest.raises(InvalidArgument):
        creation.check(ContainerConfig(), creation.filled_host(host, FACTS), (1, 50))
    creation.check(ContainerConfig(), filled, (1, 50))


def test_endpoints() -> None:
    def asked(mode: str, *names: str, version: tuple[int, int] = (1, 50)) -> list[str]:
        request = CreateRequest()
        request.networking_config.endpoints_config = dict.fromkeys(names)
        return list(creation.endpoints(request, HostConfig(network_mode=mode), version))

    assert asked("bridge") == ["bridge"]
    assert asked("none") == []
    assert asked("web") == ["web"]
    assert asked("web", "web", "db") == ["web", "db"]
    with pytest.raises(InvalidArgument):
        asked("web", "web", "db", version=(1, 43))
    with pytest.raises(InvalidArgument):
        asked("host", "web")


def test_security_options() -> None:
    read = security_options(["no-new-privileges", "seccomp=unconfined", "apparmor:mine"])
    assert (read.no_new_privileges, read.seccomp, read.apparmor) == (True, "unconfined", "mine")


def test_rlimits_are_cut_without_the_capability() -> None:
    (own,) = resources.rlimits([Ulimit(name="nofile", soft=-1, hard=-1)], may_raise=False)
    assert isinstance(own["hard"], int)
    assert own["hard"] < 1 << 40
    (free,) = resources.rlimits([Ulimit(name="nofile", soft=-1, hard=-1)], may_raise=True)
    assert free["hard"] == (1 << 64) - 1


def test_devices_and_rules() -> None:
    (null,) = resources.find_devices([Device(path_on_host="/dev/null", path_in_container="/n")])
    assert (null.path, null.kind, null.major, null.minor) == ("/n", "c", 1, 3)
    with pytest.raises(InvalidArgument):
        resources.find_devices([Device(path_on_host="/etc/passwd")])
    assert resources.device_rules(["c 1:* rw"]) == [
        {"allow": True, "type": "c", "access": "rw", "major": 1}
    ]
    with pytest.raises(InvalidArgument):
        resources.device_rules(["c 1 rw"])


def test_an_update_leaves_zeros_alone() -> None:
    host = HostConfig(memory=1, cpu_shares=2)
    resources.apply_update(host, UpdateRequest(memory=3, pids_limit=-1))
    assert (host.memory, host.cpu_shares, host.pids_limit) == (3, 2, -1)
