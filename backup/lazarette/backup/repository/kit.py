"""The recovery kit: one sheet of paper that opens a repository on a bare machine.

It names the repository and holds a secret of 20 random bytes, written so that a person
can type it: Crockford's base 32 (no I, L, O or U), groups of four, two lines, and after
each line two characters that betray a typing mistake in that line (1 in 1,024 passes).
A last group checks everything together, so that a kit put together from two is noticed.
The QR code holds the same as one line of text.

::

    LAZARETTE RECOVERY KIT 1
    repository  s3://backups/host-a?endpoint=https://s3.example.net
    id          5f0c…
    made        2026-11-25T10:04:30Z
    key 1       7K3M-Q9TT-0ZVB-4D2H  8C
    key 2       N5XA-PPR1-6WFE-YJ3S  QT
    check       H4ZM

Reading is forgiving about case, spaces, hyphens and the look-alikes O/0 and I/L/1, and
says which line is wrong.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from blake3 import blake3

from lazarette.backup.hidden import Hidden
from lazarette.backup.repository.keys import KitSecret
from lazarette.storage.clock import Clock, SystemClock, rfc3339
from lazarette.storage.errors import Unauthenticated

if TYPE_CHECKING:
    import segno

SECRET_BYTES = 20
_TITLE = "LAZARETTE RECOVERY KIT"
_SCHEME = "lazarette"
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOK_ALIKES = str.maketrans("OIL", "011")
_LINE = 16
_LINES = 2


class WrongRecoveryKit(Unauthenticated):
    """A recovery kit was mistyped, is incomplete, or is another repository's."""

    number = 213
    exit_code = 41


class RecoveryKit(Hidden, frozen=True):
    """What the paper says.

    Attributes:
        url: the repository's store, without credentials; no line breaks.
        repository_id: its 16 bytes.
        secret: 20 random bytes.
        made: when, RFC 3339; for people only.
    """

    url: str
    repository_id: bytes
    secret: bytes
    made: str = ""

    @property
    def key(self) -> KitSecret:
        """The secret as one of the repository's."""
        return KitSecret(self.secret)

    def text(self) -> str:
        """The sheet, to be printed."""
        symbols = _encode(self.secret)
        lines = [
            f"{_TITLE} 1",
            f"repository  {self.url}",
            f"id          {self.repository_id.hex()}",
            f"made        {self.made}",
        ]
        for number in range(_LINES):
            part = symbols[number * _LINE : (number + 1) * _LINE]
            groups = "-".join(part[place : place + 4] for place in range(0, _LINE, 4))
            lines.append(f"key {number + 1}       {groups}  {_line_check(number, part)}")
        lines.append(f"check       {_whole_check(self)}")
        return "\n".join(lines) + "\n"

    def uri(self) -> str:
        """The same as one line, for the QR code."""
        words = {
            "id": self.repository_id.hex(),
            "key": _encode(self.secret),
            "check": _whole_check(self),
            "made": self.made,
            "url": self.url,
        }
        return f"{_SCHEME}:kit1?{urlencode(words)}"

    def qr_svg(self) -> str:
        """The QR code as an SVG document."""
        out = io.BytesIO()
        self._qr().save(out, kind="svg", scale=4, border=4)
        return out.getvalue().decode()

    def qr_terminal(self) -> str:
        """The QR code in half-block characters."""
        out = io.StringIO()
        self._qr().terminal(out, compact=True)
        return out.getvalue()

    def _qr(self) -> segno.QRCode:
        import segno  # on use: it brings XML and HTTP

        return segno.make_qr(self.uri(), error="m")


