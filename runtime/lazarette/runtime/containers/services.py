"""What containers need of the other parts, as small protocols.

The engine passes the real stores and managers; tests may pass less.
"""

from __future__ import annotations

from typing import Protocol

from lazarette.runtime.images.model import Image


class ImageSource(Protocol):
    """Where images come from."""

    def get(self, ref: str) -> Image:
        """An image by id, unique beginning of an id, or reference.

        Raises:
            ImageNotFound: there is none.
        """
        ...
