"""``RUN --device``: the devices of a step, as BuildKit 0.20 has them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lazarette.runtime import cdi
from lazarette.runtime.builds.errors import DockerfileError, StepFailed
from lazarette.storage.errors import InvalidArgument, NotFound

ENTITLEMENT: Final = "device"
_BOOLS = {"": True, "true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class StepDevice:
    """One ``--device``: which, and whether the step fails without it."""

    name: cdi.DeviceName
    required: bool = False

    def allowed(self, entitlements: frozenset[str]) -> bool:
        """Whether ``--allow device`` or ``--allow device=NAME`` was given for it."""
        return bool({ENTITLEMENT, f"{ENTITLEMENT}={self.name}"} & entitlements)


def parse_device(text: str) -> StepDevice:
    """The value of one ``--device``: ``vendor.com/class[=name][,required]``.

    Raises:
        DockerfileError: no name, or a field that means nothing.
    """
    first, *fields = next(csv.reader([text]), [""])
    required = False
    for field in fields:
        key, _, value = field.partition("=")
        if key.strip().lower() != "required" or value.lower() not in _BOOLS:
            raise DockerfileError(f"unexpected field '{field}' for device '{first}'")
        required = _BOOLS[value.lower()]
    try:
        return StepDevice(cdi.DeviceName.parse(first.removeprefix("name=")), required)
    except InvalidArgument as bad:
        raise DockerfileError(bad.message, hint=bad.hint) from bad


def edits(devices: Sequence[StepDevice]) -> cdi.Edits:
    """What a step needs for its devices; those it can do without are left out if missing.

    Raises:
        StepFailed: a required device is missing, or its description is broken.
    """
    found = cdi.Edits()
    try:
        for device in devices:
            try:
                found += cdi.find([device.name])
            except NotFound:
                if device.required:
                    raise
    except (NotFound, InvalidArgument) as bad:
        raise StepFailed(bad.message, hint=bad.hint) from bad
    return found
