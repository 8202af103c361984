"""The real docker command line and the real compose: what they print, word for word.

The files in ``transcripts/`` were recorded with dockerd 26.1 (see
:mod:`tests.support.transcripts`); lines that only dockerd has were taken out by hand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import compose
import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.transcripts import RECORD, play_all

FOLDER = Path(__file__).with_name("transcripts")
# The program itself: its Python wrapper loses the exit code.
COMPOSE = Path(compose.__file__).with_name("docker-compose")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an engine that has the busybox image."""
    recorded = os.environ.get(RECORD)
    if recorded:
        yield recorded
        return
    daemon = Daemon(tmp_path_factory.mktemp("transcripts") / "d")
    daemon.start()
    try:
        daemon.docker("load", "-q", "-i", str(busybox_archive()))
        yield daemon.host
    finally:
        daemon.end()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.txt")))
def test_transcript(name: str, host: str, tmp_path: Path) -> None:
    project = tmp_path / name
    if (FOLDER / name).is_dir():
        shutil.copytree(FOLDER / name, project)
    else:
        project.mkdir()
    plugins = tmp_path / "config/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-compose").symlink_to(COMPOSE)
    env = {
        "DOCKER_HOST": host,
        "DOCKER_CONFIG": str(tmp_path / "config"),
        "DOCKER_BUILDKIT": "0",
        "LC_ALL": "C",
    }
    file = FOLDER / f"{name}.txt"
    wanted, said = play_all(file, project, env)
    if os.environ.get(RECORD):
        file.write_text(said)
    else:
        assert said == wanted
