"""From a URL and secrets to an open repository."""

from __future__ import annotations

from pathlib import Path

from lazarette.backup.jobs.model import StoreAccess
from lazarette.backup.repository import keys, kit
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.limit import Rate, unlimited
from lazarette.backup.stores.open import create_place, open_store
from lazarette.backup.stores.retry import RetryPolicy
from lazarette.backup.stores.s3place import Credentials
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument


def credentials(access: StoreAccess) -> Credentials | None:
    """The store's credentials; None takes them from the environment."""
    if not access.access_key:
        return None
    return Credentials(access.access_key, access.secret_key, access.session_token or None)


def secret(access: StoreAccess) -> keys.Secret:
    """The secret that opens the repository.

    Raises:
        InvalidArgument: none is given, or it is not of its kind.
        WrongRecoveryKit: a kit is mistyped.
    """
    if not access.key:
        raise InvalidArgument(
            f"no secret is given for {access.url}",
            hint="set LAZ_PASSPHRASE, or use --key-file or --kit",
        )
    if access.key_kind == "passphrase":
        return keys.Passphrase(access.key)
    if access.key_kind == "kit":
        return kit.parse(access.key).key
    try:
        return keys.KeyFile(bytes.fromhex(access.key))
    except ValueError as bad:
        raise InvalidArgument("the key is not hexadecimal") from bad


def open_repository(
    access: StoreAccess,
    clock: Clock,
    cache: Path | None = None,
    upload: Rate = unlimited,
    retry: RetryPolicy | None = None,
) -> Repository:
    """Open an existing repository.

    Args:
        access: where it is, and what opens it.
        clock: time.
        cache: folder for local copies; None for none.
        upload: limit of what is sent, asked all the time.
        retry: how long an S3 store keeps trying.

    Raises:
        WrongStore: no such bucket or folder.
        Unauthenticated: the store's credentials or the repository's secret are wrong.
        StoreUnavailable: the store does not answer.
    """
    store = open_store(access.url, credentials(access), clock=clock, retry=retry, upload=upload)
    return Repository.unlock(store, secret(access), clock, cache)


def init_repository(access: StoreAccess, clock: Clock) -> tuple[Repository, kit.RecoveryKit]:
    """Make a repository that opens with ``access`` and with the returned kit.

    Raises:
        Conflict: there is a repository already.
        Unauthenticated: the store's credentials are wrong.
    """
    store = create_place(access.url, credentials(access), clock=clock)
    made = keys.create(store, [secret(access)], clock=clock)
    repository = Repository.create(store, made, clock)
    return repository, add_kit(repository, access.url, clock)


def add_kit(repository: Repository, url: str, clock: Clock) -> kit.RecoveryKit:
    """A further recovery kit of an open repository."""
    sheet = kit.make(url, repository.keys.repository_id, clock=clock)
    keys.add(repository.store, repository.keys, sheet.key, label="recovery kit", clock=clock)
    return sheet
