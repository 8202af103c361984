"""The layer cache: what hits, what misses, and from where on."""

from __future__ import annotations

import uuid

import pytest
from tests.support.builds import Bench

from lazarette.runtime.builds.options import BuildOptions, Secret
from lazarette.runtime.builds.usage import CacheUsage, PruneRequest
from lazarette.runtime.images import reference
from lazarette.storage.clock import NANOSECONDS

FILE = """FROM busybox
ENV unique={unique}
COPY a /a
RUN echo one > /one
COPY b /b
RUN echo two > /two
CMD ["x"]
"""


@pytest.fixture
def dockerfile() -> str:
    """A file no other test has built."""
    return FILE.format(unique=uuid.uuid4().hex)


def test_unchanged_build_does_no_work(bench: Bench, dockerfile: str) -> None:
    first = bench.build(dockerfile, {"a": "1", "b": "2"})
    again = bench.build(dockerfile, {"a": "1", "b": "2"})
    assert first.cached == 0
    assert again.cached == 6
    assert "Running in" not in again.text
    assert again.image.id == first.image.id


def test_changed_file_invalidates_from_its_copy_on(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    changed = bench.build(dockerfile, {"a": "1", "b": "changed"})
    assert changed.cached == 3
    assert "Step 5/7 : COPY b /b\n ---> Using cache" not in changed.text
    assert bench.build(dockerfile, {"a": "changed", "b": "2"}).cached == 1


def test_the_same_bytes_under_another_ignore_file(bench: Bench) -> None:
    """What is known of a context holds only for the Dockerfile it was learned with."""
    text = f"FROM scratch\nLABEL u={uuid.uuid4().hex}\nCOPY d /d\n"
    files = {
        "Dockerfile": text,
        "x.Dockerfile": text,
        "x.Dockerfile.dockerignore": "d/b\n",
        "d/a": "1",
        "d/b": "2",
    }
    for name, count in (("", 3), ("x.Dockerfile", 2), ("", 3), ("x.Dockerfile", 2)):
        built = bench.build(text, files, BuildOptions(dockerfile=name))
        assert len(bench.tree(built.image)) == count


def test_after_a_miss_nothing_is_looked_up(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    bench.build(dockerfile, {"a": "changed", "b": "2"})
    assert bench.build(dockerfile, {"a": "1", "b": "2"}).cached == 6


def test_times_owners_and_other_files_do_not_matter(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    touched = {"content": "1", "mtime": 1_700_000_000, "uid": 99, "gid": 98}
    assert bench.build(dockerfile, {"a": touched, "b": "2", "c": "other"}).cached == 6


def test_a_mode_matters(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    assert bench.build(dockerfile, {"a": {"content": "1", "mode": "755"}, "b": "2"}).cached == 1


def test_a_name_in_a_folder_matters(bench: Bench) -> None:
    text = f"FROM scratch\nLABEL u={uuid.uuid4().hex}\nCOPY d /d\n"
    bench.build(text, {"d/x": "1"})
    assert bench.build(text, {"d/x": "1"}).cached == 2
    assert bench.build(text, {"d/y": "1"}).cached == 1


def test_no_cache(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    built = bench.build(dockerfile, {"a": "1", "b": "2"}, BuildOptions(no_cache=True))
    assert built.cached == 0


def test_no_cache_for_one_stage(bench: Bench) -> None:
    text = (
        f"FROM busybox AS one\nRUN echo {uuid.uuid4().hex} > /a\n"
        "FROM busybox\nCOPY --from=one /a /a\nRUN cat /a\n"
    )
    bench.build(text)
    built = bench.build(text, None, BuildOptions(no_cache_stages=frozenset({"one"})))
    assert built.cached == 2


def test_build_args_count_at_their_first_run(bench: Bench) -> None:
    text = (
        f"FROM busybox\nLABEL u={uuid.uuid4().hex}\nARG v\nLABEL l=1\nRUN echo a > /a\n"
        "RUN echo b > /b\n"
    )
    bench.build(text, None, BuildOptions(build_args={"v": "1"}))
    assert bench.build(text, None, BuildOptions(build_args={"v": "1"})).cached == 5
    assert bench.build(text, None, BuildOptions(build_args={"v": "2"})).cached == 3


def test_build_args_count_where_env_uses_them(bench: Bench) -> None:
    text = f"FROM scratch\nLABEL u={uuid.uuid4().hex}\nARG v\nENV e=$v\nLABEL l=1\n"
    bench.build(text, None, BuildOptions(build_args={"v": "1"}))
    assert bench.build(text, None, BuildOptions(build_args={"v": "2"})).cached == 2


def test_proxies_do_not_count(bench: Bench) -> None:
    text = f"FROM busybox\nLABEL u={uuid.uuid4().hex}\nRUN echo a > /a\n"
    bench.build(text, None, BuildOptions(build_args={"HTTP_PROXY": "a"}))
    assert bench.build(text, None, BuildOptions(build_args={"HTTP_PROXY": "b"})).cached == 2


def test_shared_between_builds(bench: Bench) -> None:
    start = f"FROM busybox\nRUN echo {uuid.uuid4().hex} > /a\n"
    bench.build(f"{start}RUN echo b > /b\n")
    assert bench.build(f"{start}CMD other\n").cached == 1


def test_a_stage_that_gives_the_same_keeps_what_follows(bench: Bench) -> None:
    text = (
        "FROM busybox AS one\nCOPY src /src\nRUN cut -c1 /src > /out\n"
        f"FROM busybox\nLABEL u={uuid.uuid4().hex}\nCOPY --from=one /out /out\nRUN cat /out > /o\n"
    )
    bench.build(text, {"src": "same-a"})
    built = bench.build(text, {"src": "same-b"})
    assert built.cached == 3, built.text
    assert "Step 7/7 : RUN cat /out > /o\n ---> Using cache" in built.text


def test_bound_context_files_count(bench: Bench) -> None:
    text = f"FROM busybox\nLABEL u={uuid.uuid4().hex}\nRUN --mount=source=d,target=/m cat /m/*\n"
    bench.build(text, {"d/a": "1"})
    assert bench.build(text, {"d/a": "1", "other": "x"}).cached == 2
    assert bench.build(text, {"d/a": "2"}).cached == 1


def test_heredocs_count(bench: Bench) -> None:
    start = f"FROM busybox\nLABEL u={uuid.uuid4().hex}\n"
    bench.build(f"{start}COPY <<E /f\none\nE\n")
    assert bench.build(f"{start}COPY <<E /f\none\nE\n").cached == 2
    assert bench.build(f"{start}COPY <<E /f\ntwo\nE\n").cached == 1


def test_secrets_do_not_count(bench: Bench) -> None:
    text = f"FROM busybox\nLABEL u={uuid.uuid4().hex}\nRUN --mount=type=secret,id=s true\n"
    bench.build(text, None, BuildOptions(secrets={"s": Secret(b"one")}))
    assert bench.build(text, None, BuildOptions(secrets={"s": Secret(b"two")})).cached == 2


def test_another_base_is_a_miss(bench: Bench) -> None:
    unique = uuid.uuid4().hex
    for version in ("1", "2"):
        built = bench.build(f"FROM busybox\nLABEL v={unique}{version}\n")
        bench.images.tag(built.image.id, reference.parse(f"base-{unique}"))
        assert bench.build(f"FROM base-{unique}\nRUN echo a > /a\n").cached == 0


def test_cache_from_looks_only_at_its_images(bench: Bench, dockerfile: str) -> None:
    name = f"from-{uuid.uuid4().hex}"
    files = {"a": "1", "b": "2"}
    first = bench.build(dockerfile, files, BuildOptions(tags=(name,)))
    with_it = bench.build(dockerfile, files, BuildOptions(cache_from=(name,)))
    assert with_it.cached == 6
    assert with_it.image.id == first.image.id
    assert bench.build(dockerfile, files, BuildOptions(cache_from=("no-such",))).cached == 0
    changed = bench.build(dockerfile, {"a": "1", "b": "3"}, BuildOptions(cache_from=(name,)))
    assert changed.cached == 3


def test_cache_from_a_loaded_image(bench: Bench, dockerfile: str) -> None:
    """Only the image is left of the build: its history is the cache."""
    name = f"from-{uuid.uuid4().hex}"
    bench.build(dockerfile, {"a": "1", "b": "2"}, BuildOptions(tags=(name,)))
    CacheUsage(bench.builder, bench.clock).prune(PruneRequest(all=True))
    assert bench.build(dockerfile, {"a": "1", "b": "2"}).cached == 0
    CacheUsage(bench.builder, bench.clock).prune(PruneRequest(all=True))
    built = bench.build(dockerfile, {"a": "1", "b": "2"}, BuildOptions(cache_from=(name,)))
    assert built.cached == 6


def test_layers_stay_with_the_cache_when_the_image_goes(bench: Bench, dockerfile: str) -> None:
    first = bench.build(dockerfile, {"a": "1", "b": "2"})
    bench.images.forget(first.image.id)
    again = bench.build(dockerfile, {"a": "1", "b": "2"})
    assert again.cached == 6
    assert again.image.id == first.image.id


def test_cache_survives_a_restart(bench: Bench, dockerfile: str) -> None:
    first = bench.build(dockerfile, {"a": "1", "b": "2"})
    bench.images.forget(first.image.id)
    bench.builder.recover()
    bench.images.recover()
    assert bench.build(dockerfile, {"a": "1", "b": "2"}).cached == 6


def test_prune_spares_what_images_have(bench: Bench, dockerfile: str) -> None:
    usage = CacheUsage(bench.builder, bench.clock)
    built = bench.build(dockerfile, {"a": "1", "b": "2"})
    usage.prune(PruneRequest())
    assert bench.build(dockerfile, {"a": "1", "b": "2"}).cached == 6
    gone = usage.prune(PruneRequest(all=True))
    assert gone.ids
    assert bench.images.find(built.image.id) is not None
    assert bench.build(dockerfile, {"a": "1", "b": "2"}).cached == 0


def test_prune_by_age(bench: Bench, dockerfile: str) -> None:
    usage = CacheUsage(bench.builder, bench.clock)
    bench.build(dockerfile, {"a": "1", "b": "2"})
    assert usage.prune(PruneRequest(all=True, filters={"until": ["1h"]})).ids == ()
    now = bench.clock.now_ns() // NANOSECONDS + 5
    assert usage.prune(PruneRequest(all=True, filters={"until": [str(now)]})).ids


def test_prune_by_size_goes_by_use(bench: Bench) -> None:
    usage = CacheUsage(bench.builder, bench.clock)
    usage.prune(PruneRequest(all=True))
    texts = [
        f"FROM busybox\nRUN dd if=/dev/urandom of=/{uuid.uuid4().hex} bs=1k count=300 2>&1\n"
        for _ in range(3)
    ]
    for text in texts:
        bench.images.forget(bench.build(text).image.id)
    bench.images.forget(bench.build(texts[0]).image.id)  # used again: the youngest
    gone = usage.prune(PruneRequest(all=True, keep_bytes=700_000))
    assert gone.bytes >= 300_000
    assert bench.build(texts[0]).cached == 1
    assert bench.build(texts[1]).cached == 0


def test_cache_is_shown(bench: Bench, dockerfile: str) -> None:
    bench.build(dockerfile, {"a": "1", "b": "2"})
    shown = CacheUsage(bench.builder, bench.clock).shown()
    texts = [str(entry["Description"]) for entry in shown]
    assert any(text.endswith("echo two > /two") for text in texts)
    assert {"ID", "Type", "Size", "CreatedAt", "UsageCount"} <= set(shown[0])
