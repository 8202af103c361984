"""JSON as Go reads it, which is what clients of the Engine were written against.

Names of fields come in any case, and a field that is null is a field that is not there.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")


def convert(value: object, kind: type[T]) -> T:
    """Read decoded JSON as ``kind``; a text may stand for a number.

    Raises:
        msgspec.ValidationError: a value has the wrong type; the message says where.
    """
    try:
        return msgspec.convert(_canonical(kind, value), type=kind, strict=False)
    except RecursionError as bad:
        raise msgspec.ValidationError("values are nested too deeply") from bad


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, tuple[str, Any]]:
    """Lower-case name → (encoded name, type of its struct or None) of a struct's fields."""
    hints = get_type_hints(kind)
    return {
        encoded.lower(): (encoded, hints[name])
        for name, encoded in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
    }


def _canonical(kind: Any, value: object) -> object:
    """``value`` with the field names of the structs in ``kind`` and without nulls there."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if not isinstance(value, dict):
            return value
        known = _fields(kind)
        made: dict[str, object] = {}
        for key, inner in value.items():
            if inner is not None and (found := known.get(str(key).lower())):
                made[found[0]] = _canonical(found[1], inner)
        return made
    origin = get_origin(kind)
    if origin is Union or origin is UnionType:
        return _canonical(_alternative(kind, value), value)
    if origin is list and isinstance(value, list):
        return [_canonical(get_args(kind)[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        inside = get_args(kind)[1]
        return {str(key): _canonical(inside, item) for key, item in value.items()}
    return value


def _alternative(union: Any, value: object) -> Any:
    """The member of a union that a JSON value is meant for."""
    for part in get_args(union):
        if isinstance(value, list) and get_origin(part) is list:
            return part
        if isinstance(value, dict) and (
            get_origin(part) is dict
            or (isinstance(part, type) and issubclass(part, msgspec.Struct))
        ):
            return part
    return object
