"""The commands that look after a repository, without a daemon."""

import json
import os
import secrets
import subprocess
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support.daemon import LAZ
from tests.support.s3 import S3Server, s3_bucket, s3_server  # noqa: F401

from lazarette.storage.errors import EXIT_OK, DamagedData, InvalidArgument, Unsupported


class Cli:
    """``laz`` with a key folder of its own."""

    def __init__(self, root: Path) -> None:
        self.environment = {**os.environ, "LAZ_KEYS": str(root / "keys")}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(LAZ), *arguments], capture_output=True, check=False, env=self.environment
        )

    def json(self, *arguments: str) -> dict:
        done = self.run(*arguments, "--json")
        assert done.returncode == EXIT_OK, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def repository(tmp_path: Path, cli: Cli) -> str:
    """A repository with two snapshots of a folder."""
    source = tmp_path / "source"
    source.mkdir()
    url = str(tmp_path / "repo")
    cli.json("repo", "init", "--no-daemon", "--kit-file", str(tmp_path / "kit"), url)
    for name in ("one", "two"):
        (source / name).write_bytes(os.urandom(300_000))
        cli.json("backup", "path", str(source), "--name", "files", "--repo", url)
    return url


def test_stats_scrub_check_and_prune(cli: Cli, repository: str) -> None:
    stats = cli.json("repo", "stats", repository)
    assert [one["raw"] for one in stats["snapshots"]] == [300_000, 600_000]
    assert stats["stored"] < 700_000
    assert cli.json("repo", "scrub", repository)["damaged"] == []
    assert cli.json("repo", "check", "--read-data", "100%", repository)["outcome"] == "ok"
    assert cli.json("repo", "prune", repository)["outcome"] == "ok"


