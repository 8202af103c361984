"""The twelve forms of substitution."""

from __future__ import annotations

import pytest

from lazarette.runtime.builds.errors import DockerfileError
from lazarette.runtime.builds.expansion import Expander

VALUES = {"v": "foobarfoo", "e": "", "s": "two words", "p": "fo*"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$v", "foobarfoo"),
        ("${v}", "foobarfoo"),
        ("a${u}b$u", "ab"),
        ("${u:-w}", "w"),
        ("${e:-w}", "w"),
        ("${e-w}", ""),
        ("${u-w}", "w"),
        ("${v:+w}", "w"),
        ("${e:+w}", ""),
        ("${e+w}", "w"),
        ("${u+w}", ""),
        ("${v:?m}", "foobarfoo"),
        ("${e?m}", ""),
        ("${v#f*o}", "obarfoo"),
        ("${v##f*o}", ""),
        ("${v#bar}", "foobarfoo"),
        ("${v%f*o}", "foobar"),
        ("${v%%f*o}", ""),
        ("${v%?}", "foobarfo"),
        ("${v/foo/x}", "xbarfoo"),
        ("${v//foo/x}", "xbarx"),
        ("${v//o/}", "fbarf"),
        ("${v/f*r/x}", "xfoo"),
        ("${u:-${v:+$s}}", "two words"),
        ("${u:-a b}", "a b"),
        ("${v#$p}", "obarfoo"),
        (r"\$v", "$v"),
        ("'$v'", "$v"),
        ('"$v"', "foobarfoo"),
        (r'"\$v\"q"', '$v"q'),
        (r"a\ b", "a b"),
        ('a"b c"d', "ab cd"),
        ("$", "$"),
        ("a$", "a$"),
        ("$$", ""),
        ("${v}_$v-x", "foobarfoo_foobarfoo-x"),
    ],
)
def test_word(text: str, expected: str) -> None:
    assert Expander(VALUES).word(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${u:?gone}", "u: gone"),
        ("${u?}", "u: is not allowed to be unset"),
        ("${e:?}", "e: is not allowed to be empty"),
        ("${v", "missing '}'"),
        ("${v:-x", "missing '}'"),
        ("${}", "bad substitution"),
        ("${:x}", "bad substitution"),
        ("${v:#x}", "unsupported modifier"),
        ("${v^x}", "unsupported modifier"),
        ("'a", "single-quote"),
        ('"a', "double-quote"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=message):
        Expander(VALUES).word(text)


def test_backtick_escapes() -> None:
    assert Expander(VALUES, "`").word(r"`$v\$v") == "$v\\foobarfoo"


def test_words_split_only_outside_of_quotes() -> None:
    assert Expander(VALUES).words('$s "$s"x') == ["two", "words", "two wordsx"]


def test_heredoc_bodies_keep_quotes() -> None:
    assert Expander(VALUES).body("\"$v\" '$v' \\$v \\n\n") == "\"foobarfoo\" 'foobarfoo' $v \\n\n"
