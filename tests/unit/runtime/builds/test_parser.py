"""The parser against the checklist of the language: splitting, directives, places."""

from __future__ import annotations

import pytest

from lazarette.runtime.builds.errors import DockerfileError
from lazarette.runtime.builds.instructions import Healthcheck, Run, Transfer, instruction
from lazarette.runtime.builds.parser import Statement, decode, directives, parse


def last(text: str) -> Statement:
    return parse(text).statements[-1]


def test_continuation_skips_comments_and_blank_lines() -> None:
    assert last("FROM a\nRUN one \\\n# no\n\n  && two\n").rest == "one   && two"


def test_two_escapes_at_the_end_do_not_continue() -> None:
    statements = parse("FROM a\nRUN echo \\\\\nRUN b\n").statements
    assert [s.rest for s in statements[1:]] == ["echo \\\\", "b"]


def test_backtick_escape_directive() -> None:
    parsed = parse("# escape=`\nFROM a\nRUN one `\n two\n")
    assert parsed.escape == "`"
    assert parsed.statements[-1].rest == "one  two"


def test_directives_end_at_the_first_other_comment() -> None:
    assert directives("# syntax=x/y:1\n# Check=skip=all\n# hello\n# escape=`\n") == {
        "syntax": "x/y:1",
        "check": "skip=all",
    }


def test_bom_and_carriage_returns() -> None:
    text = decode(b"\xef\xbb\xbfFROM a\r\nRUN x \\\r\n y\r\n")
    assert last(text).rest == "x  y"


def test_heredocs_know_quotes_and_tabs() -> None:
    statement = last('FROM a\nCOPY <<"A" <<-B /d/\n\t$x\nA\n\ttab\n\tB\n')
    quoted, stripped = statement.heredocs
    assert (quoted.name, quoted.content, quoted.expand) == ("A", "\t$x\n", False)
    assert (stripped.name, stripped.content, stripped.expand) == ("B", "tab\n", True)


def test_onbuild_keeps_a_heredoc() -> None:
    assert last("FROM a\nONBUILD RUN <<E\nx\nE\n").trigger == "RUN <<E\nx\nE\n"


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("FROM a\n\nENV x\n", "ENV must have two arguments", 3),
        ("FROM a\nRUN <<E\nnothing\n", "unterminated heredoc", 2),
        ("# escape=x\nFROM a\n", "invalid escape token", 1),
        ("FROM a\nRUN " + "x" * 70000 + "\n", "line greater than max allowed size", 2),
    ],
)
def test_errors_name_the_line(text: str, message: str, line: int) -> None:
    with pytest.raises(DockerfileError, match=message) as caught:
        parse(text)
    assert caught.value.where is not None
    assert caught.value.where.line == line


def test_empty_file() -> None:
    with pytest.raises(DockerfileError, match="file with no instructions"):
        parse("# nothing\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FROBNICATE x", "unknown instruction: FROBNICATE"),
        ("RNU x", r"unknown instruction: RNU \(did you mean RUN\?\)"),
        ("COPY --form=a b c", r"unknown flag: --form \(did you mean from\?\)"),
        ("COPY --chown=a --chown=b c d", "duplicate flag specified: chown"),
        ("COPY --link=maybe c d", "expecting boolean value for flag link"),
        ("COPY --from c d", "missing a value on flag: from"),
        ("COPY a", "COPY requires at least two arguments"),
        ("COPY https://x/y z", "source can't be a URL for COPY"),
        ("FROM a b", "FROM requires either one or three arguments"),
        ("FROM a AS 1x", "invalid name for build stage"),
        ("SHELL bash -c", "SHELL requires the arguments to be in JSON form"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD"),
        ("ONBUILD FROM x", "FROM isn't allowed as an ONBUILD trigger"),
        ("HEALTHCHECK --interval=5us CMD x", "cannot be less than 1ms"),
        ("HEALTHCHECK --retries=-1 CMD x", r"--retries cannot be negative \(-1\)"),
        ("HEALTHCHECK CMD", "missing command after HEALTHCHECK CMD"),
        ("HEALTHCHECK TCP x", "unknown type"),
        ('VOLUME [""]', "VOLUME specified can not be an empty string"),
        ("RUN --mount=type=foo x", 'unsupported mount type "foo"'),
        ("RUN --network=lan x", 'invalid network mode: "lan"'),
        ("CMD --x y", "unknown flag: --x"),
    ],
)
def test_wrong_instructions(line: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=message) as caught:
        instruction(last(f"FROM a\n{line}\n"))
    assert caught.value.where is not None
    assert caught.value.where.line == 2
    assert line in caught.value.message


def test_invalid_json_is_the_shell_form() -> None:
    run = instruction(last("FROM a\nRUN ['a']\n"))
    assert isinstance(run, Run)
    assert run.shell
    assert run.words == ("['a']",)


def test_healthcheck_forms() -> None:
    shell = instruction(last("FROM a\nHEALTHCHECK --interval=1m --retries=2 CMD curl -f x\n"))
    exec_ = instruction(last('FROM a\nHEALTHCHECK CMD ["curl", "x"]\n'))
    assert isinstance(shell, Healthcheck)
    assert isinstance(exec_, Healthcheck)
    assert shell.test == ("CMD-SHELL", "curl -f x")
    assert (shell.interval, shell.retries) == (60_000_000_000, 2)
    assert exec_.test == ("CMD", "curl", "x")


def test_json_form_of_copy_keeps_spaces() -> None:
    copy = instruction(last('FROM a\nCOPY ["a b", "c d/"]\n'))
    assert isinstance(copy, Transfer)
    assert (copy.sources, copy.target) == (("a b",), "c d/")
