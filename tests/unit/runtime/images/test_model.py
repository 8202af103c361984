import pytest

from lazarette.runtime.images.errors import BadArchive
from lazarette.runtime.images.model import (
    ImageConfig,
    Manifest,
    Platform,
    chain_ids,
    decode,
    host,
    layer_key,
    parse_platform,
    time_ns,
)
from lazarette.runtime.images.progress import bar, size_text


def test_chain_ids_follow_the_specification() -> None:
    one, two = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    # sha256 of "sha256:aaa… sha256:bbb…", computed with sha256sum
    both = "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"
    assert chain_ids([]) == ()
    assert chain_ids([one]) == (one,)
    assert chain_ids([one, two]) == (one, both)
    assert layer_key(one) == "sha256-" + "a" * 64


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm/v7", "linux/arm/v7"),
        ("aarch64", "linux/arm64"),
        ("s390x", "linux/s390x"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_platforms_have_one_spelling(text: str, shown: str) -> None:
    assert str(parse_platform(text)) == shown


def test_platform_of_nothing_and_of_the_system_alone() -> None:
    assert parse_platform("") is None
    assert parse_platform("linux") == host()


@pytest.mark.parametrize("text", ["foobar", "a/b/c/d", "/", "linux/", "li nux/amd64"])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(BadArchive):
        parse_platform(text)


def test_a_platform_without_variant_takes_any() -> None:
    arm = Platform(os="linux", architecture="arm")
    seven = Platform(os="linux", architecture="arm", variant="v7")
    six = Platform(os="linux", architecture="arm", variant="v6")
    assert arm.accepts(seven) and seven.accepts(arm) and not seven.accepts(six)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01T01:00:01.5+01:00", 1_500_000_000),
        ("1970-01-01T00:00:00.000000001Z", 1),
        ("0001-01-01T00:00:00Z", 0),
        ("yesterday", 0),
        (None, 0),
    ],
)
def test_times(text: str | None, ns: int) -> None:
    assert time_ns(text) == ns


def test_lenient_where_images_are_sloppy_and_strict_where_it_matters() -> None:
    config = decode(
        b'{"architecture":"amd64","os":"linux","unknown":1,"created":null,"history":null,'
        b'"config":{"Env":null,"Labels":null,"Volumes":{"/a":{}},"Unknown":[]},'
        b'"rootfs":{"type":"layers","diff_ids":[]}}',
        ImageConfig,
        "configuration",
    )
    assert config.run.volumes == {"/a": {}}
    for broken in (b"", b"[]", b"{", b'{"layers":[]}', b'{"config":{},"layers":{}}', b"\xff"):
        with pytest.raises(BadArchive, match="manifest cannot be read"):
            decode(broken, Manifest, "manifest")


def test_bars() -> None:
    assert size_text(1_234_567) == "1.235MB"
    assert size_text(999) == "999B"
    assert bar(0, 100).startswith("[>  ")
    assert bar(50, 100).startswith("[" + "=" * 25 + ">")
    assert bar(100, 100).startswith("[" + "=" * 50)
    assert bar(5, 0) == "5B"
