"""JSON as every room reads it: whatever is no JSON of the wanted form is one kind of error.

``msgspec.json.decode`` lets two more out, which whoever sends bytes can cause: text that is
no UTF-8 as the codec's own error, and values nested deeper than the interpreter's stack.  A
caller that catches only msgspec's would fail for them as for a fault of its own, so the
linter refuses the plain function everywhere but here.

msgspec also looks at a type when it is first read into, and two threads that do so at once can
end the process with a segmentation fault (seen with 0.22 on a slow machine).  So decoders are
made one at a time, and kept.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

_making = threading.Lock()
_decoders: dict[tuple[Any, bool], msgspec.json.Decoder[Any]] = {}


def _decoder(type: Any, strict: bool) -> msgspec.json.Decoder[Any]:
    found = _decoders.get((type, strict))
    if found is None:
        with _making:
            found = _decoders.setdefault((type, strict), msgspec.json.Decoder(type, strict=strict))
    return found


@overload
def decode(data: bytes | str | msgspec.Raw, *, type: type[T], strict: bool = True) -> T: ...


@overload
def decode(data: bytes | str | msgspec.Raw, *, type: Any = Any, strict: bool = True) -> Any: ...


def decode(data: bytes | str | msgspec.Raw, *, type: Any = Any, strict: bool = True) -> Any:
    """Read one JSON document.

    Args:
        data: the document.
        type: what it is read into.
        strict: whether ``"1"`` is no number.

    Raises:
        msgspec.DecodeError: it is none.
        msgspec.ValidationError: it is one of another form; a kind of the former.
    """
    try:
        return _decoder(type, strict).decode(data)
    except UnicodeError as bad:
        raise msgspec.DecodeError(f"text that is no UTF-8: {bad}") from bad
    except RecursionError as bad:
        raise msgspec.DecodeError("values are nested too deeply") from bad
