"""Routes under ``/lazarette/v1``: repositories, backups, restores, policies, recovery.

Long work answers a JSON object a line: ``{"phase", "done", "total", …}`` while it goes on,
then one with the outcome, or ``{"error": {"message", "hint", "code"}}``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from aiohttp import web

from lazarette.backup.jobs.model import Failure, Progress, StoreAccess
from lazarette.backup.policy.metrics import CONTENT_TYPE
from lazarette.backup.policy.outcome import Kind
from lazarette.runtime.api.http import Call, Route, empty, json_response, stream
from lazarette.runtime.events import EventBus
from lazarette.runtime.protection.backups import encode_run
from lazarette.runtime.protection.branches import Wanted
from lazarette.runtime.protection.history import encode_history
from lazarette.runtime.protection.restores import encode_point
from lazarette.runtime.protection.service import Protection
from lazarette.storage.errors import InternalError, InvalidArgument, LazaretteError

log = logging.getLogger(__name__)

_V1 = "/lazarette/v1"


class RepositoryBody(msgspec.Struct):
    """A repository to make (``init``) or to know (``adopt``)."""

    access: StoreAccess
    name: str = ""
    mode: Literal["init", "adopt"] = "init"


class BackupBody(msgspec.Struct):
    """Volumes to back up as they are at one instant."""

    volumes: list[str]
    repository: str = ""
    labels: dict[str, str] = {}


class RestoreBody(msgspec.Struct):
    """A point of a volume's past to bring back."""

    volume: str
    point: str = "latest"
    into: str = ""
    repository: str = ""
    instant: bool = False
    rate: int = 0
    stop_users: bool = False
    to_time: str = ""


class UndoBody(msgspec.Struct):
    """``POST /volumes/{volume}/undo``."""

    stop_users: bool = False


class BranchBody(msgspec.Struct):
    """A writable volume of a point; see :class:`Wanted`."""

    source: str
    name: str
    repository: str = ""
    ephemeral: bool = False
    fill: bool = False
    labels: dict[str, str] = {}


class FillBody(msgspec.Struct):
    """A lazy volume to make whole; bytes a second, 0 for no limit."""

    rate: int = 0


class PolicyBody(msgspec.Struct):
    """A policy of a volume in the words of :mod:`lazarette.backup.policy.model`."""

    words: dict[str, object]


class RecoverBody(msgspec.Struct):
    """A host to bring back from a bucket and a recovery kit."""

    access: StoreAccess
    name: str = ""
    volumes: list[str] = []
    projects: list[str] = []
    start: bool = True
    instant: bool = True
    dry_run: bool = False


class CheckBody(msgspec.Struct):
    """How thorough a check is: the share of stored data to read, 0 to 1."""

    read_data: float = 0.0


Tell = Callable[[object], Awaitable[None]]


