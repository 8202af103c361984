"""``--chmod`` in its octal and symbolic forms."""

from __future__ import annotations

import pytest

from lazarette.runtime.builds.chmod import parse_chmod
from lazarette.runtime.builds.errors import DockerfileError


@pytest.mark.parametrize(
    ("text", "mode", "folder", "expected"),
    [
        ("755", 0o644, False, 0o755),
        ("4711", 0o644, False, 0o4711),
        ("0", 0o644, False, 0),
        ("u+x", 0o644, False, 0o744),
        ("a=rX", 0o644, False, 0o444),
        ("a=rX", 0o700, True, 0o555),
        ("go-rwx,u=rw", 0o777, False, 0o600),
        ("g=u", 0o640, False, 0o660),
        ("+t", 0o755, True, 0o1755),
        ("ug+s", 0o755, False, 0o6755),
    ],
)
def test_change(text: str, mode: int, folder: bool, expected: int) -> None:
    assert parse_chmod(text).apply(mode, folder=folder) == expected


@pytest.mark.parametrize("text", ["", "999", "u", "777777", "z+x", "u+x,"])
def test_refused(text: str) -> None:
    with pytest.raises(DockerfileError, match="invalid chmod parameter"):
        parse_chmod(text)
