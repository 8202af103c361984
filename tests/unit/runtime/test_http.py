"""The frame of the API: what every route relies on."""

import json

import pytest
from aiohttp.test_utils import make_mocked_request

from lazarette.runtime.api.http import Api, Call, Route, error_response, parse_filters
from lazarette.storage.errors import Conflict, InvalidArgument, NotModified


async def _handler(call: Call) -> object:  # pragma: no cover - only named in routes
    raise AssertionError


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("", {}),
        ('{"label": {"a=b": true, "c": false}}', {"label": ["a=b"]}),
        ('{"label": ["a=b", "c"]}', {"label": ["a=b", "c"]}),
        ('{"dangling": {"false": true}}', {"dangling": ["false"]}),
        ('{"label": "a"}', {"label": ["a"]}),
    ],
)
def test_filters_in_both_encodings(raw: str, found: dict[str, list[str]]) -> None:
    assert parse_filters(raw, ("label", "dangling")) == found


@pytest.mark.parametrize("raw", ["[", "[]", '{"other": ["x"]}', '{"label": 3}', '{"label": [3]}'])
def test_bad_filters_are_refused(raw: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_filters(raw, ("label",))


@pytest.mark.parametrize(
    ("path", "tried", "name"),
    [
        ("/images/{name:.*}/json", "/images/registry:5000/a/b:tag/json", "registry:5000/a/b:tag"),
        ("/images/{name:.*}/json", "/images/busybox/json", "busybox"),
        ("/containers/{name}/json", "/containers/x/json", "x"),
        ("/containers/{name}/json", "/containers/a/b/json", None),
        ("/networks", "/networks/", ""),
    ],
)
def test_paths(path: str, tried: str, name: str | None) -> None:
    match = Route("GET", path, _handler).pattern().fullmatch(tried)  # type: ignore[arg-type]
    assert (None if match is None else match.groupdict().get("name", "")) == name


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), ("-1", -1), (str(2**63 - 1), 2**63 - 1), (str(2**63), None), ("9" * 5000, None)],
)
def test_numbers_have_64_bits(text: str, number: int | None) -> None:
    call = Call(make_mocked_request("GET", f"/x?n={text}"), (1, 50), {})
    if number is not None:
        assert call.number("n") == number
        return
    with pytest.raises(InvalidArgument):
        call.number("n")


def test_errors_carry_message_hint_and_number() -> None:
    answer = error_response(Conflict("name is taken", hint="choose another"))
    assert answer.status == 409
    assert isinstance(answer.body, bytes)
    assert json.loads(answer.body) == {
        "message": "name is taken",
        "hint": "choose another",
        "code": Conflict.number,
        "exit": Conflict.exit_code,
    }


def test_not_modified_has_no_body() -> None:
    answer = error_response(NotModified("already running"))
    assert answer.status == 304
    assert answer.body is None


@pytest.mark.parametrize(
    ("version", "told"),
    [((1, 51), "too new. Maximum supported API version is 1.50"), ((1, 23), "too old")],
)
def test_versions_out_of_range(version: tuple[int, int], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        Api._check(version)
