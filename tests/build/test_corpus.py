"""The conformance corpus: small Dockerfiles, each with exactly what must come of it.

``corpus/*.toml`` hold the cases.  A case has a ``dockerfile`` and a ``context`` and says:

- ``tree``: every entry the image has beside its base, as :meth:`Bench.tree` writes them;
- ``config``: the whole configuration, what it has beside the base's;
- ``history``: texts of the steps, digests as ``file:…``, empty layers marked ``(empty)``,
  the machine's architecture as ``ARCH``;
- ``output``: texts of the stream, in this order;  ``absent``: texts that are not in it;
- ``error``: a regular expression for the message of a build that must fail.

A case says ``error``, or all of ``tree``, ``config`` and ``history``.  What BuildKit and the
classic builder of dockerd 26.1 make of the same files was compared with these; where they
differ, ``docs/builds.md`` says which of them is followed.

All of them run on the default layer driver, those with ``everywhere``, which are about
what layers hold, on every other one too.  With ``LAZARETTE_BUILD_DRIVERS=all`` all run on all.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.builds import Bench, Outcome, text_of
from tests.support.images import PATH_ENV
from tests.support.layers import KINDS

from lazarette.runtime.builds.options import BuildOptions, Limits, Secret
from lazarette.storage.errors import LazaretteError

CORPUS = Path(__file__).parent / "corpus"
ARCHITECTURE = re.compile(r"linux/[a-z0-9]+(/v[0-9])?")
DIGEST = re.compile(r"(file|dir|multi):[0-9a-f]{64}")
PREFIX = "/bin/sh -c #(nop) "


ALL = os.environ.get("LAZARETTE_BUILD_DRIVERS") == "all"


def _cases() -> list[Any]:
    found: list[Any] = []
    for file in sorted(CORPUS.glob("*.toml")):
        for case in tomllib.loads(file.read_text())["case"]:
            name = f"{file.stem}-{case['name']}"
            kinds = KINDS if ALL or case.get("everywhere") else KINDS[:1]
            found += [pytest.param(kind, case, id=f"{kind.id}-{name}") for kind in kinds]
    return found


def _options(given: Mapping[str, Any]) -> BuildOptions:
    values: dict[str, Any] = {"no_cache": True, **given}  # another case must not help
    if "secrets" in values:
        values["secrets"] = {n: Secret(v.encode()) for n, v in values["secrets"].items()}
    if "limits" in values:
        values["limits"] = Limits(**values["limits"])
    for name in ("tags", "extra_hosts", "cache_from"):
        if name in values:
            values[name] = tuple(values[name])
    if "entitlements" in values:
        values["entitlements"] = frozenset(values["entitlements"])
    return BuildOptions(**values)


def test_every_case_says_everything() -> None:
    cases = [param.values[1] for param in _cases() if param.values[0] is KINDS[0]]
    assert len(cases) > 280
    told = {"tree", "config", "history"}
    assert not [case["name"] for case in cases if "error" not in case and told - case.keys()]


@pytest.mark.parametrize(("driven", "case"), _cases(), indirect=["driven"])
def test_case(driven: Bench, case: dict[str, Any]) -> None:
    options = _options(case.get("options", {}))
    messages: list[Mapping[str, object]] = []
    if "error" in case:
        with pytest.raises(LazaretteError) as caught:
            driven.build(case["dockerfile"], case.get("context"), options, messages=messages)
        assert re.search(case["error"], caught.value.message, re.DOTALL), caught.value.message
        _check_output(case, text_of(messages))
        return
    built = driven.build(case["dockerfile"], case.get("context"), options, messages=messages)
    _check_output(case, built.text)
    _check_image(driven, case, built)


def _check_output(case: Mapping[str, Any], text: str) -> None:
    at = 0
    for part in case.get("output", []):
        found = text.find(part, at)
        assert found >= 0, f"{part!r} is not in the output from {at}:\n{text}"
        at = found + len(part)
    for part in case.get("absent", []):
        assert part not in text


def _check_image(bench: Bench, case: Mapping[str, Any], built: Outcome) -> None:
    busybox = bench.images.get("busybox")
    based = bool(built.image.chain) and built.image.chain[0] == busybox.chain[0]
    base = busybox if based else None
    assert bench.tree(built.image, base) == sorted(case["tree"])
    config = msgspec.to_builtins(built.image.config.run)
    expected = {"Env": [PATH_ENV]} | ({"Cmd": ["sh"]} if based else {}) | case["config"]
    assert config == {key: value for key, value in expected.items() if value != "unset"}
    lines = (built.image.config.history or [])[1 if based else 0 :]
    shown = [
        DIGEST.sub(r"\1:…", line.created_by).removeprefix(PREFIX).strip()
        + (" (empty)" if line.empty_layer else "")
        for line in lines
    ]
    assert [ARCHITECTURE.sub("linux/ARCH", line) for line in shown] == case["history"]
    for field in ("author", "architecture"):
        if field in case:
            assert getattr(built.image.config, field) == case[field]
