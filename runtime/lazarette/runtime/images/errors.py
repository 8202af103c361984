"""Errors of images and registries: numbers 380-399.

Messages that clients match on (``No such image: …``, ``pull access denied for …``) are
the Engine's own, to the letter; the rest follow the house form.
"""

from __future__ import annotations

from lazarette.storage.errors import (
    Conflict,
    DamagedData,
    InvalidArgument,
    LazaretteError,
    NotFound,
    Unauthenticated,
)


class ImageNotFound(NotFound):
    """No image of that name or id; docker-py and the docker command line read the text."""

    number = 380

    def __init__(self, reference: str) -> None:
        super().__init__(f"No such image: {reference}")


class InvalidReference(InvalidArgument):
    """The text is not an image reference."""

    number = 381


class ImageConflict(Conflict):
    """The image is used, tagged elsewhere or built upon."""

    number = 382


class BadArchive(InvalidArgument):
    """An image archive or layer is broken, hostile or too large."""

    number = 383


class DigestMismatch(DamagedData):
    """Bytes received or stored do not have the digest they were announced with."""

    number = 384


class RegistryFault(LazaretteError):
    """The registry cannot be reached or answered with a fault."""

    number = 385
    exit_code = 53
    http_status = 500


class PullDenied(NotFound):
    """The repository does not exist or needs a login."""

    number = 386

    def __init__(self, name: str, detail: str = "") -> None:
        text = (
            f"pull access denied for {name}, "
            "repository does not exist or may require 'docker login'"
        )
        super().__init__(f"{text}: {detail}" if detail else text)


class ManifestUnknown(NotFound):
    """The repository has no such tag or digest."""

    number = 387

    def __init__(self, reference: str) -> None:
        super().__init__(f"manifest for {reference} not found: manifest unknown: manifest unknown")


class LoginFailed(Unauthenticated):
    """The registry refuses the credentials."""

    number = 388


class NoSuchPlatform(NotFound):
    """An index has no manifest for the platform wanted."""

    number = 389


class PruneRunning(Conflict):
    """Another prune has not ended."""

    number = 390

    def __init__(self) -> None:
        super().__init__("a prune operation is already running")


class NoSuchTag(NotFound):
    """Nothing of that name is here to push."""

    number = 391

    def __init__(self, name: str) -> None:
        super().__init__(f"An image does not exist locally with the tag: {name}")


class NoCredentials(RegistryFault):
    """The registry wants a login and none was given.

    Not a 401: the docker command line would ask for a password in the middle of a pull.
    """

    number = 392

    def __init__(self, method: str, url: str) -> None:
        super().__init__(
            f'{method.title()} "{url}": no basic auth credentials', hint="docker login HOST"
        )
