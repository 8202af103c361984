"""The store, load, save, import and commit on real layers (semantics I1-I5)."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from tests.support.images import busybox_archive, busybox_rootfs, file, folder, link, tar_of

from lazarette.runtime.images import archive, listing, save
from lazarette.runtime.images.commit import commit, extend, import_tar
from lazarette.runtime.images.compression import UnpackLimits
from lazarette.runtime.images.errors import BadArchive, DigestMismatch, ImageNotFound
from lazarette.runtime.images.model import Image, RunConfig
from lazarette.runtime.images.progress import Message
from lazarette.runtime.images.reference import parse
from lazarette.runtime.images.removal import Remover
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.errors import InvalidArgument, LazaretteError


def load(store: ImageStore, path: Path) -> list[Image]:
    with path.open("rb") as stream:
        return archive.load(store, stream)


def saved(store: ImageStore, *refs: str) -> bytes:
    target = io.BytesIO()
    save.save(store, refs, target)
    return target.getvalue()


def blobs(tmp_path: Path) -> list[str]:
    return sorted(one.name for one in (tmp_path / "images" / "sha256").iterdir())


def add_layer(store: ImageStore, base: Image | None, tar: bytes) -> Image:
    return extend(store, base, config=RunConfig(), created_by="step", layer=io.BytesIO(tar))


def test_loads_an_archive_and_unpacks_it_once(store: ImageStore) -> None:
    said: list[Message] = []
    with busybox_archive().open("rb") as stream:
        (image,) = archive.load(store, stream, progress=said.append)
    assert image.tags == ("busybox:latest",)
    assert said[-1].stream == "Loaded image: busybox:latest\n"
    assert image.layer is not None
    root = store.layers.driver.mount(image.layer)
    try:
        assert (root / "bin/busybox").stat().st_size == Path("/bin/busybox").stat().st_size
    finally:
        store.layers.driver.unmount(image.layer)
    keys = store.layers.driver.keys()
    assert load(store, busybox_archive())[0].id == image.id
    assert store.layers.driver.keys() == keys


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_the_archive_itself_may_be_compressed(
    store: ImageStore, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(busybox_archive().read_bytes())
    assert archive.load(store, io.BytesIO(packed))[0].tags == ("busybox:latest",)


def test_found_by_id_prefix_name_and_digest(store: ImageStore) -> None:
    (image,) = load(store, busybox_archive())
    digest = "sha256:" + "1" * 64
    store.tag(image.id, parse(f"busybox@{digest}"))
    ids = (image.id, image.id[7:], image.id[7:19])
    names = ("busybox", "docker.io/library/busybox:latest", f"busybox@{digest}")
    for ref in (*ids, *names, f"busybox:any@{digest}"):
        assert store.get(ref).id == image.id, ref
    with pytest.raises(ImageNotFound, match=r"^No such image: absent:latest$"):
        store.get("absent")
    with pytest.raises(ImageNotFound, match=r"^No such image: reg:5000/a/b:c$"):
        store.get("reg:5000/a/b:c")
    with pytest.raises(InvalidArgument):
        store.get("UPPER")


def test_save_and_load_keep_every_digest(store: ImageStore, tmp_path: Path) -> None:
    (base,) = load(store, busybox_archive())
    child = add_layer(store, base, tar_of([file("hello", b"hi")]))
    store.tag(child.id, parse("me/child:v1"))
    store.tag(child.id, parse("me/child:v2"))
    packed = saved(store, "me/child", base.id)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    for ref in (child.id, base.id):
        Remover(store).remove(ref, force=True)
    assert store.all() == [] and blobs(tmp_path) == [] and store.layers.driver.keys() == []
    images = {image.id: image for image in archive.load(store, io.BytesIO(packed))}
    assert images[child.id].tags == ("me/child:v1", "me/child:v2")
    assert images[base.id].tags == ()


def test_an_oci_layout_without_a_docker_manifest_loads_too(store: ImageStore) -> None:
    (image,) = load(store, busybox_archive())
    packed = saved(store, "busybox")
    with tarfile.open(fileobj=io.BytesIO(packed)) as old:
        layout = tar_of(
            (member, old.extractfile(member).read() if member.isfile() else b"")  # type: ignore[union-attr]
            for member in old
            if member.name != "manifest.json"
        )
    Remover(store).remove("busybox")
    (again,) = archive.load(store, io.BytesIO(layout))
    assert (again.id, again.tags) == (image.id, ("busybox:latest",))


def test_an_old_archive_with_linked_layers_loads(store: ImageStore) -> None:
    (image,) = load(store, busybox_archive())
    config = store.blobs.read(image.id)
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["old:1"], "Layers": ["b/layer.tar"]}])
    packed = tar_of([
        folder("a"), folder("b"), file("a/VERSION", b"1.0"),
        file("a/layer.tar", busybox_rootfs().read_bytes()),
        link("b/layer.tar", "../a/layer.tar"),
        file("c.json", config), file("manifest.json", manifest.encode()),
    ])  # fmt: skip
    assert archive.load(store, io.BytesIO(packed))[0].id == image.id


def test_import_with_changes_and_history(store: ImageStore) -> None:
    with busybox_rootfs().open("rb") as stream:
        image = import_tar(store, stream, changes=["CMD sh", "LABEL a=b"], message="from here")
    assert image.config.run.cmd == ["/bin/sh", "-c", "sh"]
    (line,) = listing.history(store, image.id)
    assert (line.comment, line.size) == ("from here", image.size)
    assert listing.inspect(store, image.id, (1, 50)).config["Labels"] == {"a": "b"}


def test_commit_of_a_container(store: ImageStore) -> None:
    (base,) = load(store, busybox_archive())
    driver = store.layers.driver
    driver.prepare("c1", base.layer)
    root = driver.mount("c1")
    (root / "new").write_bytes(b"file")
    (root / "bin/ls").unlink()
    driver.unmount("c1")
    image = commit(store, layer_key="c1", base=base, config=RunConfig(cmd=["top"]), comment="x",
                   changes=["USER nobody"])  # fmt: skip
    assert (image.parent, image.config.run.user, image.config.run.cmd) == (
        base.id,
        "nobody",
        ["top"],
    )
    assert image.layer is not None
    merged = driver.mount(image.layer)
    try:
        assert (merged / "new").read_bytes() == b"file"
        assert not (merged / "bin/ls").is_symlink() and (merged / "bin/cat").is_symlink()
    finally:
        driver.unmount(image.layer)
    driver.remove("c1")


def test_commit_without_changes_adds_no_layer(store: ImageStore) -> None:
    (base,) = load(store, busybox_archive())
    store.layers.driver.prepare("c1", base.layer)
    image = commit(store, layer_key="c1", base=base, config=RunConfig(cmd=["top"]))
    assert image.chain == base.chain
    assert [line.size for line in listing.history(store, image.id)] == [0, base.size]
    store.layers.driver.remove("c1")


def test_a26_a_folder_deleted_and_made_again_stays_empty(store: ImageStore) -> None:
    (base,) = load(store, busybox_archive())
    driver = store.layers.driver

    def step(key: str, on: Image, work: Callable[[Path], None]) -> Image:
        driver.prepare(key, on.layer)
        work(driver.mount(key))
        driver.unmount(key)
        image = commit(store, layer_key=key, base=on, config=RunConfig())
        driver.remove(key)
        return image

    def make(root: Path) -> None:
        (root / "d1/d2").mkdir(parents=True)
        (root / "d1/d2/foo").touch()

    def remove(root: Path) -> None:
        (root / "d1/d2/foo").unlink()
        (root / "d1/d2").rmdir()
        (root / "d1").rmdir()

    def again(root: Path) -> None:
        (root / "d1/d2").mkdir(parents=True)

    def both(root: Path) -> None:
        remove(root)
        again(root)

    one = step("s1", base, make)
    three = step("s3", step("s2", one, remove), again)
    merged = step("s4", one, both)
    for image in (three, merged):
        store.tag(image.id, parse("case:a26"))
        packed = saved(store, "case:a26")
        (loaded,) = archive.load(store, io.BytesIO(packed))
        assert loaded.layer is not None
        root = driver.mount(loaded.layer)
        try:
            assert list((root / "d1/d2").iterdir()) == []
        finally:
            driver.unmount(loaded.layer)


def test_nothing_of_a_broken_archive_stays(store: ImageStore, tmp_path: Path) -> None:
    whole = busybox_archive().read_bytes()
    with pytest.raises(BadArchive):
        archive.load(store, io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(LazaretteError):
        archive.load(store, io.BytesIO(b"not an archive"))
    with pytest.raises(BadArchive, match="neither"):
        archive.load(store, io.BytesIO(busybox_rootfs().read_bytes()))
    broken = whole.replace(b"root:x:0:0:root", b"root:x:0:0:evil")
    assert broken != whole
    with pytest.raises(DigestMismatch):
        archive.load(store, io.BytesIO(broken))
    assert store.all() == [] and blobs(tmp_path) == [] and store.layers.driver.keys() == []


@pytest.mark.parametrize(
    "hostile",
    [
        [file("../../escape", b"x")],
        [link("out", "/"), file("out/tmp/laz-images-escape", b"x")],
        [link("passwd", "../../../../../../etc/passwd", b"1")],
        [file(".wh..wh.x", b"")],
    ],
    ids=["dotdot", "through a link", "hard link out", "whiteout of a whiteout"],
)
def test_hostile_layers_do_not_leave_their_layer(
    store: ImageStore, hostile: list[tarfile.TarInfo], tmp_path: Path
) -> None:
    try:
        image = import_tar(store, io.BytesIO(tar_of(hostile)))
    except InvalidArgument:
        assert store.layers.driver.keys() == [] and blobs(tmp_path) == []
    else:
        Remover(store).remove(image.id)
    assert not Path("/tmp/laz-images-escape").exists()
    assert not (tmp_path / "escape").exists() and not (tmp_path.parent / "escape").exists()


def test_a_member_that_climbs_out_of_the_archive_is_refused(store: ImageStore) -> None:
    packed = tar_of([file("../manifest.json", b"[]")])
    with pytest.raises(BadArchive, match="leads out"):
        archive.load(store, io.BytesIO(packed))


def test_a_layer_bomb_is_refused_and_leaves_nothing(
    reopen: Callable[..., ImageStore], tmp_path: Path
) -> None:
    store = reopen(UnpackLimits(ratio=100, ratio_from=1 << 20))
    bomb = gzip.compress(tar_of([file("zeros", bytes(16 << 20))]))
    with pytest.raises(BadArchive, match="times its size"):
        import_tar(store, io.BytesIO(bomb))
    assert store.layers.driver.keys() == [] and blobs(tmp_path) == []


def test_a_restart_keeps_images_and_clears_leftovers(
    reopen: Callable[[], ImageStore], tmp_path: Path
) -> None:
    store = reopen()
    (image,) = load(store, busybox_archive())
    with store.working():  # a pull that dies here
        left = store.blobs.put_layer(io.BytesIO(tar_of([file("a", b"b")])))
        store.layers.add(None, left, left.diff_id)
        (tmp_path / "images/ingest/half").write_bytes(b"half a blob")
        store = reopen()
        assert [one.id for one in store.all()] == [image.id]
        assert store.layers.driver.keys() == [image.layer]
        assert not (tmp_path / "images/ingest/half").exists()
        assert len(blobs(tmp_path)) == 2


def test_an_image_whose_layer_is_lost_is_not_shown(reopen: Callable[[], ImageStore]) -> None:
    store = reopen()
    (image,) = load(store, busybox_archive())
    assert image.layer is not None
    store.layers.driver.remove(image.layer)
    store = reopen()
    assert store.all() == []
    assert load(store, busybox_archive())[0].id == image.id


def test_nothing_is_collected_while_something_is_added(store: ImageStore) -> None:
    (image,) = load(store, busybox_archive())
    with store.working():
        Remover(store).remove("busybox")
        assert store.layers.driver.keys() == [image.layer]
    assert store.layers.driver.keys() == []


def test_a_layer_under_a_container_stays_until_it_goes(store: ImageStore) -> None:
    (image,) = load(store, busybox_archive())
    store.layers.driver.prepare("c1", image.layer)
    Remover(store).remove("busybox", force=True)
    assert store.layers.driver.exists(image.layer or "")
    store.layers.driver.remove("c1")
    assert store.collect() == list(image.chain)


def sparse(size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    """A layer with one sparse file in the form of GNU tar's PAX 1.0."""
    entry = tarfile.TarInfo("GNUSparseFile.0/holes")
    entry.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "holes",
        "GNU.sparse.realsize": str(size),
    }
    numbers = [len(pieces), *(n for at, data in pieces for n in (at, len(data)))]
    table = "".join(f"{number}\n" for number in numbers).encode()
    table += bytes(-len(table) % tarfile.BLOCKSIZE)
    return tar_of([(entry, table + b"".join(data for _, data in pieces))])


