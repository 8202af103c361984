"""``.dockerignore`` matching."""

from __future__ import annotations

import pytest

from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.builds.ignore import Ignore, read_lines


@pytest.mark.parametrize(
    ("patterns", "path", "excluded"),
    [
        ("foo", "foo", True),
        ("/foo", "foo", True),
        ("foo", "foo/bar/baz", True),
        ("foo", "a/foo", False),
        ("*/temp*", "somedir/temporary.txt", True),
        ("*/temp*", "somedir/sub/temp", False),
        ("temp?", "tempa", True),
        ("temp?", "temp", False),
        ("**/c", "c", True),
        ("**/c", "a/b/c", True),
        ("**/c", "a/b/c/exclude.txt", True),
        ("**/*.go", "a/b/main.go", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**", "a/x", True),
        ("[a-c].txt", "b.txt", True),
        ("[^a-c].txt", "b.txt", False),
        (r"\!x", "!x", True),
        ("*\n!a/b", "a/b", False),
        ("*\n!a/b", "a/c", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", True),
        ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", False),
        ("# comment\n foo \n\n", "foo", True),
        ("./foo/../bar/", "bar", True),
        (".", "x", False),
        ("*", ".", False),
    ],
)
def test_matching(patterns: str, path: str, excluded: bool) -> None:
    assert Ignore(read_lines(patterns)).excludes(path) is excluded


def test_double_star_with_a_later_exception() -> None:
    """Case A28."""
    ignore = Ignore(read_lines("**/c\n!a/b/c/include.txt\n.git\n"))
    assert not ignore.excludes("a/b/c/include.txt")
    assert ignore.excludes("a/b/c/exclude.txt")
    assert ignore.excludes(".git/config")
    assert not ignore.prunes("a/b/c")
    assert ignore.prunes("x/c")
    assert ignore.prunes(".git")


def test_lone_exclamation_mark() -> None:
    with pytest.raises(ContextError, match="illegal exclusion pattern"):
        read_lines("!\n")


def test_unfinished_class() -> None:
    with pytest.raises(ContextError, match="syntax error in pattern"):
        Ignore(["a[b"])
