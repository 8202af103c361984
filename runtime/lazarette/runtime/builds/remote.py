"""What builds fetch from elsewhere: files by URL, git repositories, remote contexts."""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Final, cast

from lazarette.runtime.builds.context import LIMITS, unpack
from lazarette.runtime.builds.errors import ContextError, StepFailed
from lazarette.runtime.builds.tree import Tree
from lazarette.storage import beneath, process
from lazarette.storage.process import CommandFailed

TIMEOUT: Final = 60.0
GIT_TIMEOUT: Final = 600.0
_CHUNK = 1 << 20
_GIT = re.compile(
    r"(?:git://|git@|ssh://git@).+|https?://.+?\.git(?:#.*)?|github\.com/.+", re.IGNORECASE
)
_CHECKSUM = re.compile(r"sha(256|384|512):([0-9a-f]+)")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+@-]*")


def is_git(text: str) -> bool:
    """Whether a source or context is a git repository's URL."""
    return _GIT.fullmatch(text) is not None


def is_remote(text: str) -> bool:
    """Whether :func:`fetch_context` knows how to fetch it."""
    return is_git(text) or re.match(r"https?://", text) is not None


@dataclass(frozen=True)
class Fetched:
    """What a URL gave."""

    file: Path
    name: str
    content_type: str


def download(url: str, downloads: Path, *, checksum: str, named: bool) -> Path:
    """Fetch one file for ADD.

    Args:
        url: http or https.
        downloads: folder for it.
        checksum: ``sha256:…`` it must have; empty for any.
        named: the destination gives the name, the URL need not.

    Returns:
        A fresh folder with the file, mode 0600, dated by Last-Modified.

    Raises:
        StepFailed: it cannot be fetched, has another checksum, or no name.
    """
    wanted = _CHECKSUM.fullmatch(checksum)
    if checksum and wanted is None:
        raise StepFailed(f"ADD failed: invalid checksum digest format: {checksum}")
    fetched = _fetch(url, downloads)
    name = fetched.name or ("download" if named else "")
    if not name:
        raise StepFailed(f"ADD failed: cannot determine filename for source URL: {url}")
    if wanted is not None:
        _check(fetched.file, wanted[1], wanted[2], url)
    target = fetched.file.parent / name
    if target != fetched.file:
        fetched.file.rename(target)
    target.chmod(0o600)
    return fetched.file.parent


def _check(file: Path, bits: str, expected: str, url: str) -> None:
    made = hashlib.new(f"sha{bits}")
    with file.open("rb") as source:
        while data := source.read(_CHUNK):
            made.update(data)
    if made.hexdigest() != expected:
        raise StepFailed(
            f"ADD failed: digest mismatch sha{bits}:{made.hexdigest()}: sha{bits}:{expected} for"
            f" {url}"
        )


def _fetch(url: str, downloads: Path) -> Fetched:
    folder = downloads / secrets.token_hex(8)
    folder.mkdir(parents=True)
    file = folder / ".download"
    request = urllib.request.Request(url, headers={"User-Agent": "lazarette"})
    try:
        with cast(HTTPResponse, urllib.request.urlopen(request, timeout=TIMEOUT)) as answer:
            size = 0
            with file.open("wb") as target:
                while data := answer.read(_CHUNK):
                    size += len(data)
                    if size > LIMITS.size:
                        raise StepFailed(f"fetching {url}: larger than {LIMITS.size} bytes")
                    target.write(data)
            headers = answer.headers
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as failed:
        raise StepFailed(f"fetching {url} failed: {failed}") from failed
    _date(file, headers)
    return Fetched(file, _name(url, headers), headers.get_content_type())


def _date(file: Path, headers: Message) -> None:
    try:
        stamp = int(email.utils.parsedate_to_datetime(headers["Last-Modified"]).timestamp())
    except (TypeError, ValueError):
        stamp = 0
    os.utime(file, (stamp, stamp))


def _name(url: str, headers: Message) -> str:
    given = headers.get_filename() or ""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    name = os.path.basename(given) or (os.path.basename(path) if not path.endswith("/") else "")
    return "" if name in (".", "..") or "\0" in name else name


def clone(text: str, downloads: Path, *, keep_git: bool) -> Path:
    """Check a git repository out.

    Args:
        text: ``URL[#ref[:folder]]``.
        downloads: folder for it.
        keep_git: leave ``.git``.

    Returns:
        The folder with the files.

    Raises:
        StepFailed: git failed, or the folder is not in the repository.
    """
    url, _, fragment = text.partition("#")
    ref, _, subfolder = fragment.partition(":")
    if url.lower().startswith("github.com/"):
        url = f"https://{url}"
    ref = ref or "HEAD"
    if not _REF.fullmatch(ref):
        raise StepFailed(f"invalid git reference: {ref}")
    folder = downloads / secrets.token_hex(8)
    folder.mkdir(parents=True)
    try:
        _git(folder, "init", "--quiet")
        _git(folder, "remote", "add", "origin", url)
        _checkout(folder, ref)
        if (folder / ".gitmodules").exists():
            _git(folder, "submodule", "update", "--init", "--recursive", "--depth=1", "--quiet")
    except CommandFailed as failed:
        raise StepFailed(f"cloning {url} failed: {failed.message}") from failed
    if not keep_git:
        beneath.remove_path(folder / ".git")
    return _within(folder, subfolder, url)


def _checkout(folder: Path, ref: str) -> None:
    """Fetch as little as the server allows: not every one knows shallow clones, and not
    every one hands out a commit by its id."""
    for depth in (("--depth=1",), ()):
        try:
            _git(folder, "fetch", "--quiet", *depth, "--no-tags", "origin", "--", ref)
        except CommandFailed:
            continue
        _git(folder, "checkout", "--quiet", "--force", "FETCH_HEAD")
        return
    _git(folder, "fetch", "--quiet", "--tags", "origin", "--", "+refs/*:refs/remotes/origin/*")
    _git(folder, "checkout", "--quiet", "--force", ref)


def _within(folder: Path, subfolder: str, url: str) -> Path:
    if not subfolder.strip("/"):
        return folder
    with Tree(folder) as tree:
        try:
            real = tree.real(os.fsencode(subfolder))
        except OSError as missing:
            raise StepFailed(f"{url} has no folder {subfolder}") from missing
        if not tree.is_folder(real):
            raise StepFailed(f"{subfolder} of {url} is not a folder")
    return folder / os.fsdecode(real)


def _git(folder: Path, *arguments: str) -> None:
    env = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(folder),
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ALLOW_PROTOCOL": "http:https:git:ssh",
    }
    options = ("-c", "advice.detachedHead=false", "-c", "core.hooksPath=/dev/null")
    process.run(["git", *options, *arguments], env=env, cwd=str(folder), timeout=GIT_TIMEOUT)


def fetch_context(url: str, downloads: Path) -> Path | bytes:
    """A remote context: a folder, or the bytes of a Dockerfile without one.

    Raises:
        ContextError: it is neither a repository, a Dockerfile nor an archive.
    """
    if is_git(url):
        return clone(url, downloads, keep_git=False)
    if not re.match(r"https?://", url):
        raise ContextError(f"remote context {url} is neither git nor http")
    fetched = _fetch(url, downloads)
    if fetched.content_type.startswith("text/"):
        return fetched.file.read_bytes()
    folder = downloads / secrets.token_hex(8)
    folder.mkdir(parents=True)
    with fetched.file.open("rb") as stream:
        unpack(stream, folder)
    return folder
