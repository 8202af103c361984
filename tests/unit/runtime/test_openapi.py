"""The description of the API says what the routes do."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest.mock import MagicMock

import msgspec

from lazarette.runtime import api
from lazarette.runtime.api.http import Route
from lazarette.runtime.api.openapi import describe, plain
from lazarette.runtime.api.routes import all_routes

_READ = re.compile(
    r"""call\.(?:text|texts|flag|number)\(\s*"([\w-]+)"|query\.get(?:all)?\("([\w-]+)\""""
)


def routes() -> list[Route]:
    return all_routes(MagicMock())  # only the table is looked at; no handler runs


def test_every_route_is_there_with_a_summary() -> None:
    told = msgspec.json.decode(msgspec.json.encode(describe(routes())))
    for route in routes():
        operation = told["paths"][plain(route.path)][route.method.lower()]
        assert operation["summary"], route.path
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', str(told).replace("'", '"')))
    assert references <= set(told["components"]["schemas"])


def test_every_body_that_is_read_is_told() -> None:
    told = describe(routes())["paths"]
    assert isinstance(told, dict)
    for route in routes():
        if "call.json(" in inspect.getsource(route.handler):
            operation = told[plain(route.path)][route.method.lower()]
            assert "application/json" in operation["requestBody"]["content"], route.path


def test_every_query_value_that_is_read_is_told() -> None:
    told = describe(routes())
    paths = told["paths"]
    assert isinstance(paths, dict)
    known = {
        one["name"]
        for path in paths.values()
        for operation in path.values()
        for one in operation["parameters"]
        if one["in"] == "query"
    }
    read = set()
    for file in Path(next(iter(api.__path__))).glob("*.py"):
        read |= {one or other for one, other in _READ.findall(file.read_text())}
    assert read - known == set()