class ProtectionRoutes:
    """Handlers of everything that keeps volumes safe."""

    def __init__(self, protection: Protection, events: EventBus) -> None:
        self._protection = protection
        self._events = events

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            Route("GET", _V1 + "/repositories", self.repositories),
            Route("POST", _V1 + "/repositories", self.add_repository),
            Route("DELETE", _V1 + "/repositories/{name}", self.remove_repository),
            Route("POST", _V1 + "/repositories/{name}/kit", self.new_kit),
            Route("POST", _V1 + "/repositories/{name}/check", self.check),
            Route("POST", _V1 + "/backups", self.back_up),
            Route("GET", _V1 + "/backups", self.points),
            Route("GET", _V1 + "/runs", self.runs),
            Route("GET", _V1 + "/history", self.history),
            Route("POST", _V1 + "/restores", self.restore),
            Route("POST", _V1 + "/branches", self.branch),
            Route("GET", _V1 + "/volumes/{volume}/users", self.users),
            Route("POST", _V1 + "/volumes/{volume}/undo", self.undo),
            Route("POST", _V1 + "/volumes/{volume}/fill", self.fill),
            Route("GET", _V1 + "/policies", self.policies),
            Route("GET", _V1 + "/policies/{volume}", self.policy),
            Route("PUT", _V1 + "/policies/{volume}", self.set_policy),
            Route("DELETE", _V1 + "/policies/{volume}", self.remove_policy),
            Route("GET", _V1 + "/wal", self.wal),
            Route("POST", _V1 + "/volumes/{volume}/wal", self.flush_wal),
            Route("GET", _V1 + "/fills", self.fills),
            Route("GET", _V1 + "/status", self.status),
            Route("POST", _V1 + "/recover", self.recover),
            Route("POST", _V1 + "/volumes/{volume}/approve", self.approve),
            Route("POST", _V1 + "/volumes/{volume}/drill", self.drill),
            Route("GET", _V1 + "/metrics", self.metrics),
        ]

    async def repositories(self, call: Call) -> web.StreamResponse:
        """Known repositories; no secrets."""
        return json_response(
            [
                {"name": known.name, "id": known.id, "url": known.access.url}
                for known in self._protection.repositories.list()
            ]
        )

    async def add_repository(self, call: Call) -> web.StreamResponse:
        """Make or adopt a repository; a new one's recovery kit is in the answer, once."""
        body = await call.json(RepositoryBody)
        book = self._protection.repositories
        if body.mode == "adopt":
            known = await asyncio.to_thread(book.adopt, body.name, body.access)
            return json_response({"name": known.name, "id": known.id}, 201)
        kit = await asyncio.to_thread(book.init, body.name, body.access)
        return json_response({"kit": kit.text(), "qr": kit.qr_terminal()}, 201)

    async def remove_repository(self, call: Call) -> web.StreamResponse:
        """Forget a repository here."""
        await asyncio.to_thread(self._protection.repositories.remove, call.path["name"])
        return empty()

    async def new_kit(self, call: Call) -> web.StreamResponse:
        """A further recovery kit."""
        kit = await asyncio.to_thread(self._protection.repositories.new_kit, call.path["name"])
        return json_response({"kit": kit.text(), "qr": kit.qr_terminal()}, 201)

    async def check(self, call: Call) -> web.StreamResponse:
        """Verify a repository."""
        body = await call.json(CheckBody)

        async def work(tell: Tell) -> object:
            return await self._protection.check(call.path["name"], body.read_data, teller(tell))

        return await long_work(call, work)

    async def back_up(self, call: Call) -> web.StreamResponse:
        """Back volumes up."""
        body = await call.json(BackupBody)
        if not body.volumes:
            raise InvalidArgument("a backup needs at least one volume")

        async def work(tell: Tell) -> object:
            show = teller(tell)
            runs = await self._protection.backups.run(
                body.volumes,
                repository=body.repository,
                labels=body.labels,
                show=lambda volume, progress: show(progress),
            )
            return {"runs": [encode_run(run) for run in runs]}

        return await long_work(call, work)

    async def points(self, call: Call) -> web.StreamResponse:
        """Restore points in a repository."""
        found = await self._protection.restores.points(
            call.text("volume") or None, call.text("repository")
        )
        return json_response([encode_point(record) for record in found])

    async def runs(self, call: Call) -> web.StreamResponse:
        """The newest runs, of one volume or all."""
        book, volume = self._protection.backups.runs, call.text("volume")
        limit = max(call.number("limit") or 100, 1)
        found = book.of_volume(volume, limit) if volume else book.recent(limit)
        return json_response([encode_run(run) for run in found])

    async def history(self, call: Call) -> web.StreamResponse:
        """The journal: what was run of every kind, the newest first."""
        asked = call.text("kind")
        kind = next((one for one in Kind if one.value == asked), None)
        if asked and kind is None:
            raise InvalidArgument(
                f"no kind of run is called {asked}", hint=", ".join(one.value for one in Kind)
            )
        limit = max(call.number("limit") or 100, 1)
        found = self._protection.history(call.text("volume"), kind, limit)
        return json_response([encode_history(run) for run in found])

    async def restore(self, call: Call) -> web.StreamResponse:
        """Bring a volume back."""
        body = await call.json(RestoreBody)

        async def work(tell: Tell) -> object:
            done = await self._protection.restores.restore(
                body.volume,
                body.point,
                into=body.into,
                repository=body.repository,
                instant=body.instant,
                rate=body.rate,
                stop_users=body.stop_users,
                to_time=body.to_time,
                show=teller(tell),
            )
            return msgspec.to_builtins(done)

        return await long_work(call, work)

    async def users(self, call: Call) -> web.StreamResponse:
        """The running containers of a volume, in the order they start."""
        names = self._protection.restores.in_place.users(call.path["volume"])
        return json_response([{"name": name} for name in names])

    async def undo(self, call: Call) -> web.StreamResponse:
        """Take the last restore over a volume back."""
        body, volume = await call.json(UndoBody), call.path["volume"]

        async def work(tell: Tell) -> object:
            now, safety = await self._protection.restores.undo(volume, stop_users=body.stop_users)
            return {"volume": volume, "snapshot": now, "safety": safety}

        return await long_work(call, work)

    async def branch(self, call: Call) -> web.StreamResponse:
        """Make a branch."""
        body = await call.json(BranchBody)
        wanted = Wanted(body.source, body.name, body.repository, body.ephemeral, body.fill)
        made = await asyncio.to_thread(self._protection.branches.branch, wanted, body.labels)
        self._events.publish("volume", "create", made.name, {"driver": "local"})
        lazy = self._protection.fills.of(made.name) is not None
        return json_response(
            {"volume": made.name, "labels": dict(made.labels), "shared": lazy}, 201
        )

    async def fill(self, call: Call) -> web.StreamResponse:
        """Begin to make a lazy volume whole, or change the limit of its fill."""
        body = await call.json(FillBody)
        await asyncio.to_thread(self._protection.fills.complete, call.path["volume"], body.rate)
        return empty()

    async def wal(self, call: Call) -> web.StreamResponse:
        """The logs of databases that are kept, and how far each is stored."""
        return json_response([msgspec.to_builtins(one) for one in self._protection.wal.all()])

    async def flush_wal(self, call: Call) -> web.StreamResponse:
        """Store all that a volume's database has written by now."""
        volume = call.path["volume"]

        async def work(tell: Tell) -> object:
            return {"volume": volume, "until_ns": await self._protection.wal.flush(volume)}

        return await long_work(call, work)

    async def policies(self, call: Call) -> web.StreamResponse:
        """All policies with what applies and the next run."""
        return json_response(self._protection.policies.describe_all())

    async def policy(self, call: Call) -> web.StreamResponse:
        """The policy of a volume."""
        return json_response(self._protection.policies.describe(call.path["volume"]))

    async def set_policy(self, call: Call) -> web.StreamResponse:
        """Give a volume a policy."""
        body = await call.json(PolicyBody)
        volume, policies = call.path["volume"], self._protection.policies
        policies.book.set(volume, {**body.words, "volumes": [volume]})
        await policies.refresh()
        return json_response(self._protection.policies.describe(call.path["volume"]))

    async def remove_policy(self, call: Call) -> web.StreamResponse:
        """Take a volume's policy away; its backups stay."""
        self._protection.policies.book.remove(call.path["volume"])
        await self._protection.policies.refresh()
        return empty()

    async def fills(self, call: Call) -> web.StreamResponse:
        """Volumes whose data are still arriving, and how far each is."""
        found = []
        for fill in self._protection.fills.all():
            seen = await asyncio.to_thread(self._protection.fills.progress, fill.volume)
            found.append(
                {
                    "volume": fill.volume,
                    "snapshot": fill.snapshot,
                    "whole": fill.whole,
                    "lazy": fill.lazy,
                }
                | ({} if seen is None else msgspec.to_builtins(seen))
            )
        return json_response(found)

    async def status(self, call: Call) -> web.StreamResponse:
        """How safe each volume is."""
        return json_response(await self._protection.status())

    async def approve(self, call: Call) -> web.StreamResponse:
        """Count a volume's suspicious backups as good."""
        return json_response({"approved": self._protection.approve(call.path["volume"])})

    async def drill(self, call: Call) -> web.StreamResponse:
        """Restore the newest good backup beside the volume and see whether it works."""

        async def work(tell: Tell) -> object:
            outcome = await self._protection.drills.run(call.path["volume"])
            return {
                "outcome": outcome.result.value,
                "error": outcome.error,
                "snapshot": outcome.snapshot,
                "restore_ns": outcome.restore_ns,
            }

        return await long_work(call, work)

    async def metrics(self, call: Call) -> web.StreamResponse:
        """Prometheus metrics."""
        text = await asyncio.to_thread(self._protection.teller.metrics)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def recover(self, call: Call) -> web.StreamResponse:
        """Bring a host back."""
        body = await call.json(RecoverBody)

        async def work(tell: Tell) -> object:
            return await self._protection.recovery.recover(
                body.access,
                name=body.name,
                volumes=body.volumes,
                projects=body.projects,
                start=body.start,
                instant=body.instant,
                dry_run=body.dry_run,
                tell=tell,
            )

        return await long_work(call, work)


def teller(tell: Tell) -> Callable[[Progress], None]:
    """A plain callback that passes progress on to a stream, the newest only."""
    pending: set[asyncio.Task[None]] = set()

    def show(progress: Progress) -> None:
        task = asyncio.ensure_future(tell(progress))
        pending.add(task)
        task.add_done_callback(pending.discard)

    return show


async def long_work(call: Call, work: Callable[[Tell], Awaitable[object]]) -> web.StreamResponse:
    """Answer work that takes long; it goes on when the client leaves."""
    answer = await stream(call, "application/x-ndjson")
    lock = asyncio.Lock()

    async def tell(value: object) -> None:
        async with lock:
            try:
                await answer.write(msgspec.json.encode(value) + b"\n")
            except ConnectionResetError:
                return

    try:
        await tell({"result": await asyncio.shield(asyncio.ensure_future(work(tell)))})
    except LazaretteError as error:
        await tell({"error": Failure.of(error)})
    except Exception:
        log.exception("%s %s failed", call.request.method, call.request.path)
        fault = InternalError("internal error, see the daemon's log")
        await tell({"error": Failure.of(fault)})
    await answer.write_eof()
    return answer
