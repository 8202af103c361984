"""Mount points a step needs and the image does not have.

They are made before the step and taken away after it, with the times of the folders they
were made in put back, so that a step leaves in its layer only what it did itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from lazarette.runtime.builds.tree import Tree


@dataclass
class Stubs:
    """Those of one step.

    Attributes:
        root: the root filesystem.
    """

    root: Tree
    _made: list[tuple[bytes, bool]] = field(default_factory=list)
    _times: dict[bytes, tuple[os.stat_result, int]] = field(default_factory=dict)

    def make(self, targets: Mapping[str, bool]) -> None:
        """Make what is missing.

        Args:
            targets: absolute path to whether it is a folder.
        """
        for target in sorted(targets):
            path = os.fsencode(target)
            if self.root.status(path, follow=True) is not None:
                continue
            if targets[target]:
                self._folders(path)
            else:
                self._folders(os.path.dirname(path))
                self._file(path)

    @property
    def touched(self) -> set[bytes]:
        """Folders something was made in: in the layer although nothing of them differs."""
        return set(self._times)

    def _folders(self, path: bytes) -> None:
        parts = [part for part in path.split(b"/") if part]
        for end in range(1, len(parts) + 1):
            own = b"/".join(parts[:end])
            if self.root.status(own, follow=True) is not None:
                continue
            if self.root.status(own) is not None:
                return  # a dangling link: the runtime follows it by itself
            self._remember(os.path.dirname(own))
            with self.root.parent(own) as (folder, name):
                os.mkdir(name, 0o755, dir_fd=folder)
            self._made.append((own, True))
            self._note(os.path.dirname(own))

    def _file(self, path: bytes) -> None:
        own = path.lstrip(b"/")
        if self.root.status(own) is not None:
            return
        self._remember(os.path.dirname(own))
        with self.root.parent(own) as (folder, name):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder))
        self._made.append((own, False))
        self._note(os.path.dirname(own))

    def _remember(self, folder: bytes) -> None:
        if folder not in self._times and (status := self.root.status(folder or b".")) is not None:
            self._times[folder] = (status, status.st_mtime_ns)

    def _note(self, folder: bytes) -> None:
        status = self.root.status(folder or b".")
        if status is not None and folder in self._times:
            self._times[folder] = (self._times[folder][0], status.st_mtime_ns)

    def clear(self) -> None:
        """Take away what is still as it was made."""
        before = {folder: self.root.status(folder or b".") for folder in self._times}
        for path, is_folder in reversed(self._made):
            self._remove(path, is_folder)
        for folder, (original, after_making) in self._times.items():
            status = before[folder]
            if status is None or self.root.status(folder or b".") is None:
                continue
            # What the step itself changed in the folder dates it.
            times = original if status.st_mtime_ns == after_making else status
            with self.root.folder(folder) as opened:
                os.utime(opened, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _remove(self, path: bytes, is_folder: bool) -> None:
        status = self.root.status(path)
        if status is None or stat.S_ISDIR(status.st_mode) is not is_folder:
            return
        with self.root.parent(path) as (folder, name):
            if is_folder:
                try:
                    os.rmdir(name, dir_fd=folder)
                except OSError:
                    return  # the step put something into it
            elif status.st_size == 0:
                os.unlink(name, dir_fd=folder)
