"""What an S3 server's or client library's failure means in the words of the contract."""

from __future__ import annotations

from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from lazarette.backup.stores.contract import (
    BlobNotFound,
    ShortBlob,
    SlowDown,
    StoreRefused,
    StoreUnavailable,
    TagMismatch,
    WrongStore,
)
from lazarette.storage.errors import Forbidden, LazaretteError, NoSpace, Unauthenticated

_NO_BUCKET = {"NoSuchBucket", "NoSuchBucketPolicy", "InvalidBucketName"}
_BAD_CREDENTIALS = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLarge"}
_SLOW = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
_AGAIN = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "XAmzContentSHA256Mismatch",
}
DIALECT_CODES = {
    "InvalidArgument",
    "InvalidDigest",
    "InvalidRequest",
    "MissingContentLength",
    "NotImplemented",
    "SignatureDoesNotMatch",
    "XAmzContentSHA256Mismatch",
}
"""Answers by which servers refuse a checksum header or unsigned payload they do not know."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error answer: HTTP status, S3 error code, and what the server says about it."""

    status: int
    code: str
    text: str
    retry_after: float

    @classmethod
    def of(cls, error: ClientError) -> Answer:
        """Parse botocore's dictionaries."""
        metadata = error.response.get("ResponseMetadata", {})
        described = error.response.get("Error", {})
        headers = metadata.get("HTTPHeaders", {})
        try:
            wait = float(headers.get("retry-after", "0"))
        except ValueError:
            wait = 0.0
        return cls(
            int(metadata.get("HTTPStatusCode", 0)),
            str(described.get("Code", "")),
            str(described.get("Message", "")),
            wait,
        )


def translate(error: Exception, operation: str, what: str) -> LazaretteError:
    """The contract's error (S8) for a failure of the client library.

    Args:
        error: what botocore or urllib3 raised.
        operation: e.g. ``"write"``.
        what: the object and where it is.
    """
    if isinstance(error, ClientError):
        return _translate_answer(Answer.of(error), operation, what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return Unauthenticated(
            f"cannot {operation} {what}: no credentials",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    kind = type(error).__name__
    detail = str(error) if isinstance(error, BotoCoreError) else f"{kind}: {error}"
    return StoreUnavailable(
        f"cannot {operation} {what}: {_one_line(detail)}",
        hint="check the endpoint and the network",
    )


def _translate_answer(answer: Answer, operation: str, what: str) -> LazaretteError:
    said = _one_line(f"{answer.status} {answer.code} {answer.text}".strip())
    message = f"cannot {operation} {what}: {said}"
    status, code = answer.status, answer.code
    if code in _NO_BUCKET:
        return WrongStore(message, hint="check the bucket's name, or make it with laz repo init")
    if code in _BAD_CREDENTIALS:
        hint = "check the access key and secret"
        if code == "RequestTimeTooSkewed":
            hint = "set this host's clock right: the store refuses requests of another time"
        elif code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
            hint = "get fresh credentials; the session token has expired"
        return Unauthenticated(message, hint=hint)
    if status == 507 or code in _FULL:
        return NoSpace(message, hint="free space or raise the quota there, then run it again")
    if status == 429 or code in _SLOW or (status == 503 and code != "InternalError"):
        return SlowDown(message, retry_after=answer.retry_after)
    if status in (404, 410):
        return BlobNotFound(f"no object {what}")
    if status == 412:
        return TagMismatch(f"{what} changed meanwhile")
    if status == 416:
        return ShortBlob(f"{what} ends before the range asked for")
    if status >= 500 or status in (408, 409, 425) or code in _AGAIN:
        if status == 501:
            return StoreRefused(message)
        return StoreUnavailable(message)
    if status == 401:
        return Unauthenticated(message, hint="check the access key and secret")
    if status == 403:
        return Forbidden(message, hint="check what the access key is allowed to do")
    return StoreRefused(message)


def _one_line(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else line[:297] + "..."