def test_a_sparse_file_keeps_its_holes(store: ImageStore) -> None:
    layer = sparse(1 << 40, [(4096, b"a" * 4096), ((1 << 39) + 512, b"b" * 512)])
    image = import_tar(store, io.BytesIO(layer))
    root = store.layers.driver.mount(image.layer or "")
    try:
        found = root / "holes"
        assert found.stat().st_size == 1 << 40
        assert found.stat().st_blocks * 512 < 64 * 1024
        with found.open("rb") as opened:
            opened.seek(4095)
            assert opened.read(4098) == b"\0" + b"a" * 4096 + b"\0"
            opened.seek((1 << 39) + 511)
            assert opened.read(514) == b"\0" + b"b" * 512 + b"\0"
    finally:
        store.layers.driver.unmount(image.layer or "")


def test_a_sparse_bomb_is_refused_at_once(store: ImageStore) -> None:
    with pytest.raises(InvalidArgument, match="claims"):
        import_tar(store, io.BytesIO(sparse(1 << 62, [(0, b"x" * 512)])))
    for offset in (1 << 40, 1 << 62, -512):
        with pytest.raises(InvalidArgument, match="outside its size"):
            import_tar(store, io.BytesIO(sparse(4096, [(offset, b"x" * 512)])))
    assert store.layers.driver.keys() == []
