"""The control socket: one JSON request a line, one JSON reply a line.

Request: ``{"command": NAME, ...}``.  Reply: ``{"result": ...}`` or
``{"errno": N, "message": TEXT}``.  Commands run on the socket's own thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import msgspec

from lazarette.fuse import jsontext

log = logging.getLogger(__name__)

_LIMIT = 1 << 20

Arguments = Mapping[str, object]
Command = Callable[[Arguments], object]


class Reply(msgspec.Struct, omit_defaults=True):
    """One reply; ``errno`` 0 means success."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    errno: int = 0
    message: str = ""


class ControlSocket:
    """Listens for commands of the daemon.

    Args:
        path: of the socket; one left by a dead server is replaced.
        commands: by name.
        listener: descriptor of the socket a server before listened on, -1 for none.
    """

    def __init__(self, path: str, commands: Mapping[str, Command], listener: int = -1) -> None:
        self._path = path
        self._commands = commands
        if listener >= 0:
            self._listener = socket.socket(fileno=listener)
            self._entry = _entry(path)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            with _address(path) as address:
                self._listener.bind(address)
        finally:
            os.umask(previous)
        self._listener.listen(16)
        self._entry = _entry(path)

    def fileno(self) -> int:
        """Descriptor of the listening socket."""
        return self._listener.fileno()

    def start(self) -> None:
        """Serve on a thread of its own."""
        threading.Thread(target=self._accept, name="fuse-control", daemon=True).start()

    def close(self) -> None:
        """Stop listening and remove the socket, unless it is that of the next server by now."""
        if self._entry is not None and self._entry == _entry(self._path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(
                target=self._serve, args=(connection,), name="fuse-command", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        # OSError: the caller did not wait for the answer.
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as stream:
            for line in iter(lambda: stream.readline(_LIMIT), b""):
                connection.sendall(msgspec.json.encode(self._run(line)) + b"\n")

    def _run(self, line: bytes) -> Reply:
        try:
            arguments = jsontext.decode(line, type=dict[str, object])
            command = self._commands.get(str(arguments.get("command")))
            if command is None:
                return Reply(errno=errno.ENOSYS, message="unknown command")
            return Reply(msgspec.Raw(msgspec.json.encode(command(arguments))))
        except msgspec.MsgspecError as error:
            return Reply(errno=errno.EINVAL, message=str(error))
        except OSError as error:
            return Reply(errno=error.errno or errno.EIO, message=str(error))
        except Exception as error:
            log.exception("command failed")
            return Reply(errno=errno.EIO, message=repr(error))


def _entry(path: str) -> tuple[int, int] | None:
    """What stands at a path, by device and inode."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """A name for a socket at ``path``: addresses are short, so it goes by the folder's fd."""
    folder, name = os.path.split(path)
    fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def call(path: str, command: str, timeout: float, **arguments: object) -> msgspec.Raw:
    """Send one command and wait for its result.

    Raises:
        OSError: what the server answered; ECONNREFUSED or ENOENT when it is not there;
            ETIMEDOUT when it does not answer within ``timeout`` seconds.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            with _address(path) as address:
                connection.connect(address)
            request = msgspec.json.encode({"command": command, **arguments})
            connection.sendall(request + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, f"no answer to {command}", path) from error
    if not line:
        raise OSError(errno.ECONNRESET, f"the server went away during {command}", path)
    reply = jsontext.decode(line, type=Reply)
    if reply.errno:
        raise OSError(reply.errno, reply.message, path)
    return reply.result
