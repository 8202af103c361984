from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from lazarette.runtime.containers.logs import (
    ContainerLog,
    LogQuery,
    Rotation,
    parse_options,
    parse_record,
)
from lazarette.runtime.containers.watch import FolderWatch
from lazarette.storage.errors import InvalidArgument


def line(second: int, text: str, stream: str = "stdout", tag: str = "F") -> bytes:
    return f"2026-11-25T10:00:{second:02d}.000000000+00:00 {stream} {tag} {text}\n".encode()


def texts(log: ContainerLog, query: LogQuery) -> list[str]:
    return [record.data.decode() for record in log.read(query)]


def at(second: int) -> int:
    return (1_795_600_800 + second) * 1_000_000_000  # 2026-11-25T10:00:00Z


@pytest.fixture
def log(tmp_path: Path) -> ContainerLog:
    made = ContainerLog(tmp_path / "x.log", Rotation(max_size=200, max_file=3, compress=True))
    made.path.write_bytes(
        b"".join(line(n, f"n{n}", "stderr" if n % 2 else "stdout") for n in range(10))
    )
    return made


def test_records() -> None:
    whole = parse_record(line(1, "hello"))
    part = parse_record(line(1, "hel", tag="P"))
    assert whole is not None
    assert (whole.stream, whole.data) == (1, b"hello\n")
    assert part is not None
    assert part.data == b"hel"
    assert parse_record(b"torn\n") is None


def test_streams_and_tail(log: ContainerLog) -> None:
    assert texts(log, LogQuery(stderr=False)) == ["n0\n", "n2\n", "n4\n", "n6\n", "n8\n"]
    assert texts(log, LogQuery(tail=2)) == ["n8\n", "n9\n"]
    assert texts(log, LogQuery(tail=2, stderr=False)) == ["n6\n", "n8\n"]
    assert texts(log, LogQuery(tail=0)) == []
    assert len(texts(log, LogQuery(tail=99))) == 10


def test_bounds_of_time(log: ContainerLog) -> None:
    assert texts(log, LogQuery(since_ns=at(3), until_ns=at(5))) == ["n3\n", "n4\n", "n5\n"]


def test_a_long_tail_crosses_blocks(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path / "x.log", Rotation())
    log.path.write_bytes(b"".join(line(n % 60, f"{n} " + "x" * 500) for n in range(1000)))
    found = texts(log, LogQuery(tail=700))
    assert len(found) == 700
    assert found[0].startswith("300 ")


def test_rotation_keeps_old_files_and_their_order(log: ContainerLog) -> None:
    reopened = []

    def reopen() -> None:
        reopened.append(True)
        log.path.touch()

    for turn in range(1, 5):
        assert log.rotate_if_due(reopen)
        log.path.write_bytes(b"".join(line(n, f"{turn}-{n}") for n in range(5)))
    assert len(reopened) == 4
    assert {file.name for file in log.files()} == {"x.log.2.gz", "x.log.1", "x.log"}
    assert texts(log, LogQuery())[0] == "2-0\n"
    assert texts(log, LogQuery(tail=7))[0] == "3-3\n"
    assert texts(log, LogQuery(tail=12))[:3] == ["2-3\n", "2-4\n", "3-0\n"]


def test_a_small_log_is_left_alone(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path / "x.log", Rotation(max_size=1000))
    log.path.write_bytes(line(1, "x"))
    assert not log.rotate_if_due(lambda: None)


async def test_following_survives_rotation(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path / "x.log", Rotation(max_size=1, max_file=2))
    log.path.write_bytes(line(0, "first"))
    watch, over = FolderWatch(), asyncio.Event()
    seen: list[str] = []

    async def follow() -> None:
        async for batch in log.follow(LogQuery(follow=True), watch, over.is_set):
            seen.extend(record.data.decode().strip() for record in batch)

    async def until(count: int) -> None:
        for _ in range(500):
            if len(seen) >= count:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(seen)

    task = asyncio.ensure_future(follow())
    try:
        await until(1)
        counter = itertools.count()
        for turn in range(3):
            held = open(log.path, "ab", buffering=0)  # noqa: SIM115, ASYNC230
            with held:
                held.write(line(turn, f"before {next(counter)}"))

                def reopen() -> None:
                    held.write(line(turn, f"late {next(counter)}"))  # noqa: B023
                    fresh = log.path.with_suffix(".tmp")
                    fresh.touch()
                    fresh.replace(log.path)

                log.rotate_if_due(reopen)
            with open(log.path, "ab") as file:  # noqa: ASYNC230
                file.write(line(turn, f"after {next(counter)}"))
            await until(1 + 3 * (turn + 1))
        over.set()
        await asyncio.wait_for(task, 60)
    finally:
        task.cancel()
        watch.close()
    assert [text.split()[-1] for text in seen[1:]] == [str(n) for n in range(9)]


@pytest.mark.parametrize(
    ("driver", "options", "rotation"),
    [
        ("json-file", {}, Rotation()),
        ("json-file", {"max-size": "10k", "max-file": "3"}, Rotation(10_000, 3)),
        ("json-file", {"max-size": "1.5m"}, Rotation(1_500_000, 1)),
        ("local", {}, Rotation(20_000_000, 5, True)),
        ("none", {"anything": "goes"}, Rotation()),
    ],
)
def test_options(driver: str, options: dict[str, str], rotation: Rotation) -> None:
    assert parse_options(driver, options) == rotation


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("syslogg", {}),
        ("json-file", {"max-sizes": "1m"}),
        ("json-file", {"max-size": "big"}),
        ("json-file", {"max-size": "1m", "max-file": "0"}),
        ("json-file", {"compress": "true"}),
    ],
)
def test_wrong_options(driver: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        parse_options(driver, options)
