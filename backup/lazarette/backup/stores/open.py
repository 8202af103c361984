"""From a URL to a store.

========================================  =====================================
``/mnt/disk/repo``, ``file:///mnt/…``     a folder, never a relative one
``s3://bucket/prefix``                    AWS
``s3://bucket/prefix?endpoint=http://…``  any other S3 server
========================================  =====================================

Further options of ``s3``: ``region=…``, ``style=virtual`` (the bucket in the host's
name; the default for AWS) or ``style=path``, and ``as-of=2026-01-31T12:00:00Z``: the bucket as
it was then, for reading only, where it keeps versions.  Credentials never stand in a URL: they are
passed, or come from ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``
or ``~/.aws``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from lazarette.backup.stores.contract import BlobStore, is_name
from lazarette.backup.stores.limit import LimitedStore, Rate, unlimited
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.retry import RetryPolicy, RetryStore
from lazarette.backup.stores.s3place import Credentials, S3Place, moment
from lazarette.storage.clock import Clock, SystemClock
from lazarette.storage.errors import Forbidden, InvalidArgument

if TYPE_CHECKING:
    from lazarette.backup.stores.s3 import S3Store
    from lazarette.backup.stores.s3lock import LockedS3Store

_OPTIONS = {"as-of", "endpoint", "region", "style"}


def open_store(
    url: str,
    credentials: Credentials | None = None,
    *,
    clock: Clock | None = None,
    retry: RetryPolicy | None = None,
    conditional: bool = True,
    upload: Rate = unlimited,
    download: Rate = unlimited,
) -> BlobStore:
    """Open an existing place; a bucket is contacted at the first operation.

    What asks an S3 server for too much is slowed down, and tried again.

    Args:
        url: as in the module's text.
        credentials: for S3; None takes them from the environment.
        clock: for retries.
        retry: how long an S3 store keeps trying.
        conditional: whether conditional writes were found exact (``probe_conditional``).
        upload: bytes a second at this moment.
        download: the same.

    Raises:
        InvalidArgument: the URL cannot be understood, or holds a secret.
        WrongStore: the folder does not exist.
    """
    place = parse_url(url)
    time = clock or SystemClock()
    if isinstance(place, str):
        local = LocalStore(place)
        if upload is unlimited and download is unlimited:
            return local
        return LimitedStore(local, time, upload=upload, download=download)
    # On use: boto3 takes a third of a second to import.
    from lazarette.backup.stores.s3 import S3Store

    now = S3Store(
        place,
        credentials or credentials_from(os.environ),
        conditional=conditional,
        read_timeout=(retry or RetryPolicy()).silence,
    )
    bare = _as_of(now, place.as_of_ns) if place.as_of_ns else now
    return RetryStore(LimitedStore(bare, time, upload=upload, download=download), time, retry)


def create_place(
    url: str,
    credentials: Credentials | None = None,
    *,
    clock: Clock | None = None,
    retry: RetryPolicy | None = None,
) -> BlobStore:
    """Open a place for a new repository; make its bucket or folder if it is missing.

    Raises:
        InvalidArgument: the URL cannot be understood, or holds a secret.
        Forbidden: it is missing and may not be made.
    """
    place = parse_url(url)
    if isinstance(place, str):
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
        except OSError as failed:
            raise Forbidden(f"cannot make the folder {place}: {failed.strerror}") from failed
        return LocalStore(place)
    if place.as_of_ns:
        raise InvalidArgument("nothing can be made in the past", hint="leave as-of out of the URL")
    from lazarette.backup.stores.s3 import S3Store

    store = S3Store(place, credentials or credentials_from(os.environ))
    store.create_bucket()
    time = clock or SystemClock()
    return RetryStore(LimitedStore(store, time), time, retry)


def lockable(url: str, credentials: Credentials | None = None) -> LockedS3Store:
    """A bucket as something that locks its objects; it may not exist yet.

    Raises:
        InvalidArgument: the URL cannot be understood, or is of no bucket.
    """
    place = parse_url(url)
    if isinstance(place, str) or place.as_of_ns:
        raise InvalidArgument(
            f"objects can be locked in buckets only, not in {url}", hint="use s3://bucket/prefix"
        )
    from lazarette.backup.stores.s3lock import LockedS3Store

    return LockedS3Store(place, credentials or credentials_from(os.environ))


def of_now(url: str) -> str:
    """A store's URL without the moment it is looked at."""
    start, question, options = url.partition("?")
    kept = [one for one in options.split("&") if not one.startswith("as-of=")]
    return start + question + "&".join(kept) if any(kept) else start


