"""Who may be removed: the Engine's conflict rules, texts and records; lists and filters."""

from __future__ import annotations

import io
import re

import pytest
from tests.support.images import file, tar_of

from lazarette.runtime.images import listing
from lazarette.runtime.images.commit import extend
from lazarette.runtime.images.errors import ImageConflict
from lazarette.runtime.images.model import Image, RunConfig
from lazarette.runtime.images.reference import parse
from lazarette.runtime.images.removal import Removed, Remover
from lazarette.runtime.images.store import ImageStore, ImageUse
from lazarette.storage.clock import FakeClock
from lazarette.storage.errors import InvalidArgument


def make(store: ImageStore, name: str, base: Image | None = None, **labels: str) -> Image:
    image = extend(
        store,
        base,
        config=RunConfig(labels=labels or None),
        created_by=f"make {name}",
        layer=io.BytesIO(tar_of([file(name.replace("/", "-") or "none", name.encode())])),
    )
    if name and not name.startswith("untagged"):
        store.tag(image.id, parse(name))
    assert isinstance(store.clock, FakeClock)
    store.clock.advance(60)
    return store.get(image.id)


def use(store: ImageStore, image: Image, *, running: bool) -> None:
    store.users = lambda id_: [ImageUse("c" * 64, running)] if id_ == image.id else []


def names(store: ImageStore, **filters: list[str]) -> list[str]:
    found = listing.summaries(store, {key.replace("_", "!"): v for key, v in filters.items()})
    return [(one.repo_tags or ["<none>"])[0] for one in found]


def test_the_last_name_takes_the_image_with_it(store: ImageStore) -> None:
    image = make(store, "a:1")
    store.tag(image.id, parse("a:2"))
    remover = Remover(store)
    assert remover.remove("a:1") == [Removed(untagged="a:1")]
    assert remover.remove("a:2") == [
        Removed(untagged="a:2"),
        Removed(deleted=image.id),
        Removed(deleted=image.chain[0]),
    ]


def test_digests_of_a_repository_go_with_its_last_tag(store: ImageStore) -> None:
    image = make(store, "a:1")
    digest = "a@sha256:" + "2" * 64
    store.tag(image.id, parse(digest))
    done = Remover(store).remove("a:1")
    assert done[:3] == [
        Removed(untagged="a:1"),
        Removed(untagged=digest),
        Removed(deleted=image.id),
    ]


def test_by_id_with_one_repository_and_with_several(store: ImageStore) -> None:
    image = make(store, "a:1")
    store.tag(image.id, parse("b:1"))
    said = f"conflict: unable to delete {image.short_id} (must be forced) - "
    with pytest.raises(ImageConflict) as refused:
        Remover(store).remove(image.id)
    assert refused.value.message == said + "image is referenced in multiple repositories"
    done = Remover(store).remove(image.short_id, force=True)
    assert [one.untagged for one in done if one.untagged] == ["a:1", "b:1"]
    assert store.all() == []


def test_a_running_container_holds_hard(store: ImageStore) -> None:
    image = make(store, "a:1")
    use(store, image, running=True)
    said = f"(cannot be forced) - image is being used by running container {'c' * 12}"
    with pytest.raises(ImageConflict, match=re.escape(said)):
        Remover(store).remove(image.id, force=True)
    with pytest.raises(ImageConflict, match=re.escape('"a:1" (must force) - container cccc')):
        Remover(store).remove("a:1")
    # Forced by name, the name goes and the image stays.
    assert Remover(store).remove("a:1", force=True) == [Removed(untagged="a:1")]
    assert store.get(image.id).tags == ()


def test_a_stopped_container_gives_way_to_force(store: ImageStore) -> None:
    image = make(store, "a:1")
    use(store, image, running=False)
    said = f"(must be forced) - image is being used by stopped container {'c' * 12}"
    with pytest.raises(ImageConflict, match=re.escape(said)):
        Remover(store).remove(image.id)
    assert Removed(deleted=image.id) in Remover(store).remove(image.id, force=True)


def test_children_hold_hard_and_untagged_parents_go_along(store: ImageStore) -> None:
    base = make(store, "untagged1")
    middle = make(store, "untagged2", base)
    top = make(store, "top:1", middle)
    with pytest.raises(ImageConflict, match=r"\(cannot be forced\) - image has dependent child"):
        Remover(store).remove(base.id, force=True)
    deleted = [one.deleted for one in Remover(store).remove("top:1") if one.deleted]
    assert [one for one in deleted if one in (top.id, middle.id, base.id)] == [
        top.id,
        middle.id,
        base.id,
    ]
    assert store.all() == [] and store.layers.driver.keys() == []


def test_noprune_keeps_the_parent(store: ImageStore) -> None:
    base = make(store, "untagged")
    make(store, "top:1", base)
    Remover(store).remove("top:1", prune=False)
    assert [image.id for image in store.all()] == [base.id]


def test_prune_takes_dangling_images_unless_used(store: ImageStore) -> None:
    make(store, "kept:1")
    loose, used = make(store, "untagged1"), make(store, "untagged2")
    use(store, used, running=False)
    done, freed = Remover(store).prune(lambda _: True, dangling=True)
    assert [one.deleted for one in done if one.deleted in (loose.id, used.id)] == [loose.id]
    assert freed == loose.size
    done, _ = Remover(store).prune(lambda _: True, dangling=False)
    assert Removed(untagged="kept:1") in done
    assert [image.id for image in store.all()] == [used.id]


def test_lists_newest_first_and_filters(store: ImageStore) -> None:
    make(store, "one:1", a="b")
    two = make(store, "reg.io/x/two:2", a="c")
    make(store, "untagged", two)
    make(store, "three:3")
    every = ["three:3", "<none>", "reg.io/x/two:2", "one:1"]
    assert names(store) == every
    assert names(store, dangling=["true"]) == ["<none>"]
    assert names(store, dangling=["false"]) == ["three:3", "reg.io/x/two:2", "one:1"]
    assert names(store, label=["a"]) == ["reg.io/x/two:2", "one:1"]
    assert names(store, label=["a=b"]) == ["one:1"]
    assert names(store, before=["reg.io/x/two:2"]) == ["one:1"]
    assert names(store, since=["reg.io/x/two:2"]) == ["three:3", "<none>"]
    assert names(store, reference=["one"]) == ["one:1"]
    assert names(store, reference=["*:3", "one:*"]) == ["three:3", "one:1"]
    assert names(store, reference=["reg.io/*/two"]) == ["reg.io/x/two:2"]
    assert names(store, until=["2m30s"]) == ["reg.io/x/two:2", "one:1"]
    with pytest.raises(InvalidArgument):
        names(store, until=["1m", "2m"])
    with pytest.raises(InvalidArgument):
        names(store, dangling=["perhaps"])


def test_untagged_parents_are_hidden_unless_all(store: ImageStore) -> None:
    base = make(store, "untagged")
    make(store, "top:1", base)
    assert names(store) == ["top:1"]
    assert len(listing.summaries(store, {}, everything=True)) == 2
    shared = listing.summaries(store, {}, everything=True, shared_size=True)
    assert {one.shared_size for one in shared} == {base.size}


def test_a_tag_moves_and_leaves_the_old_image_untagged(store: ImageStore) -> None:
    old, new = make(store, "a:1"), make(store, "b:1")
    store.tag(new.id, parse("a:1"))
    assert store.get(old.id).tags == ()
    assert store.get("a:1").id == new.id
