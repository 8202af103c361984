from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarette.runtime.networks import ipam
from lazarette.runtime.networks.model import AddressConflict, Pool
from lazarette.storage.clock import FakeClock
from lazarette.storage.errors import InvalidArgument


def space(clock: FakeClock | None = None, **pool: Any) -> ipam.AddressSpace:
    return ipam.AddressSpace(ipam.completed(Pool(**pool)), clock or FakeClock())


def test_lowest_free_first_and_kept_ones_never() -> None:
    small = space(subnet="10.0.0.0/29")
    assert [small.take() for _ in range(5)] == [f"10.0.0.{n}" for n in range(2, 7)]
    with pytest.raises(AddressConflict):
        small.take()


def test_returned_addresses_rest() -> None:
    clock = FakeClock()
    small = space(clock, subnet="10.0.0.0/29")
    first = small.take()
    small.give_back(first)
    assert small.take() != first
    clock.advance(ipam.REST_NS / 1e9)
    assert small.take() == first


def test_a_resting_address_is_better_than_none() -> None:
    tiny = space(subnet="10.0.0.0/30")
    only = tiny.take()
    tiny.give_back(only)
    assert tiny.take() == only


def test_wanted_addresses() -> None:
    small = space(subnet="10.0.0.0/29", ip_range="10.0.0.4/30")
    assert small.pool.gateway == "10.0.0.4"
    assert small.take("10.0.0.2") == "10.0.0.2"  # outside the range, inside the subnet
    assert small.take() == "10.0.0.5"
    for taken in ("10.0.0.2", "10.0.0.4", "10.0.0.0", "10.0.0.7"):
        with pytest.raises(AddressConflict):
            small.take(taken)
    with pytest.raises(InvalidArgument):
        small.take("10.0.1.1")
    with pytest.raises(InvalidArgument):
        small.take("fd00::1")


def test_ipv6_has_no_broadcast() -> None:
    six = space(subnet="fd00::/126")
    assert [six.take() for _ in range(2)] == ["fd00::2", "fd00::3"]


def test_point_to_point() -> None:
    assert ipam.completed(Pool(subnet="10.0.0.0/31")).gateway == "10.0.0.0"
    assert space(subnet="10.0.0.0/31").take() == "10.0.0.1"


@pytest.mark.parametrize(
    "pool",
    [
        {"subnet": "10.0.0.1/24"},
        {"subnet": "x"},
        {"subnet": "10.0.0.0/24", "ip_range": "10.1.0.0/28"},
        {"subnet": "10.0.0.0/24", "ip_range": "10.0.0.0/8"},
        {"subnet": "10.0.0.0/24", "gateway": "10.0.1.1"},
        {"subnet": "10.0.0.0/24", "gateway": "fd00::1"},
    ],
)
def test_pools_that_make_no_sense(pool: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        ipam.completed(Pool(**pool))


def test_choosing_keeps_clear() -> None:
    taken = [ipaddress.ip_network("172.16.0.0/12"), ipaddress.ip_network("192.168.0.0/19")]
    assert str(ipam.choose(ipam.default_pools(), taken)) == "192.168.32.0/20"
    with pytest.raises(AddressConflict):
        ipam.choose(ipam.default_pools(), [ipaddress.ip_network("0.0.0.0/0")])


def test_unique_local_pools_differ() -> None:
    one, other = ipam.unique_local_pool("a"), ipam.unique_local_pool("b")
    assert one != other and one.prefixlen == 64 and one.is_private


@given(st.lists(st.integers(0, 9), max_size=60))
def test_an_address_has_one_holder(steps: list[int]) -> None:
    clock = FakeClock()
    pool = space(clock, subnet="10.0.0.0/28")
    held: list[str] = []
    for step in steps:
        clock.advance(0.7)
        if step < 6:
            try:
                address = pool.take()
            except AddressConflict:
                assert len(held) == 13
                continue
            assert address not in held
            held.append(address)
        elif held:
            pool.give_back(held.pop(step % len(held)))
    assert pool.used == len(held)
