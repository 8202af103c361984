"""COPY and ADD: from what is written to files in a layer."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lazarette.runtime.builds import remote
from lazarette.runtime.builds.archives import is_archive
from lazarette.runtime.builds.chmod import ModeChange, parse_chmod
from lazarette.runtime.builds.context import LIMITS
from lazarette.runtime.builds.copier import Attributes, Copier
from lazarette.runtime.builds.errors import DockerfileError, StepFailed
from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.builds.instructions import Transfer
from lazarette.runtime.builds.parser import Heredoc
from lazarette.runtime.builds.sources import Selected, SourceTree, select
from lazarette.runtime.builds.tree import Tree
from lazarette.runtime.builds.users import find_group, find_user
from lazarette.runtime.images.compression import Unpacked
from lazarette.storage.errors import LazaretteError

_URL = re.compile(r"(?:https?|ftp)://", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """A COPY or ADD with variables substituted.

    Attributes:
        sources: paths, patterns, URLs.
        heredocs: files written out in the Dockerfile.
        target: absolute destination.
        shown: as it stands in the file, for the history.
        into: the destination was written as a folder.
        chown: ``--chown``.
        mode: ``--chmod``.
        mode_text: the same as written, for the cache key.
    """

    sources: tuple[str, ...]
    heredocs: tuple[tuple[str, bytes], ...]
    target: str
    shown: str
    into: bool
    chown: str
    mode: ModeChange | None
    mode_text: str

    def key(self, step: Transfer) -> str:
        """What of it, beside contents, the result depends on."""
        flags = (self.chown, self.mode_text, step.link, step.parents, step.exclude, step.unpack)
        return f"{flags} {self.target}{'/' if self.into else ''}"

    def memo_key(self, step: Transfer) -> str:
        """What the digest of what is taken depends on, beside the context."""
        bodies = [f"{name}\0{body.hex()}" for name, body in self.heredocs]
        return repr((step.add, self.sources, bodies, self.key(step)))


def substitute(step: Transfer, expander: Expander, working_dir: str) -> Words:
    """Substitute variables and check what can be checked before looking at files.

    Raises:
        DockerfileError: no destination, or several sources for one file.
    """
    sources = tuple(expander.word(source) for source in step.sources)
    target = expander.word(step.target)
    if not target:
        raise DockerfileError(f"{step.text.split()[0]} has an empty destination")
    if any(not source for source in sources):
        raise DockerfileError(f"{step.text.split()[0]} has an empty source")
    into = target.endswith(("/", "/.")) or target in (".", "..")
    count = len(sources) + len(step.heredocs)
    if count > 1 and not into:
        raise DockerfileError(
            f"When using {step.text.split()[0]} with more than one source file, the destination"
            " must be a directory and end with a /"
        )
    absolute = posixpath.normpath(posixpath.join("/", working_dir or "/", target))
    chmod = expander.word(step.chmod)
    return Words(
        sources,
        tuple((heredoc.name, _body(heredoc, expander)) for heredoc in step.heredocs),
        absolute.replace("//", "/", 1),
        target,
        into,
        expander.word(step.chown),
        parse_chmod(chmod) if chmod else None,
        chmod,
    )


def _body(heredoc: Heredoc, expander: Expander) -> bytes:
    text = expander.body(heredoc.content) if heredoc.expand else heredoc.content
    return text.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Found:
    """Everything a step copies, found and named by its content.

    Attributes:
        selected: files and folders.
        archives: those of ``selected`` that are unpacked.
        heredocs: name and content.
        digest: ``file:…``, ``dir:…`` or ``multi:…``.
        remote: something of it comes from elsewhere than the context.
    """

    selected: Sequence[Selected]
    archives: frozenset[int]
    heredocs: tuple[tuple[str, bytes], ...]
    digest: str
    remote: bool


@contextmanager
def gather(step: Transfer, words: Words, source: SourceTree, downloads: Path) -> Iterator[Found]:
    """Find what a step copies; downloads are there until the block ends.

    Raises:
        ContextError: a source is missing.
        StepFailed: a download failed or has the wrong checksum.
    """
    word = "ADD" if step.add else "COPY"
    with ExitStack() as stack:
        selected: list[Selected] = []
        archives: set[int] = set()
        for text in words.sources:
            if step.add and remote.is_git(text):
                folder = remote.clone(text, downloads, keep_git=step.keep_git_dir)
                tree = stack.enter_context(Tree(folder))
                found = select(
                    SourceTree(tree, text, True),
                    ".",
                    parents=False,
                    exclude=step.exclude,
                    word=word,
                )
            elif step.add and _URL.match(text):
                found = [_downloaded(step, words, text, downloads, stack)]
                if step.unpack:
                    archives.add(len(selected))
            else:
                found = select(source, text, parents=step.parents, exclude=step.exclude, word=word)
                if step.add and step.unpack is not False:
                    archives |= {
                        len(selected) + at for at, one in enumerate(found) if _unpacks(one)
                    }
            selected += found
        if len(selected) + len(words.heredocs) > 1 and not words.into:
            raise StepFailed(
                f"When using {word} with more than one source file, the destination must be a"
                " directory and end with a /"
            )
        if step.checksum and not any(_URL.match(text) for text in words.sources):
            raise DockerfileError("checksum can't be specified for local sources")
        elsewhere = any(_URL.match(text) or remote.is_git(text) for text in words.sources)
        digest = _digest(selected, words)
        yield Found(selected, frozenset(archives), words.heredocs, digest, elsewhere and step.add)


def _downloaded(
    step: Transfer, words: Words, url: str, downloads: Path, stack: ExitStack
) -> Selected:
    folder = remote.download(url, downloads, checksum=step.checksum, named=not words.into)
    tree = stack.enter_context(Tree(folder))
    source = SourceTree(tree, url, True)
    names = tree.names(b"")
    return select(source, os.fsdecode(names[0]), parents=False, exclude=(), word="ADD")[0]


def _unpacks(chosen: Selected) -> bool:
    if chosen.is_folder:
        return False
    for item in chosen.items():
        descriptor = os.open(item.name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=item.parent)
        with open(descriptor, "rb") as file:
            return is_archive(file)
    return False


def _digest(selected: Sequence[Selected], words: Words) -> str:
    sums = [one.digest() for one in selected]
    sums += [
        "file:" + hashlib.sha256(name.encode() + b"\0" + body).hexdigest()
        for name, body in words.heredocs
    ]
    if len(sums) == 1:
        return sums[0]
    return "multi:" + hashlib.sha256(",".join(sums).encode()).hexdigest()


def copy(found: Found, words: Words, step: Transfer, root: Tree, now_ns: int) -> None:
    """Put everything into a root filesystem.

    Raises:
        StepFailed: a conflict of files and folders, an unknown user.
    """
    owner = _owner(words.chown, root)
    copier = Copier(root, Attributes(owner, words.mode, step.link))
    target = os.fsencode(words.target)
    several = len(found.selected) + len(found.heredocs) > 1
    try:
        for at, one in enumerate(found.selected):
            if at in found.archives:
                _extract(copier, one, target)
            else:
                copier.place(one, target, into=words.into or several, parents=step.parents)
        for name, content in found.heredocs:
            copier.write(target, name, content, into=words.into or several, mtime_ns=now_ns)
    except OSError as refused:
        raise StepFailed(f"{'ADD' if step.add else 'COPY'} failed: {refused}") from refused


def _extract(copier: Copier, chosen: Selected, target: bytes) -> None:
    for item in chosen.items():
        descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=item.parent)
        with open(descriptor, "rb") as file:
            try:
                copier.unpack(cast(BinaryIO, Unpacked(file, LIMITS)), target)
            except LazaretteError as bad:
                raise StepFailed(f"ADD failed: {chosen.pattern}: {bad.message}") from bad


def _owner(chown: str, root: Tree) -> tuple[int, int] | None:
    if not chown:
        return None
    user, colon, group = chown.partition(":")
    uid, gid = find_user(root, user)
    if colon and group:
        gid = find_group(root, group)
    return uid, gid
