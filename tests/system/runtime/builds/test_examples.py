"""Real applications: a Node server and a Go program in an image of nothing else."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import toolchain
from tests.support.daemon import Daemon
from tests.support.postgres import free_port

CLASSIC = {"DOCKER_BUILDKIT": "0"}

NODE = {
    "Dockerfile": """# syntax=docker/dockerfile:1
FROM toolchain
WORKDIR /app
ENV NODE_ENV=production PORT=8080
COPY package.json ./
RUN node -e 'console.log("node", process.version, require("./package.json").name)'
COPY --chown=nobody:nogroup . .
RUN node --check server.js
USER nobody
EXPOSE 8080
HEALTHCHECK --interval=1s CMD node -e 'require("http").get("http://localhost:8080")'
CMD ["node", "server.js"]
""",
    ".dockerignore": "node_modules\n*.log\n",
    "package.json": '{"name": "shop", "version": "1.0.0", "main": "server.js"}\n',
    "server.js": """const http = require('http')
const { name, version } = require('./package.json')
http.createServer((request, answer) => {
  answer.end(JSON.stringify({ name, version, user: process.getuid(), path: request.url }))
}).listen(process.env.PORT, '0.0.0.0')
process.on('SIGTERM', () => process.exit(0))
""",
    "debug.log": "not sent\n",
    "node_modules/left/index.js": "not sent\n",
}

GO = {
    "Dockerfile": """ARG TOOLS=toolchain
FROM ${TOOLS} AS build
WORKDIR /src
COPY go.mod ./
COPY cmd ./cmd
ARG VERSION=dev
RUN --mount=type=cache,target=/root/.cache/go-build \\
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" \\
    -o /out/app ./cmd/app

FROM build AS lint
RUN exit 1

FROM scratch
COPY --from=build /out/app /app
USER 65532:65532
ENTRYPOINT ["/app"]
CMD ["world"]
""",
    "go.mod": "module example.org/app\n\ngo 1.19\n",
    "cmd/app/main.go": """package main

import (
\t"fmt"
\t"os"
)

var version = "unset"

func main() { fmt.Println("hello", os.Args[1], version, os.Getuid()) }
""",
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = Daemon(tmp_path_factory.mktemp("examples"))
    made.start()
    try:
        made.laz("load", "-i", str(toolchain.archive()), timeout=300)
        yield made
    finally:
        made.end()


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_node_application(daemon: Daemon, tmp_path: Path) -> None:
    context = _write(tmp_path, NODE)
    built = daemon.docker("build", "-t", "shop", str(context), env=CLASSIC, timeout=300).stdout
    assert b"shop\n" in built
    port = free_port()
    daemon.docker("run", "-d", "--name", "shop", "-p", f"127.0.0.1:{port}:8080", "shop")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/cart", timeout=5) as answer:
                    said = answer.read()
                break
            except OSError:
                assert time.monotonic() < deadline, daemon.docker("logs", "shop").stderr
                time.sleep(0.2)
        expected = b'{"name":"shop","version":"1.0.0","user":65534,"path":"/cart"}'
        assert said == expected
        listed = daemon.docker("exec", "shop", "ls", "-A", "/app").stdout.split()
        assert listed == [b".dockerignore", b"Dockerfile", b"package.json", b"server.js"]
    finally:
        daemon.docker("rm", "-f", "shop", check=False)


@pytest.mark.timeout(400)
def test_go_program_in_an_image_of_nothing_else(daemon: Daemon, tmp_path: Path) -> None:
    context = _write(tmp_path, GO)
    arguments = ("build", "-t", "app", "--build-arg", "VERSION=1.2", str(context))
    daemon.docker(*arguments, env=CLASSIC, timeout=300)
    assert daemon.docker("run", "--rm", "app").stdout == b"hello world 1.2 65532\n"
    assert daemon.docker("run", "--rm", "app", "again").stdout == b"hello again 1.2 65532\n"
    main = context / "cmd/app/main.go"
    main.write_text(main.read_text().replace("hello", "good day"))
    again = daemon.docker(*arguments, env=CLASSIC, timeout=300).stdout.decode()
    assert again.count("Using cache") == 2
    assert daemon.docker("run", "--rm", "app").stdout == b"good day world 1.2 65532\n"