def test_damage_is_found_without_a_key_and_repaired(
    cli: Cli, repository: str, tmp_path: Path
) -> None:
    pack = max((Path(repository) / "packs").rglob("*"), key=lambda one: one.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    bare = Cli(tmp_path / "nothing")
    assert bare.run("repo", "scrub", repository).returncode == DamagedData.exit_code
    found = cli.run("repo", "check", "--read-data", "100%", repository)
    assert found.returncode == DamagedData.exit_code
    assert cli.run("repo", "repair", repository).returncode in (0, 3)
    source = tmp_path / "source"
    for name in ("one", "two"):
        os.utime(source / name)
    cli.json("backup", "path", str(source), "--name", "files", "--repo", repository)
    out = tmp_path / "out"
    done = cli.run("restore", "files@latest", "--repo", repository, "--to", str(out))
    assert done.returncode == EXIT_OK, done.stderr
    assert (out / "one").read_bytes() == (source / "one").read_bytes()


def test_copy_goes_to_another_repository_once(cli: Cli, repository: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    cli.json("repo", "init", "--no-daemon", "--kit-file", str(tmp_path / "kit2"), other)
    assert len(cli.json("repo", "copy", repository, other)["copied"]) == 2
    again = cli.json("repo", "copy", repository, other)
    assert (len(again["copied"]), len(again["passed_over"])) == (0, 2)
    out = tmp_path / "out"
    assert cli.run("restore", "files@latest", "--repo", other, "--to", str(out)).returncode == 0
    assert sorted(one.name for one in out.iterdir()) == ["one", "two"]


def test_keys_come_and_go(cli: Cli, repository: str, tmp_path: Path) -> None:
    made = tmp_path / "second.key"
    added = cli.json("repo", "key", "add", "--new-key-file", str(made), "--label", "b", repository)
    bare = Cli(tmp_path / "nothing")
    assert len(bare.json("repo", "key", "ls", repository)) == 3
    listed = bare.json("backup", "ls", "--repo", repository, "--key-file", str(made))
    assert len(listed) == 2
    cli.json("repo", "key", "rm", repository, added["id"][:12])
    gone = bare.run("backup", "ls", "--repo", repository, "--key-file", str(made))
    assert gone.returncode not in (0, 1)
    assert b"Traceback" not in gone.stderr


def test_a_rotated_key_shuts_out_the_others(cli: Cli, repository: str, tmp_path: Path) -> None:
    kit, made = str(tmp_path / "kit"), str(tmp_path / "new.key")
    assert cli.json("backup", "ls", "--repo", repository, "--kit", kit)
    rotate = ("repo", "key", "rotate", "--keep", "--new-key-file", made, repository)
    assert cli.json(*rotate)["epoch"] == 1
    assert len(cli.json("repo", "key", "ls", repository)) == 2
    assert cli.run("backup", "ls", "--repo", repository, "--kit", kit).returncode != EXIT_OK
    assert cli.json("backup", "path", str(tmp_path / "source"), "--repo", repository)
    assert cli.json("repo", "check", "--read-data", "100%", repository)["outcome"] == "ok"
    listed = Cli(tmp_path / "bare").json("backup", "ls", "--repo", repository, "--key-file", made)
    assert len(listed) == 3


def test_migrating_is_done_once(cli: Cli, repository: str) -> None:
    assert cli.json("repo", "migrate", repository) == {"version": 2, "changed": False}


@pytest.mark.slow
def test_what_an_attacker_deletes_comes_back_from_a_locked_bucket(
    s3_server: S3Server,  # noqa: F811
    cli: Cli,
    tmp_path: Path,
) -> None:
    cli.environment |= s3_server.environment
    bucket = f"laz-{secrets.token_hex(6)}"
    url = s3_server.url(bucket, "repo")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(300_000))
    kit = str(tmp_path / "kit")
    cli.json("repo", "init", "--no-daemon", "--lock-days", "1", "--kit-file", kit, url)
    cli.json("backup", "path", str(source), "--name", "files", "--repo", url)
    done = cli.json("repo", "lock", "--days", "3", url)
    assert done["locked"] >= 5 and done["kept"] == 0
    assert cli.json("repo", "lock", "--days", "2", url)["locked"] == 0
    time.sleep(1.5)
    safe = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    time.sleep(1.5)
    with closing(s3_server.client()) as client:
        for one in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=one["Key"])
        assert cli.run("restore", "files@latest", "--repo", url, "--to", "/none").returncode
        past = f"{url}&as-of={safe}"
        out = tmp_path / "out"
        restored = cli.run("restore", "files@latest", "--repo", past, "--to", str(out))
        assert restored.returncode == EXIT_OK, restored.stderr
        assert (out / "file").read_bytes() == (source / "file").read_bytes()
        refused = cli.run("backup", "path", str(source), "--name", "files", "--repo", past)
        assert refused.returncode != EXIT_OK
        for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
            for entry in page.get("Versions", []) + page.get("DeleteMarkers", []):
                client.delete_object(
                    Bucket=bucket,
                    Key=entry["Key"],
                    VersionId=entry["VersionId"],
                    BypassGovernanceRetention=True,
                )
        client.delete_bucket(Bucket=bucket)


@pytest.mark.slow
def test_a_bucket_without_versions_has_no_past(
    s3_server: S3Server,  # noqa: F811
    s3_bucket: str,  # noqa: F811
    cli: Cli,
    tmp_path: Path,
) -> None:
    cli.environment |= s3_server.environment
    url = s3_server.url(s3_bucket, "repo")
    cli.json("repo", "init", "--no-daemon", "--kit-file", str(tmp_path / "kit"), url)
    asked = cli.run("repo", "stats", f"{url}&as-of=2026-01-31T12:00:00Z")
    assert asked.returncode == Unsupported.exit_code, asked.stderr
    assert cli.run("repo", "lock", "--days", "3", url).returncode == Unsupported.exit_code
    bad = cli.run("repo", "stats", f"{url}&as-of=yesterday")
    assert bad.returncode == InvalidArgument.exit_code
    assert cli.run("repo", "lock", "--days", "3", "/tmp").returncode == InvalidArgument.exit_code
