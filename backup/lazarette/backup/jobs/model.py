"""What a job is told and what it tells: structs that cross the process boundary as JSON.

A job's folder holds ``progress`` (the newest :class:`Progress`, renamed into place) and,
at the end, ``result`` (a :class:`Result`, likewise).  Whoever watches needs only the
folder and the process id, so a daemon that was killed meanwhile finds its jobs again.
Secrets arrive on standard input and are never written.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lazarette.storage.errors import EXIT_FAULT, InternalError, LazaretteError, registry

PROGRESS_FILE = "progress"
RESULT_FILE = "result"
LOG_PREFIX = "wal:"
"""Begins the name under which the log of a volume's database is filed."""
DAMAGED = "damaged, not restored: "
"""Begins the warning of a path that a restore could not bring back."""

Outcome = Literal["ok", "warnings", "failed", "cancelled"]


class StoreAccess(msgspec.Struct, frozen=True):
    """How to reach a repository and open it; never written to a disk by a job.

    Attributes:
        url: the store.
        access_key: S3 access key id; empty for local folders.
        secret_key: S3 secret.
        session_token: of temporary credentials.
        key: the secret that unlocks the repository's keys: a passphrase, 64 hexadecimal digits
            of a key file, or the text of a recovery kit.
        key_kind: what ``key`` is.
    """

    url: str
    access_key: str = ""
    secret_key: str = ""
    session_token: str = ""
    key: str = ""
    key_kind: Literal["passphrase", "file", "kit"] = "file"

    def __repr__(self) -> str:
        return f"StoreAccess({self.url!r})"


class BackupJob(msgspec.Struct, frozen=True, tag="backup"):
    """Store a tree as the newest snapshot of a volume.

    Attributes:
        root: folder to read: a read-only view of a snapshot, or any folder.
        volume: the name its snapshots carry.
        host: the machine's name, told apart in a shared repository.
        base: id of the repository snapshot that ``changes`` counts from; empty for none.
        changes: file of change records since ``base``; empty when there are none.
        inodes_kept: inodes have the numbers that they had in ``base``.
        instant_ns: the moment the tree shows; 0 means when the job starts.
        consistency: ``application``, ``crash`` or ``none``.
        labels: kept with the snapshot.
        meta: definitions stored with the data (JSON text).
    """

    root: str
    volume: str
    host: str
    base: str = ""
    changes: str = ""
    inodes_kept: bool = True
    instant_ns: int = 0
    consistency: str = "none"
    labels: dict[str, str] = {}
    meta: str = "{}"


class Replay(msgspec.Struct, frozen=True):
    """What a restored database replays of its log.

    Attributes:
        archives: ids of snapshots with segments, oldest first.
        target_ns: stop before the first transaction that ended later; 0 replays all.
        warning: what a person must know of it; empty for nothing.
    """

    archives: list[str]
    target_ns: int = 0
    warning: str = ""


class RestoreJob(msgspec.Struct, frozen=True, tag="restore"):
    """Write a snapshot's tree into a folder.

    Attributes:
        snapshot: its id in the repository.
        target: the folder; made if missing.
        in_place: what is there already is changed into the snapshot.
        known: id of a snapshot that the folder is exactly like; empty for none.
        paths: only these, relative to the root; all when empty.
        replay: what its database replays when it is started; None for nothing.
    """

    snapshot: str
    target: str
    in_place: bool = False
    known: str = ""
    paths: list[str] = []
    replay: Replay | None = None


class ForgetJob(msgspec.Struct, frozen=True, tag="forget"):
    """Take snapshots out of the list; their space is freed by a prune.

    Attributes:
        snapshots: ids to forget.
        prune: free what nobody refers to afterwards.
    """

    snapshots: list[str]
    prune: bool = False


class CheckJob(msgspec.Struct, frozen=True, tag="check"):
    """Verify a repository; ``read_data`` is the share of packs to read, 0 to 1."""

    read_data: float = 0.0


class CopyJob(msgspec.Struct, frozen=True, tag="copy"):
    """Copy snapshots into another repository, without reading the volume again.

    Attributes:
        snapshots: their ids; those that are there already are passed over.
        target: the other repository.
    """

    snapshots: list[str]
    target: StoreAccess


Job = BackupJob | RestoreJob | ForgetJob | CheckJob | CopyJob


class Request(msgspec.Struct, frozen=True):
    """What a job process reads on standard input.

    Attributes:
        job: what to do.
        access: the repository.
        cache: folder for local copies of indexes and directories; empty for none.
        upload: limit of what is sent, as :func:`.parse_rate` reads it; empty for none.
        read: limit of what is read from a volume, likewise.
        zone: of the times of day in them.
    """

    job: Job
    access: StoreAccess
    cache: str = ""
    upload: str = ""
    read: str = ""
    zone: str = "UTC"


class Progress(msgspec.Struct):
    """How far a job is: bytes done of total, files, and what it works on."""

    phase: str = ""
    done: int = 0
    total: int = 0
    files: int = 0


class Failure(msgspec.Struct, frozen=True):
    """An error as it crosses processes: its number in the registry and exit code too."""

    code: int
    message: str
    hint: str = ""
    exit: int = EXIT_FAULT

    @classmethod
    def of(cls, error: LazaretteError) -> Failure:
        """An error, to be told elsewhere."""
        return cls(error.number, error.message, error.hint, error.exit_code)

    def error(self) -> LazaretteError:
        """The error again; of its class where that is known here, else a general one."""
        kind = registry().get(self.code, InternalError)
        made = LazaretteError.__new__(kind)
        LazaretteError.__init__(made, self.message, hint=self.hint)
        made.exit_code = self.exit
        return made


class Result(msgspec.Struct):
    """How a job ended.

    Attributes:
        outcome: ``ok``, ``warnings`` (done, with ``warnings`` listed), or not done.
        snapshot: id of the snapshot made or restored.
        bytes_total: size of the tree.
        bytes_read: bytes read from it.
        bytes_sent: bytes uploaded.
        bytes_new: content that was not in the repository, before compression.
        files: entries of the tree.
        duration_ns: how long it took.
        warnings: one line each.
        failure: why it failed.
    """

    outcome: Outcome
    snapshot: str = ""
    bytes_total: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_new: int = 0
    files: int = 0
    duration_ns: int = 0
    warnings: list[str] = []
    failure: Failure | None = None
