"""Substitution of variables in the words of an instruction: twelve forms.

======================  =====================================================
``$v`` ``${v}``         the value; unset is empty
``${v:-w}`` ``${v-w}``  ``w`` if unset or empty / if unset
``${v:+w}`` ``${v+w}``  ``w`` if set and not empty / if set
``${v:?m}`` ``${v?m}``  fail with ``m`` if unset or empty / if unset
``${v#p}`` ``${v##p}``  without the shortest / longest prefix matching ``p``
``${v%p}`` ``${v%%p}``  without the shortest / longest suffix matching ``p``
``${v/p/r}``            first match of ``p`` replaced; ``${v//p/r}`` every match
======================  =====================================================

``w``, ``m``, ``p`` and ``r`` are expanded themselves.  Patterns know ``*``, ``?`` and the
escape character.  Single quotes and the escape character keep ``$`` literal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lazarette.runtime.builds.errors import DockerfileError

_SPECIAL = frozenset("@*#$!?-")


class Expander:
    """Expands words with one set of values.

    Args:
        values: names and values; a name that is absent is unset.
        escape: the Dockerfile's escape character.
        keep_quotes: leave quotes and escapes in the result (EXPOSE-like raw use, heredocs).
    """

    def __init__(
        self, values: Mapping[str, str], escape: str = "\\", *, keep_quotes: bool = False
    ) -> None:
        self._values = values
        self._escape = escape
        self._keep = keep_quotes

    def word(self, text: str) -> str:
        """The expansion of one argument.

        Raises:
            DockerfileError: bad substitution, or a ``:?`` that failed.
        """
        return _Scan(text, self._values, self._escape, self._keep).to_end()[0]

    def words(self, text: str) -> list[str]:
        """The expansion split at blanks that come from outside of quotes."""
        return _Scan(text, self._values, self._escape, self._keep).to_end()[1]

    def body(self, text: str) -> str:
        """The expansion of a heredoc: quotes mean nothing, escapes only before ``$``."""
        return _Scan(text, self._values, self._escape, True, quotes=False).to_end()[0]


class _Words:
    """Collects words: blanks of unquoted text separate them."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._now = ""
        self._in_word = False

    def blank(self) -> None:
        if self._in_word:
            self.done.append(self._now)
            self._now, self._in_word = "", False

    def plain(self, char: str) -> None:
        if char.isspace():
            self.blank()
        else:
            self.solid(char)

    def solid(self, text: str) -> None:
        self._now += text
        self._in_word = True

    def expanded(self, text: str) -> None:
        for char in text:
            self.plain(char)


