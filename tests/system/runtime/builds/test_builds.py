"""Builds through a real daemon: docker's command line, compose, our own, and the raw API."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from tests.support.builds import context_tar
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until

CLASSIC = {"DOCKER_BUILDKIT": "0"}
COMPOSE = Path(sys.executable).with_name("docker-compose")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = Daemon(tmp_path_factory.mktemp("builds"))
    made.start()
    try:
        made.laz("load", "-i", str(busybox_archive()))
        yield made
    finally:
        made.end()


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        "FROM busybox\nARG who=nobody\nRUN echo built by $who > /who\nCOPY data /data\n"
        'CMD ["cat", "/who", "/data"]\n'
    )
    (folder / "data").write_text("data\n")
    return folder


def _post(daemon: Daemon, path: str, body: bytes) -> tuple[int, bytes]:
    """A POST over the daemon's socket; status and whole body."""
    connection = http.client.HTTPConnection("d")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(daemon.socket))
    try:
        connection.request("POST", path, body, {"Content-Type": "application/x-tar"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# ---- docker's command line


def test_docker_build_and_run(daemon: Daemon, context: Path) -> None:
    arguments = ("build", "-t", "cli", "--build-arg", "who=me", "--label", "a=b", str(context))
    first = daemon.docker(*arguments, env=CLASSIC).stdout.decode()
    again = daemon.docker(*arguments, env=CLASSIC).stdout.decode()
    assert "Step 3/6 : RUN echo built by $who > /who\n ---> Running in" in first
    assert again.count("---> Using cache") == 5
    assert first.splitlines()[-2:] == again.splitlines()[-2:]
    assert daemon.docker("run", "--rm", "cli").stdout == b"built by me\ndata\n"
    shown = json.loads(daemon.docker("inspect", "cli").stdout)[0]
    assert shown["Config"]["Labels"] == {"a": "b"}


def test_docker_build_quiet(daemon: Daemon, context: Path) -> None:
    said = daemon.docker("build", "-q", str(context), env=CLASSIC).stdout.decode()
    assert said.startswith("sha256:")
    assert len(said.strip()) == len("sha256:") + 64


def test_docker_build_failure(daemon: Daemon, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM busybox\n\nRUN exit 7\n")
    done = daemon.docker("build", str(context), env=CLASSIC, check=False)
    assert done.returncode == 7
    assert b"The command '/bin/sh -c exit 7' returned a non-zero code: 7" in done.stderr
    assert b"Dockerfile:3\n   3 | RUN exit 7" in done.stderr


def test_docker_build_from_standard_input(daemon: Daemon) -> None:
    done = daemon.docker("build", "-", env=CLASSIC, stdin=b"FROM busybox\nRUN echo from stdin\n")
    assert b"from stdin" in done.stdout


def test_docker_builder_prune_and_df(daemon: Daemon, context: Path) -> None:
    daemon.docker("build", "-t", "pruned", str(context), env=CLASSIC)
    shown = json.loads(daemon.docker("system", "df", "-v", "--format", "json").stdout)
    assert any("COPY" in one["CacheType"] or one["ID"] for one in shown["BuildCache"])
    daemon.docker("builder", "prune", "-af", env=CLASSIC)
    assert daemon.docker("run", "--rm", "pruned").stdout.endswith(b"data\n")


def test_dockerignore_is_applied(daemon: Daemon, context: Path) -> None:
    """Case A28, with docker's own client."""
    (context / "Dockerfile").write_text("FROM busybox\nCOPY . /c\nCMD find /c -type f\n")
    (context / ".dockerignore").write_text("**/c\n!a/b/c/include.txt\n.git\n")
    (context / "a/b/c").mkdir(parents=True)
    (context / ".git").mkdir()
    for name in ("a/b/c/include.txt", "a/b/c/exclude.txt", ".git/config"):
        (context / name).write_text("x")
    daemon.docker("build", "-t", "ignored", str(context), env=CLASSIC)
    found = daemon.docker("run", "--rm", "ignored").stdout.decode().split()
    assert "/c/a/b/c/include.txt" in found
    assert "/c/a/b/c/exclude.txt" not in found
    assert "/c/.git/config" not in found


def test_deleted_then_made_again_over_layers(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    """Case A26: in the container, and after save and load."""
    merged = "RUN rm -r /d1 && mkdir -p /d1/d2\n"
    for name, end in (("three", "RUN rm -r /d1\nRUN mkdir -p /d1/d2\n"), ("two", merged)):
        (context / "Dockerfile").write_text(
            f"FROM busybox\nRUN mkdir -p /d1/d2 && touch /d1/d2/foo\n{end}CMD ls -A /d1 /d1/d2\n"
        )
        daemon.docker("build", "-t", f"a26-{name}", str(context), env=CLASSIC)
        before = daemon.docker("run", "--rm", f"a26-{name}").stdout
        assert b"foo" not in before
        daemon.docker("save", "-o", str(tmp_path / "saved.tar"), f"a26-{name}")
        daemon.docker("rmi", f"a26-{name}")
        daemon.docker("builder", "prune", "-af", env=CLASSIC)
        daemon.docker("load", "-i", str(tmp_path / "saved.tar"))
        assert daemon.docker("run", "--rm", f"a26-{name}").stdout == before


# ---- compose and docker-py


def test_compose_build(daemon: Daemon, context: Path) -> None:
    if not COMPOSE.exists():
        pytest.skip("docker-compose is not installed")
    (context / "compose.yaml").write_text(
        "services:\n  app:\n    build:\n      context: .\n      args: {who: compose}\n"
        "    image: composed\n"
    )
    env = {
        **os.environ,
        **CLASSIC,
        "DOCKER_HOST": daemon.host,
        "DOCKER_CONFIG": str(daemon.root / "docker-config"),
        "COMPOSE_BAKE": "false",
    }
    (daemon.root / "docker-config").mkdir(exist_ok=True)
    done = subprocess.run(
        [str(COMPOSE), "build"], cwd=context, env=env, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert daemon.docker("run", "--rm", "composed").stdout == b"built by compose\ndata\n"


def test_docker_py_build(daemon: Daemon, context: Path) -> None:
    client = docker.DockerClient(base_url=daemon.host, version="1.44")
    try:
        image, lines = client.images.build(path=str(context), tag="dockerpy", rm=True)
        assert "dockerpy:latest" in image.tags
        assert any("Successfully built" in str(line) for line in lines)
        with pytest.raises(docker.errors.BuildError, match="non-zero code: 3"):
            client.images.build(fileobj=io.BytesIO(b"FROM busybox\nRUN exit 3\n"))
    finally:
        client.close()


# ---- our own command line


def test_laz_build_with_a_secret(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    (context / "Dockerfile").write_text(
        "FROM busybox\nRUN --mount=type=secret,id=token wc -c < /run/secrets/token > /length\n"
        "RUN --mount=type=secret,id=other,env=OTHER echo ${#OTHER} >> /length\nCMD cat /length\n"
    )
    (tmp_path / "token").write_text("very-secret-token")
    daemon.laz(
        "build", "-t", "secretive", "--secret", f"id=token,src={tmp_path}/token",
        "--secret", "id=other,env=OTHER_TOKEN", str(context), env={"OTHER_TOKEN": "hidden-too"},
    )  # fmt: skip
    assert daemon.docker("run", "--rm", "secretive").stdout == b"17\n10\n"
    kept = subprocess.run(
        ["grep", "-r", "-l", "-e", "very-secret-token", "-e", "hidden-too", str(daemon.root)],
        capture_output=True,
        check=False,
    )
    assert kept.stdout == b""


def test_laz_build_with_an_agent(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(path))
        agent.listen()
        (context / "Dockerfile").write_text(
            "FROM busybox\nRUN --mount=type=ssh [ -S $SSH_AUTH_SOCK ] && echo agent is there\n"
        )
        done = daemon.laz("build", "--ssh", f"default={path}", str(context))
    assert b"agent is there" in done.stdout


def test_laz_build_output(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    (context / "Dockerfile").write_text("FROM scratch\nCOPY --chmod=750 data /out/data\n")
    daemon.laz("build", "-o", str(tmp_path / "folder"), str(context))
    made = tmp_path / "folder/out/data"
    assert made.read_text() == "data\n"
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    daemon.laz("build", "-o", f"type=tar,dest={tmp_path}/out.tar", str(context))
    listed = subprocess.run(["tar", "-tf", tmp_path / "out.tar"], capture_output=True, check=True)
    assert listed.stdout.split() == [b"out/", b"out/data"]


def test_laz_build_options(daemon: Daemon, context: Path) -> None:
    (context / "Other").write_text(
        "FROM busybox AS one\nARG A B\nRUN echo $A $B; cat /etc/hosts; ulimit -n\n"
        "FROM one\nRUN exit 1\n"
    )
    done = daemon.laz(
        "build", "-f", str(context / "Other"), "--target", "one", "--build-arg", "A=1",
        "--build-arg", "B", "--add-host", "there:10.9.8.7", "--ulimit", "nofile=99",
        "--label", "x=y", "-t", "opts:1", "-t", "opts:2", str(context), env={"B": "from-here"},
    )  # fmt: skip
    assert b"1 from-here\n" in done.stdout
    assert b"10.9.8.7\tthere" in done.stdout
    assert b"99\n" in done.stdout
    assert b"Successfully tagged opts:2" in done.stdout


def test_laz_build_from_standard_input(daemon: Daemon) -> None:
    done = daemon.laz("build", "-", stdin=b"FROM busybox\nRUN echo from stdin\n")
    assert b"from stdin" in done.stdout
    tar = context_tar({"Dockerfile": "FROM busybox\nCOPY a /\nRUN cat /a\n", "a": "in the tar"})
    assert b"in the tar" in daemon.laz("build", "-", stdin=tar).stdout


def test_laz_build_failures(daemon: Daemon, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM busybox\nRUN exit 6\n")
    done = daemon.laz("build", str(context), check=False)
    assert done.returncode == 6
    (context / "Dockerfile").write_text("FROM busybox\nRUN --network=host true\n")
    done = daemon.laz("build", str(context), check=False)
    assert b"--allow network.host" in done.stderr
    assert daemon.laz("build", "--allow", "network.host", str(context)).returncode == 0


def test_laz_builder(daemon: Daemon, context: Path) -> None:
    daemon.laz("build", str(context))
    assert b"COPY" in daemon.laz("builder", "du").stdout
    before = daemon.laz("builder", "du", "--json").stdout
    for spared in (("--filter", "until=24h"), ("--keep-storage", "10g")):  # too young; small
        daemon.laz("builder", "prune", "-a", *spared)
        assert daemon.laz("builder", "du", "--json").stdout == before
    daemon.docker("builder", "prune", "-af", "--filter", "until=24h", env=CLASSIC)
    assert daemon.laz("builder", "du", "--json").stdout == before
    assert b"reclaimed" in daemon.laz("builder", "prune", "-a").stdout
    assert daemon.laz("builder", "du", "--json").stdout.strip() == b"[]"


# ---- the API itself


def test_networks_of_steps(daemon: Daemon, context: Path) -> None:
    """Steps reach a container by the network they are put into."""
    daemon.docker("network", "create", "buildnet")
    daemon.docker(
        "run", "-d", "--name", "buildserver", "--network", "buildnet", "busybox",
        "sh", "-c", "echo served > /index.html; exec httpd -f -p 80 -h /",
    )  # fmt: skip
    try:
        address = daemon.docker(
            "inspect", "-f", "{{.NetworkSettings.Networks.buildnet.IPAddress}}", "buildserver"
        ).stdout.decode().strip()  # fmt: skip
        (context / "Dockerfile").write_text(
            "FROM busybox\nARG where\n"
            "RUN (echo 'GET /index.html HTTP/1.0'; echo; sleep 1) | nc $where 80 | tail -1\n"
        )
        arguments = ("build", "--network", "buildnet", "--build-arg", f"where={address}")
        done = daemon.laz(*arguments, str(context))
        assert b"served" in done.stdout
    finally:
        daemon.docker("rm", "-f", "buildserver", check=False)
        daemon.docker("network", "rm", "buildnet", check=False)


@pytest.mark.parametrize(
    ("query", "dockerfile", "message"),
    [
        ("", "NOPE x\n", "unknown instruction: NOPE"),
        ("?version=2", "FROM scratch\n", "buildkit is not supported"),
        ("?buildargs=x", "FROM scratch\n", "error reading buildargs"),
        ("?memory=x", "FROM scratch\n", "invalid value for memory"),
        ("?target=x", "FROM scratch\n", 'target stage "x" could not be found'),
        ("?t=UPPER", "FROM scratch\n", "must be lowercase"),
        ("?dockerfile=x", "FROM scratch\n", "Cannot locate specified Dockerfile: x"),
    ],
)
def test_errors_before_the_stream(
    daemon: Daemon, query: str, dockerfile: str, message: str
) -> None:
    status, body = _post(daemon, f"/v1.44/build{query}", context_tar({"Dockerfile": dockerfile}))
    assert status == 400, body
    assert message in json.loads(body)["message"]


def test_errors_in_the_stream(daemon: Daemon) -> None:
    tar = context_tar({"Dockerfile": "FROM busybox\nRUN echo out; exit 5\n"})
    status, body = _post(daemon, "/v1.44/build", tar)
    lines = [json.loads(line) for line in body.split(b"\r\n") if line]
    assert status == 200
    assert {"stream": "out\n"} in lines
    assert lines[-1]["errorDetail"]["code"] == 5
    assert lines[-1]["error"] == lines[-1]["errorDetail"]["message"]


def test_a_client_that_leaves_ends_its_build(daemon: Daemon) -> None:
    tar = context_tar({"Dockerfile": "FROM busybox\nRUN sleep 987654\n"})
    connection = http.client.HTTPConnection("d")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(daemon.socket))
    connection.request("POST", "/v1.44/build", tar)
    answer = connection.getresponse()
    assert b"FROM busybox" in answer.readline()
    until(lambda: _running("sleep 987654"))
    answer.close()
    connection.close()
    until(lambda: not _running("sleep 987654"))


def _running(command: str) -> bool:
    wanted = command.replace(" ", "\0").encode() + b"\0"
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if process.read_bytes() == wanted:
                return True
        except OSError:
            continue
    return False


def test_a_killed_daemon_keeps_its_cache_and_cleans_up(tmp_path: Path, context: Path) -> None:
    daemon = Daemon(tmp_path / "killed")
    daemon.start()
    try:
        daemon.laz("load", "-i", str(busybox_archive()))
        text = (context / "Dockerfile").read_text()
        daemon.laz("build", str(context))
        (context / "Dockerfile").write_text(text + "RUN sleep 876543\n")
        running = subprocess.Popen(
            [str(Path(sys.executable).with_name("laz")), "-H", daemon.host, "build", str(context)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: _running("sleep 876543"))
        daemon.kill()
        running.wait(30)
        daemon.start()
        assert not _running("sleep 876543")
        (context / "Dockerfile").write_text(text)
        again = daemon.laz("build", str(context)).stdout.decode()
        assert again.count("Using cache") == 4
        assert not [n for n in os.listdir(daemon.root / "data/layers") if n.startswith("build-")]
    finally:
        daemon.end()
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)


# ---- named contexts, devices, networks


def test_named_contexts(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "file").write_text("from the folder\n")
    (extra / "secret.key").write_text("no")
    (extra / ".dockerignore").write_text("*.key\n")
    (context / "Dockerfile").write_text(
        "FROM alias AS base\nFROM base\n"
        "COPY --from=extra . /copied/\n"
        "RUN --mount=from=extra,target=/m cat /m/file > /bound; ls /m /copied > /listed\n"
    )
    arguments = (
        "build", "-t", "named", "--build-context", f"extra={extra}",
        "--build-context", "alias=docker-image://busybox", str(context),
    )  # fmt: skip
    first = json.loads(daemon.laz(*arguments, "--json").stdout)["id"]
    os.utime(extra / "file", (1, 1))
    assert json.loads(daemon.laz(*arguments, "--json").stdout)["id"] == first
    said = daemon.docker("run", "--rm", "named", "cat", "/copied/file", "/bound", "/listed").stdout
    assert said == b"from the folder\nfrom the folder\n/copied:\nfile\n\n/m:\nfile\n"
    (extra / "file").write_text("changed\n")
    daemon.laz(*arguments)
    assert daemon.docker("run", "--rm", "named", "cat", "/bound").stdout == b"changed\n"
    assert list((daemon.root / "data" / "builds" / "uploads").iterdir()) == []


def test_a_named_context_hides_a_stage(daemon: Daemon, context: Path, tmp_path: Path) -> None:
    (context / "Dockerfile").write_text(
        "FROM busybox AS made\nRUN exit 7\nFROM busybox\nCOPY --from=made data /taken\n"
    )
    daemon.laz("build", "-t", "hidden", "--build-context", f"made={context}", str(context))
    assert daemon.docker("run", "--rm", "hidden", "cat", "/taken").stdout == b"data\n"


@pytest.mark.parametrize("value", ["", "x=", "x=/no/such/folder"])
def test_named_contexts_that_are_none(daemon: Daemon, context: Path, value: str) -> None:
    said = daemon.laz("build", "--build-context", value, str(context), check=False)
    assert said.returncode != 0 and said.stderr.count(b"\n") <= 2


def test_a_folder_is_no_base(daemon: Daemon, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM here\nRUN true\n")
    said = daemon.laz(
        "build", "--build-context", f"here={context}", str(context), check=False
    ).stderr
    assert b"is a folder and cannot be a base" in said


def test_a_device_of_a_vendor(daemon: Daemon, context: Path) -> None:
    folder = Path("/var/run/cdi")
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    file = folder / f"lazarette-test-{os.getpid()}.json"
    node = {"path": "/dev/vendor0", "hostPath": "/dev/zero"}
    edits = {"env": ["VENDOR=here"], "deviceNodes": [node]}
    kind = f"test{os.getpid()}.example/zero"
    devices = [{"name": "one", "containerEdits": edits}]
    file.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": devices}))
    (context / "Dockerfile").write_text(
        f"FROM busybox\nRUN --device={kind}=one head -c 3 /dev/vendor0 | wc -c; echo $VENDOR\n"
        "RUN test ! -e /dev/vendor0\n"
    )
    try:
        said = daemon.laz("build", "--allow", f"device={kind}=one", str(context)).stdout
    finally:
        file.unlink()
        if made:
            folder.rmdir()
    assert b"3\nhere\n" in said


def test_the_network_of_a_container(daemon: Daemon, context: Path) -> None:
    daemon.docker("run", "-d", "--name", "net", "busybox", "httpd", "-f", "-h", "/etc")
    (context / "Dockerfile").write_text(
        "FROM busybox\nRUN wget -qO- http://127.0.0.1/hostname; cat /etc/hosts\n"
    )
    arguments = ("build", "--no-cache", "--network", "container:net", str(context))
    try:
        name = daemon.docker("exec", "net", "hostname").stdout
        said = daemon.docker(*arguments, env=CLASSIC).stdout
        assert b"\n" + name in said and b"\t" + name in said
    finally:
        daemon.docker("rm", "-f", "net")
    gone = daemon.docker(*arguments, env=CLASSIC, check=False)
    assert gone.returncode != 0 and b"No such container: net" in gone.stderr