def _as_of(store: S3Store, time_ns: int) -> BlobStore:
    from lazarette.backup.stores.s3lock import S3AsOf

    return S3AsOf(store, time_ns)


def parse_url(url: str) -> str | S3Place:
    """A folder's absolute path, or a place in S3.

    Raises:
        InvalidArgument: the URL cannot be understood, or holds a secret.
    """
    if "\0" in url:
        raise InvalidArgument("a repository's address cannot hold a zero byte")
    if url.startswith("/"):
        return os.path.normpath(url)
    if "://" not in url:
        # whose working directory would it be: the daemon's, a job's, the caller's?
        raise InvalidArgument(
            f'a repository\'s address cannot be "{url}"',
            hint="give a folder from / on, file:///folder or s3://bucket/prefix",
        )
    try:
        parts = urlsplit(url)
        options = {key: values[-1] for key, values in parse_qs(parts.query, True, True).items()}
    except ValueError as bad:
        raise InvalidArgument(f"not a store URL: {bad}") from bad
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument(
            "a store URL must not hold credentials",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidArgument(f"not an absolute file URL: {url}")
        return parse_url(unquote(parts.path))
    if parts.scheme != "s3":
        raise InvalidArgument(
            f"no store is called {parts.scheme}", hint="use a folder, file:// or s3://"
        )
    return _s3_place(parts.netloc, unquote(parts.path), options)


def _s3_place(bucket: str, path: str, options: Mapping[str, str]) -> S3Place:
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise InvalidArgument(f"unknown option of an s3 URL: {unknown[0]}")
    if not bucket:
        raise InvalidArgument("an s3 URL needs a bucket", hint="s3://bucket/prefix")
    prefix = path.strip("/")
    if prefix and not is_name(prefix.lower()):
        raise InvalidArgument(f"not a prefix for objects: {prefix}")
    endpoint = options.get("endpoint") or None
    if endpoint is not None:
        server = urlsplit(endpoint)
        if server.scheme not in ("http", "https") or not server.hostname:
            raise InvalidArgument(f"not an endpoint: {server.scheme}://{server.hostname}")
        if server.username is not None:
            raise InvalidArgument("an endpoint must not hold credentials")
    style = options.get("style", "path" if endpoint else "virtual")
    if style not in ("path", "virtual"):
        raise InvalidArgument(f"style is path or virtual, not {style}")
    try:
        as_of = moment(options["as-of"]) if "as-of" in options else 0
    except ValueError as bad:
        raise InvalidArgument(
            f"as-of is no time: {options['as-of']}", hint="write 2026-01-31T12:00:00Z"
        ) from bad
    return S3Place(
        bucket,
        prefix + "/" if prefix else "",
        endpoint.rstrip("/") if endpoint else None,
        options.get("region") or "us-east-1",
        style == "virtual",
        as_of,
    )


def credentials_from(environment: Mapping[str, str]) -> Credentials | None:
    """The access key of the environment, if there is a whole one."""
    access = environment.get("AWS_ACCESS_KEY_ID")
    secret = environment.get("AWS_SECRET_ACCESS_KEY")
    if not access or not secret:
        return None
    return Credentials(access, secret, environment.get("AWS_SESSION_TOKEN") or None)