class _Scan:
    """One pass over a text; nested for the words inside ``${…}``."""

    def __init__(
        self,
        text: str,
        values: Mapping[str, str],
        escape: str,
        keep: bool,
        *,
        quotes: bool = True,
    ) -> None:
        self._text = text
        self._at = 0
        self._values = values
        self._escape = escape
        self._keep = keep
        self._quotes = quotes

    def to_end(self) -> tuple[str, list[str]]:
        words = _Words()
        made = self._until("", words)
        words.blank()
        return made, words.done

    def _peek(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _next(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def _until(self, stop: str, words: _Words, stops: str = "") -> str:
        """Expand up to an unquoted ``stop`` character (left unread) or the end."""
        made: list[str] = []
        while (char := self._peek()) != "":
            if char == stop or (stops and char in stops):
                return "".join(made)
            if char == "'" and self._quotes:
                text = self._single()
                words.solid(text)
            elif char == '"' and self._quotes:
                text = self._double()
                words.solid(text)
            elif char == "$":
                text = self._dollar()
                words.expanded(text)
            elif char == self._escape:
                text = self._escaped()
                words.solid(text)
            else:
                text = self._next()
                words.plain(text)
            made.append(text)
        if stop:
            raise DockerfileError(f"syntax error: missing '{stop}'")
        return "".join(made)

    def _escaped(self) -> str:
        mark = self._next()
        char = self._peek()
        if char == "":
            return mark
        if not self._quotes:
            if char in ("$", mark):
                return self._next()
            return mark
        self._at += 1
        return mark + char if self._keep else char

    def _single(self) -> str:
        self._at += 1
        end = self._text.find("'", self._at)
        if end < 0:
            raise DockerfileError(
                "unexpected end of statement while looking for matching single-quote"
            )
        inside = self._text[self._at : end]
        self._at = end + 1
        return f"'{inside}'" if self._keep else inside

    def _double(self) -> str:
        self._at += 1
        made: list[str] = []
        while (char := self._peek()) != '"':
            if char == "":
                raise DockerfileError(
                    "unexpected end of statement while looking for matching double-quote"
                )
            if char == "$":
                made.append(self._dollar())
            elif char == self._escape:
                self._at += 1
                after = self._peek()
                if after in ('"', "$", self._escape) and after != "":
                    made.append(char + after if self._keep else after)
                    self._at += 1
                else:
                    made.append(char)
            else:
                made.append(self._next())
        self._at += 1
        inside = "".join(made)
        return f'"{inside}"' if self._keep else inside

    def _dollar(self) -> str:
        self._at += 1
        if self._peek() != "{":
            name = self._name()
            return self._values.get(name, "") if name else "$"
        self._at += 1
        if self._peek() in ("", "{", "}", ":"):
            if self._peek() == "":
                raise DockerfileError("syntax error: missing '}'")
            raise DockerfileError("syntax error: bad substitution")
        name = self._name()
        if not name:
            raise DockerfileError("syntax error: bad substitution")
        operator = self._next()
        if operator == "":
            raise DockerfileError("syntax error: missing '}'")
        if operator == "}":
            return self._values.get(name, "")
        return self._modified(name, operator)

    def _name(self) -> str:
        start = self._at
        while (char := self._peek()) != "" and (char == "_" or (char.isascii() and char.isalnum())):
            if char.isdecimal() and self._at == start:
                self._at += 1  # a positional name is a single run of digits
                while self._peek().isdecimal():
                    self._at += 1
                break
            self._at += 1
        if self._at == start and self._peek() in _SPECIAL and self._peek() != "":
            self._at += 1
        return self._text[start : self._at]

    def _modified(self, name: str, operator: str) -> str:
        value = self._values.get(name)
        if operator == ":":
            modifier = self._next()
            if modifier not in ("-", "+", "?"):
                raise DockerfileError(
                    f"unsupported modifier ({':' + modifier}) in substitution of {name}"
                )
            return self._conditional(name, value or None, modifier, colon=True)
        if operator in ("-", "+", "?"):
            return self._conditional(name, value, operator, colon=False)
        if operator in ("#", "%"):
            return self._trimmed(value or "", operator)
        if operator == "/":
            return self._replaced(value or "")
        raise DockerfileError(f"unsupported modifier ({operator}) in substitution of {name}")

    def _argument(self, stop: str = "}", *, raw: bool = False) -> str:
        """The word of a modifier, expanded; its closing character is read."""
        keep, self._keep = self._keep, raw
        try:
            made = self._until(stop, _Words())
        finally:
            self._keep = keep
        self._at += 1
        return made

    def _conditional(self, name: str, value: str | None, modifier: str, *, colon: bool) -> str:
        word = self._argument()
        if modifier == "-":
            return word if value is None else value
        if modifier == "+":
            return "" if value is None else word
        if value is not None:
            return value
        default = "is not allowed to be empty" if colon else "is not allowed to be unset"
        raise DockerfileError(f"{name}: {word or default}")

    def _trimmed(self, value: str, operator: str) -> str:
        longest = self._peek() == operator
        if longest:
            self._at += 1
        pattern = _glob(self._argument(raw=True), self._escape, greedy=longest)
        if operator == "#":
            found = re.match(pattern, value, re.DOTALL)
            return value[found.end() :] if found else value
        starts = range(len(value) + 1) if longest else range(len(value), -1, -1)
        for start in starts:
            if re.fullmatch(pattern, value[start:], re.DOTALL):
                return value[:start]
        return value

    def _replaced(self, value: str) -> str:
        every = self._peek() == "/"
        if every:
            self._at += 1
        pattern = _glob(self._argument("/", raw=True), self._escape, greedy=True)
        replacement = self._argument()
        if re.fullmatch(pattern, "", re.DOTALL):
            pattern = f"(?:{pattern})(?<=.)" if pattern else "(?!)"
        return re.sub(
            pattern, lambda _: replacement, value, count=0 if every else 1, flags=re.DOTALL
        )


def _glob(pattern: str, escape: str, *, greedy: bool) -> str:
    """A shell pattern of ``*`` and ``?`` as a regular expression."""
    many = ".*" if greedy else ".*?"
    made: list[str] = []
    at = 0
    quote = ""
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if quote:
            if char == quote:
                quote = ""
            else:
                made.append(re.escape(char))
        elif char in "'\"":
            quote = char
        elif char == escape and at < len(pattern):
            made.append(re.escape(pattern[at]))
            at += 1
        elif char == "*":
            made.append(many)
        elif char == "?":
            made.append(".")
        else:
            made.append(re.escape(char))
    return "".join(made)
