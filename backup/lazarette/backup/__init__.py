"""Where bytes are safe: the repository, its stores, policies and recovery."""

import sys

# msgspec asks typing_extensions first for what typing has, too, in every Python of ours.  The
# other with its inspect is a tenth of what a short job imports.
_known = sys.modules.setdefault("typing_extensions", None)  # type: ignore[arg-type]
import msgspec  # noqa: E402, F401

if _known is None:
    del sys.modules["typing_extensions"]
