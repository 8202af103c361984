"""The one reader of JSON."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from lazarette.fuse import jsontext


def test_a_type_is_read_by_many_threads_from_the_first_time() -> None:
    """Types that refer to types, none of them looked at before: once this ended the process."""
    count, threads = 40, 8
    start = threading.Barrier(threads)
    types: list[Any] = []
    for number in range(count):
        inner: Any = msgspec.defstruct(f"Inner{number}", [("a", int), ("b", list[str], [])])
        several, named = list[inner], dict[str, inner]
        fields: list[Any] = [("one", inner), ("several", several, []), ("named", named, {})]
        types.append(msgspec.defstruct(f"Outer{number}", fields))

    def read(_: int) -> int:
        start.wait()
        return sum(
            jsontext.decode(b'{"one": {"a": 1}, "several": [{"a": 2}]}', type=each).one.a
            for each in types
        )

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(read, range(threads))) == [count] * threads


@pytest.mark.parametrize("data", [b"\xff", b'"\xff"', b"[" * 100_000, b"{", b""])
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        jsontext.decode(data)


def test_strictness_is_part_of_what_is_remembered() -> None:
    assert jsontext.decode(b'"1"', type=int, strict=False) == 1
    with pytest.raises(msgspec.ValidationError):
        jsontext.decode(b'"1"', type=int)
