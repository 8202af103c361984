"""Builds as a whole: reproducible, parallel, cancelled, side by side."""

from __future__ import annotations

import http.server
import io
import os
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from tests.support.builds import Bench
from tests.support.waiting import until

from lazarette.runtime.builds.context import Located, locate, pack, sent_along
from lazarette.runtime.builds.errors import ContextError, DockerfileError, StepFailed
from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.builds.output import unpack_tree, write_tree
from lazarette.runtime.builds.work import LAYER_PREFIX
from lazarette.storage import mounts
from lazarette.storage.errors import Cancelled

EPOCH = {"SOURCE_DATE_EPOCH": "1600000123"}


def test_same_bytes_with_source_date_epoch(bench: Bench) -> None:
    text = "FROM busybox\nCOPY d /d\nRUN mkdir /e && echo 1 > /e/f && ln -s f /e/l\nWORKDIR /w\n"
    options = BuildOptions(no_cache=True, build_args=EPOCH)
    first = bench.build(text, {"d/a": "1"}, options)
    time.sleep(1.1)
    second = bench.build(text, {"d/a": "1"}, options)
    assert first.image.id == second.image.id
    assert first.image.config.created == "2020-09-13T12:28:43.000000000Z"
    assert {line.created for line in (first.image.config.history or [])[1:]} == {
        first.image.config.created
    }


def test_independent_stages_run_side_by_side(bench: Bench) -> None:
    """Each waits for a file the other one makes in a shared cache: alone neither ends."""
    name = uuid.uuid4().hex
    mount = f"--mount=type=cache,id={name},target=/c"
    wait = (
        "for i in $(seq 100); do [ -e /c/{0} ] && echo met > /{1} && exit; sleep 0.1; done; exit 1"
    )
    text = (
        f"FROM busybox AS one\nRUN {mount} touch /c/one; {wait.format('two', 'one')}\n"
        f"FROM busybox AS two\nRUN {mount} touch /c/two; {wait.format('one', 'two')}\n"
        "FROM scratch\nCOPY --from=one /one /\nCOPY --from=two /two /\n"
    )
    built = bench.build(text)
    assert bench.tree(built.image) == ["one 0644 0:0 = 'met\\n'", "two 0644 0:0 = 'met\\n'"]
    steps = [line for line in built.text.splitlines() if line.startswith("Step")]
    assert [step.split()[1] for step in steps] == [f"{n}/7" for n in range(1, 8)]


def test_a_locked_cache_is_used_by_one_at_a_time(bench: Bench) -> None:
    name = uuid.uuid4().hex
    step = (
        f"RUN --mount=type=cache,id={name},target=/c,sharing=locked"
        " [ ! -e /c/busy ] && touch /c/busy && sleep 0.3 && rm /c/busy && echo x > /done\n"
    )
    text = (
        f"FROM busybox AS one\n{step}FROM busybox AS two\n{step}"
        "FROM scratch\nCOPY --from=one /done /1\nCOPY --from=two /done /2\n"
    )
    assert len(bench.tree(bench.build(text).image)) == 2


@pytest.mark.parametrize("moment", ["started now", "Step 2"])
def test_cancelled_build_leaves_nothing(bench: Bench, moment: str) -> None:
    stop = threading.Event()
    messages: list[Mapping[str, object]] = []
    text = "FROM busybox\nRUN echo started $((1 - 1))now | tr -d 0; sleep 600\n"

    def run() -> None:
        with pytest.raises(Cancelled):
            bench.build(text, None, None, stop, messages)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        until(lambda: any(moment in str(message) for message in messages), pause=0.01)
        stop.set()
        running.result(90)
    _assert_clean(bench)


def test_a_failed_step_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(StepFailed) as caught:
        bench.build("FROM busybox\nRUN exit 9\n")
    assert caught.value.code == 9
    _assert_clean(bench)


def _assert_clean(bench: Bench) -> None:
    assert not [key for key in bench.layers.keys() if key.startswith(LAYER_PREFIX)]  # noqa: SIM118
    assert list((bench.builder.root / "running").iterdir()) == []
    assert mounts.mounts_beneath(bench.builder.root) == []


def test_what_a_killed_daemon_left_is_removed(bench: Bench) -> None:
    bench.layers.prepare(f"{LAYER_PREFIX}left", None)
    left = bench.builder.root / "running" / "left"
    left.mkdir(parents=True)
    bench.builder.recover()
    assert not bench.layers.exists(f"{LAYER_PREFIX}left")
    assert not left.exists()