def make(url: str, repository_id: bytes, *, clock: Clock | None = None) -> RecoveryKit:
    """A new kit; its ``key`` must still be added to the repository."""
    moment = rfc3339((clock or SystemClock()).now_ns() // 10**9 * 10**9)
    made = moment.partition(".")[0].rstrip("Z") + "Z"
    return RecoveryKit(url, repository_id, os.urandom(SECRET_BYTES), made)


def parse(text: str) -> RecoveryKit:
    """Read a typed or pasted sheet, or the content of the QR code.

    Raises:
        WrongRecoveryKit: something is missing or mistyped; the message says which line.
    """
    stripped = text.strip()
    if stripped.lower().startswith(_SCHEME + ":"):
        return _parse_uri(stripped)
    fields: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        name = words[0].lower().rstrip(":")
        if name == "key" and len(words) > 1:
            fields["key " + words[1].rstrip(":").translate(_LOOK_ALIKES)] = " ".join(words[2:])
        else:
            fields[name] = " ".join(words[1:])
    symbols = parse_key(fields)
    return _checked(
        fields.get("repository", ""),
        fields.get("id", ""),
        _decode(symbols),
        fields.get("check", ""),
        fields.get("made", ""),
    )


def parse_key(fields: dict[str, str]) -> str:
    """The secret's symbols from the lines ``key 1`` and ``key 2``, each checked by itself.

    Raises:
        WrongRecoveryKit: a line is missing or mistyped.
    """
    symbols = ""
    for number in range(_LINES):
        name = f"key {number + 1}"
        typed = _symbols(fields.get(name, ""), name)
        if not typed:
            raise WrongRecoveryKit(
                f"the recovery kit has no line {name!r}", hint="type the whole sheet"
            )
        if len(typed) != _LINE + 2:
            raise WrongRecoveryKit(
                f"line {name!r} of the recovery kit has {len(typed)} characters"
                f" instead of {_LINE + 2}",
                hint="compare that line with the paper",
            )
        if _line_check(number, typed[:_LINE]) != typed[_LINE:]:
            raise WrongRecoveryKit(
                f"line {name!r} of the recovery kit is mistyped",
                hint="compare that line with the paper",
            )
        symbols += typed[:_LINE]
    return symbols


def _parse_uri(text: str) -> RecoveryKit:
    parts = urlsplit(text)
    if parts.path.lower() != "kit1":
        raise WrongRecoveryKit("the code is not a recovery kit of a version this program knows")
    words = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    symbols = _symbols(words.get("key", ""), "key")
    if len(symbols) != _LINE * _LINES:
        raise WrongRecoveryKit("the code holds no whole key", hint="scan it again, or type it")
    return _checked(
        words.get("url", ""),
        words.get("id", ""),
        _decode(symbols),
        words.get("check", ""),
        words.get("made", ""),
    )


def _checked(url: str, identity: str, secret: bytes, check: str, made: str) -> RecoveryKit:
    try:
        repository = bytes.fromhex(identity)
    except ValueError:
        repository = b""
    if len(repository) != 16:
        raise WrongRecoveryKit(
            "line 'id' of the recovery kit is missing or mistyped",
            hint="it has 32 characters of 0-9 and a-f",
        )
    if not url:
        raise WrongRecoveryKit("line 'repository' of the recovery kit is missing")
    kit = RecoveryKit(url, repository, secret, made)
    if _symbols(check, "check") != _whole_check(kit):
        raise WrongRecoveryKit(
            "the lines of the recovery kit do not belong together",
            hint="the key is typed right: compare 'repository', 'id' and 'check' with the paper",
        )
    return kit


def _symbols(typed: str, name: str) -> str:
    """What was typed, in the alphabet's own spelling."""
    plain = "".join(typed.replace("-", "").split()).upper().translate(_LOOK_ALIKES)
    for symbol in plain:
        if symbol not in _ALPHABET:
            raise WrongRecoveryKit(
                f"line {name!r} of the recovery kit has a character no kit has: {symbol!r}",
                hint="compare that line with the paper",
            )
    return plain


def _encode(data: bytes) -> str:
    """Base 32, most significant bits first; the length must be a multiple of five bytes."""
    number = int.from_bytes(data, "big")
    count = len(data) * 8 // 5
    return "".join(_ALPHABET[number >> 5 * (count - 1 - place) & 31] for place in range(count))


def _decode(symbols: str) -> bytes:
    number = 0
    for symbol in symbols:
        number = number << 5 | _ALPHABET.index(symbol)
    return number.to_bytes(len(symbols) * 5 // 8, "big")


def _line_check(number: int, symbols: str) -> str:
    digest = blake3(f"kit line {number} {symbols}".encode()).digest(5)
    return _encode(digest)[:2]


def _whole_check(kit: RecoveryKit) -> str:
    said = b"\0".join((b"kit", kit.url.encode(), kit.repository_id, kit.secret))
    return _encode(blake3(said).digest(5))[:4]
