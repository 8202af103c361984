from __future__ import annotations

import pytest

from lazarette.storage.errors import InvalidArgument
from lazarette.storage.volumes.options import check_options, parse_choice, parse_flag, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512k", 512 << 10),
        ("10m", 10 << 20),
        ("1.5g", 3 << 29),
        ("2GiB", 2 << 30),
        ("1tb", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "-1", "1x", "0", "1 2", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_size(text)


def test_flags_and_choices() -> None:
    assert parse_flag("o", "true") and parse_flag("o", "") and parse_flag("o", "1")
    assert not parse_flag("o", "no")
    with pytest.raises(InvalidArgument, match="maybe"):
        parse_flag("o", "maybe")
    with pytest.raises(InvalidArgument) as refused:
        parse_choice("compression", "rar", ("none", "zstd"))
    assert "zstd" in refused.value.hint


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="colour") as refused:
        check_options("btrfs", {"size": "1g", "colour": "red"}, ("size",))
    assert "size" in refused.value.hint