def test_the_same_build_many_times_at_once(bench: Bench) -> None:
    text = f"FROM busybox\nRUN echo {uuid.uuid4().hex} > /a\nCOPY a /b\n"
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: bench.build(text, {"a": "1"}), range(4)))
    trees = {tuple(bench.tree(one.image, bench.images.get("busybox"))) for one in built}
    assert len(trees) == 1


def test_capabilities_of_programs_are_kept(bench: Bench) -> None:
    capability = "0100000200040000" + "00" * 12
    text = "FROM scratch AS one\nCOPY p /p\nFROM scratch\nCOPY --from=one /p /q\n"
    built = bench.build(text, {"p": {"mode": "755", "capability": capability}})
    with bench.mounted(built.image) as root:
        assert os.getxattr(root / "q", "security.capability").hex() == capability


def test_a_line_that_is_too_long(bench: Bench) -> None:
    with pytest.raises(DockerfileError, match="dockerfile line greater than max allowed size"):
        bench.build("FROM scratch\nLABEL a=" + "x" * 70_000 + "\n")


def test_a_tag_moves(bench: Bench) -> None:
    name = f"moves-{uuid.uuid4().hex}"
    first = bench.build("FROM scratch\nLABEL a=1\n", None, BuildOptions(tags=(name,)))
    second = bench.build("FROM scratch\nLABEL a=2\n", None, BuildOptions(tags=(name,)))
    assert first.image.id != second.image.id
    assert bench.images.get(name).id == second.image.id


# ---- contexts


def _packed(folder: Path, located: Located) -> tuple[bytes, str]:
    out = io.BytesIO()
    pack(folder, out, located)
    return out.getvalue(), located.name


def _built(bench: Bench, tar: bytes, dockerfile: str) -> list[str]:
    messages: list[Mapping[str, object]] = []
    options = BuildOptions(dockerfile=dockerfile)
    built = bench.builder.build_blocking(io.BytesIO(tar), options, messages.append)
    return bench.tree(bench.images.get(built.image_id))


