import pytest

from lazarette.runtime.images.errors import InvalidReference
from lazarette.runtime.images.reference import parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest", "a/b:latest"),
        ("me/app", "docker.io/me/app:latest", "me/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/a/b:x", "localhost:5000/a/b:x", "localhost:5000/a/b:x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}", f"busybox@{DIGEST}"),
        (f"q.io/a:b@{DIGEST}", f"q.io/a:b@{DIGEST}", f"q.io/a:b@{DIGEST}"),
        ("foo__bar/a-b.c", "docker.io/foo__bar/a-b.c:latest", "foo__bar/a-b.c:latest"),
    ],
)
def test_normalises_and_shortens(text: str, full: str, familiar: str) -> None:
    name = parse(text).with_default_tag()
    assert (str(name), name.familiar) == (full, familiar)
    assert parse(str(name)) == name
    assert parse(name.familiar) == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "invalid reference format"),
        ("Busybox", "repository name (Busybox) must be lowercase"),
        ("a//b", "invalid reference format"),
        ("-a", "invalid reference format"),
        ("a:", "invalid reference format"),
        ("a:-b", "invalid reference format"),
        ("a@sha256:123", "invalid reference format"),
        ("a b", "invalid reference format"),
        ("../../etc/passwd", "invalid reference format"),
        ("a" * 300, "invalid reference format"),
        ("a" * 64, "cannot specify 64-byte hexadecimal strings"),
        ("ä", "invalid reference format"),
    ],
)
def test_refuses(text: str, said: str) -> None:
    with pytest.raises(InvalidReference) as refused:
        parse(text)
    assert said in refused.value.message