def test_packing_a_folder(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (tmp_path / ".dockerignore").write_text("*\n!keep\n")
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/a").write_text("1")
    (tmp_path / "node_modules/deep").mkdir(parents=True)
    (tmp_path / "node_modules/deep/x").write_text("1" * 1000)
    tar, dockerfile = _packed(tmp_path, locate(tmp_path))
    assert b"node_modules" not in tar
    assert _built(bench, tar, dockerfile) == ["keep 0755 0:0 /", "keep/a 0644 0:0 = '1'"]


def test_packing_with_a_dockerfile_from_elsewhere(bench: Bench, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "a").write_text("1")
    (tmp_path / "Elsewhere").write_text("FROM scratch\nCOPY a /\n")
    tar, dockerfile = _packed(context, locate(context, "../Elsewhere"))
    assert _built(bench, tar, dockerfile) == ["a 0644 0:0 = '1'"]


def test_packing_with_a_dockerfile_from_standard_input(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    tar, dockerfile = _packed(tmp_path, sent_along(b"FROM scratch\nCOPY a /\n"))
    assert _built(bench, tar, dockerfile) == ["a 0644 0:0 = '1'"]


def test_packing_without_a_dockerfile(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="no Dockerfile in"):
        locate(tmp_path)


@pytest.mark.parametrize("pack_as", ["gzip", "bzip2", "xz", "zstd"])
def test_compressed_contexts(bench: Bench, pack_as: str) -> None:
    from tests.support.builds import context_tar, packed_as

    tar = packed_as(context_tar({"Dockerfile": "FROM scratch\nCOPY a /\n", "a": "1"}), pack_as)
    assert _built(bench, tar, "") == ["a 0644 0:0 = '1'"]


def test_a_context_that_is_no_archive(bench: Bench) -> None:
    with pytest.raises(ContextError):
        _built(bench, b"this is not a tar at all" * 100, "")


# ---- what is fetched


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


SHA = "sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_add_url(bench: Bench, served: tuple[Path, str]) -> None:
    folder, url = served
    (folder / "f.txt").write_text("1")
    os.utime(folder / "f.txt", (1_500_000_000, 1_500_000_000))
    text = f"FROM scratch\nADD --checksum={SHA} {url}/f.txt /d/\nADD {url}/f.txt /e\n"
    built = bench.build(text)
    assert bench.tree(built.image) == [
        "d 0755 0:0 /",
        "d/f.txt 0600 0:0 = '1'",
        "e 0600 0:0 = '1'",
    ]
    with bench.mounted(built.image) as root:
        assert (root / "e").stat().st_mtime == 1_500_000_000
    assert bench.build(text).cached == 2
    (folder / "f.txt").write_text("2")
    with pytest.raises(StepFailed, match="digest mismatch"):
        bench.build(text)


def test_add_url_is_not_unpacked_unless_told(bench: Bench, served: tuple[Path, str]) -> None:
    from tests.support.builds import context_tar

    folder, url = served
    (folder / "a.tar").write_bytes(context_tar({"x": {"content": "1", "uid": 0, "gid": 0}}))
    kept = bench.build(f"FROM scratch\nADD {url}/a.tar /\n")
    assert bench.tree(kept.image)[0].startswith("a.tar 0600")
    opened = bench.build(f"FROM scratch\nADD --unpack=true {url}/a.tar /\n")
    assert bench.tree(opened.image) == ["x 0644 0:0 = '1'"]


def test_add_url_without_a_name(bench: Bench, served: tuple[Path, str]) -> None:
    folder, url = served
    (folder / "index.html").write_text("1")
    with pytest.raises(StepFailed, match="cannot determine filename for source URL"):
        bench.build(f"FROM scratch\nADD {url}/ /d/\n")


def _git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(served: tuple[Path, str], tmp_path: Path) -> str:
    """A git repository's URL, with a branch ``other``."""
    folder, url = served
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    _git(work, "init")
    (work / "Dockerfile").write_text("FROM scratch\nCOPY sub /\n")
    (work / "sub/Dockerfile").write_text("FROM scratch\nCOPY f /only\n")
    (work / "sub/f").write_text("main")
    _git(work, "add", ".")
    _git(work, "commit", "-m", "one")
    _git(work, "checkout", "-b", "other")
    (work / "sub/f").write_text("other")
    _git(work, "commit", "-am", "two")
    _git(work, "checkout", "main")
    _git(tmp_path, "clone", "--bare", str(work), str(folder / "repo.git"))
    _git(folder / "repo.git", "update-server-info")
    return f"{url}/repo.git"


def test_git_context(bench: Bench, repository: str) -> None:
    messages: list[Mapping[str, object]] = []
    options = BuildOptions(remote=f"{repository}#other:sub")
    built = bench.builder.build_blocking(None, options, messages.append)
    assert bench.tree(bench.images.get(built.image_id)) == ["only 0644 0:0 = 'other'"]


def test_git_context_without_such_a_ref(bench: Bench, repository: str) -> None:
    with pytest.raises(StepFailed, match=r"cloning .* failed"):
        bench.builder.build_blocking(
            None, BuildOptions(remote=f"{repository}#gone"), lambda _: None
        )


def test_add_git(bench: Bench, repository: str) -> None:
    built = bench.build(f"FROM scratch\nADD {repository}#main:sub /g/\n")
    assert [line.split()[0] for line in bench.tree(built.image)] == ["g", "g/Dockerfile", "g/f"]
    kept = bench.build(f"FROM scratch\nADD --keep-git-dir=true {repository} /g/\n")
    assert "g/.git" in [line.split()[0] for line in bench.tree(kept.image)]


def test_remote_dockerfile(bench: Bench, served: tuple[Path, str]) -> None:
    folder, url = served
    (folder / "Dockerfile.txt").write_text("FROM scratch\nLABEL remote=1\n")
    options = BuildOptions(remote=f"{url}/Dockerfile.txt")
    built = bench.builder.build_blocking(None, options, lambda _: None)
    assert bench.images.get(built.image_id).labels == {"remote": "1"}


# ---- output


def test_output_to_a_folder(bench: Bench, tmp_path: Path) -> None:
    built = bench.build("FROM scratch\nCOPY --chmod=755 a /bin/a\n", {"a": "1"})
    out = io.BytesIO()
    write_tree(bench.images, built.image, out)
    out.seek(0)
    unpack_tree(out, tmp_path / "out")
    assert (tmp_path / "out/bin/a").read_text() == "1"
    assert stat.S_IMODE((tmp_path / "out/bin/a").stat().st_mode) == 0o755
