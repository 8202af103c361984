"""Pull, push and login against the real distribution registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from tests.support.images import busybox_archive, busybox_rootfs, file, tar_of
from tests.support.registry import PASSWORD, USER, Registry, registry

from lazarette.runtime.images import archive, model
from lazarette.runtime.images.commit import extend
from lazarette.runtime.images.credentials import Credentials, to_header
from lazarette.runtime.images.endpoints import RegistryConfig
from lazarette.runtime.images.errors import (
    LoginFailed,
    ManifestUnknown,
    NoCredentials,
    NoSuchPlatform,
    NoSuchTag,
    PullDenied,
    RegistryFault,
)
from lazarette.runtime.images.model import (
    Descriptor,
    Image,
    Index,
    Manifest,
    Platform,
    RunConfig,
    digest_of,
    encode,
)
from lazarette.runtime.images.progress import Message, discard
from lazarette.runtime.images.reference import parse
from lazarette.runtime.images.registries import Registries
from lazarette.runtime.images.removal import Remover
from lazarette.runtime.images.store import ImageStore

LOGIN = to_header(Credentials(username=USER, password=PASSWORD))


def load(store: ImageStore, *tags: str) -> Image:
    with busybox_archive().open("rb") as stream:
        (image,) = archive.load(store, stream)
    for tag in tags:
        store.tag(image.id, parse(tag))
    return image


async def push(registries: Registries, name: str, auth: str = "") -> list[Message]:
    said: list[Message] = []
    await registries.push(parse(name), auth=auth, platform=None, progress=said.append)
    return said


async def pull(
    registries: Registries, name: str, auth: str = "", platform: Platform | None = None
) -> list[Message]:
    said: list[Message] = []
    await registries.pull(parse(name), auth=auth, platform=platform, progress=said.append)
    return said


def statuses(said: list[Message]) -> list[str]:
    return [message.status for message in said if message.status]


def put(
    registry: Registry, repository: str, data: bytes, media_type: str = "", tag: str = ""
) -> str:
    """Put a blob, or with a media type a manifest, straight into a registry."""
    digest = digest_of(data)
    if media_type:
        url = f"{registry.url}/v2/{repository}/manifests/{tag or digest}"
        headers = {"Content-Type": media_type}
    else:
        begin = urllib.request.Request(
            f"{registry.url}/v2/{repository}/blobs/uploads/", method="POST"
        )
        with urllib.request.urlopen(begin) as answer:
            location = answer.headers["Location"]
        url = f"{location}&digest={digest}"
        headers = {"Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(
        urllib.request.Request(url, data=data, headers=headers, method="PUT")
    ):
        return digest


def put_image(
    registry: Registry,
    repository: str,
    layers: list[bytes],
    pack: Callable[[bytes], bytes] = gzip.compress,
    *,
    architecture: str = "amd64",
    tag: str = "",
) -> tuple[Descriptor, str]:
    """Put an OCI image into a registry; its descriptor and id."""
    diff_ids = [digest_of(layer) for layer in layers]
    config = json.dumps({
        "architecture": architecture, "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }).encode()  # fmt: skip
    packed = [pack(layer) for layer in layers]
    kind = model.OCI_LAYER_ZSTD if pack is zstandard.compress else model.OCI_LAYER_GZIP
    manifest = encode(
        Manifest(
            media_type=model.OCI_MANIFEST,
            config=Descriptor(
                media_type=model.OCI_CONFIG,
                digest=put(registry, repository, config),
                size=len(config),
            ),
            layers=[
                Descriptor(
                    media_type=kind, digest=put(registry, repository, layer), size=len(layer)
                )
                for layer in packed
            ],
        )
    )
    digest = put(registry, repository, manifest, model.OCI_MANIFEST, tag)
    described = Descriptor(
        media_type=model.OCI_MANIFEST,
        digest=digest,
        size=len(manifest),
        platform=Platform(os="linux", architecture=architecture),
    )
    return described, digest_of(config)


async def test_push_then_pull_into_an_empty_store(
    make_store: Callable[..., ImageStore], plain: Registry
) -> None:
    name = f"{plain.host}/a/busybox:1"
    one, two = make_store("one"), make_store("two")
    image = load(one, name)
    said = await push(Registries(one), name)
    assert said[0].status == f"The push refers to repository [{plain.host}/a/busybox]"
    assert {"Preparing", "Pushed"} <= set(statuses(said))
    aux = said[-1].aux
    assert aux is not None and aux["Tag"] == "1"
    assert re.fullmatch(rf"1: digest: {aux['Digest']} size: {aux['Size']}", said[-2].status)

    said = await pull(Registries(two), name)
    short = said[1].id
    assert (said[0].status, said[0].id) == ("Pulling from a/busybox", "1")
    assert [m.status for m in said if m.id == short][:1] == ["Pulling fs layer"]
    for status in ("Verifying Checksum", "Download complete", "Pull complete"):
        assert status in statuses(said)
    assert statuses(said)[-2:] == [
        f"Digest: {aux['Digest']}",
        f"Status: Downloaded newer image for {name}",
    ]
    pulled = two.get(name)
    assert pulled.id == image.id
    assert pulled.digests == (f"{plain.host}/a/busybox@{aux['Digest']}",)
    assert pulled.layer is not None and two.layers.driver.exists(pulled.layer)

    said = await pull(Registries(two), name)
    assert "Already exists" in statuses(said)
    assert statuses(said)[-1] == f"Status: Image is up to date for {name}"
    assert "Layer already exists" in statuses(await push(Registries(one), name))


async def test_a_pulled_image_is_pushed_with_the_manifest_it_came_with(
    make_store: Callable[..., ImageStore], plain: Registry
) -> None:
    store = make_store()
    layers = [busybox_rootfs().read_bytes(), tar_of([file("x", b"y")])]
    described, image_id = put_image(plain, "first", layers, zstandard.compress, tag="v1")
    registries = Registries(store)
    await pull(registries, f"{plain.host}/first:v1")
    image = store.get(f"{plain.host}/first@{described.digest}")
    assert image.id == image_id
    store.tag(image.id, parse(f"{plain.host}/second:v2"))
    said = await push(registries, f"{plain.host}/second:v2")
    assert said[-1].aux is not None and said[-1].aux["Digest"] == described.digest
    assert "Mounted from first" in statuses(said)


async def test_an_index_gives_the_image_of_the_platform(store: ImageStore, plain: Registry) -> None:
    layer = tar_of([file("f", b"amd64")])
    other = tar_of([file("f", b"arm64")])
    amd, amd_id = put_image(plain, "multi", [layer])
    arm, arm_id = put_image(plain, "multi", [other], architecture="arm64")
    index = Index(media_type=model.OCI_INDEX, manifests=[arm, amd])
    digest = put(plain, "multi", encode(index), model.OCI_INDEX, "latest")
    registries = Registries(store)
    name = f"{plain.host}/multi:latest"
    await pull(registries, name, platform=Platform(os="linux", architecture="amd64"))
    assert store.get(name).id == amd_id
    await pull(registries, name, platform=Platform(os="linux", architecture="arm64", variant="v8"))
    assert store.get(name).id == arm_id
    assert store.get(f"{plain.host}/multi@{digest}").id == arm_id
    with pytest.raises(NoSuchPlatform, match="no matching manifest for linux/s390x"):
        await pull(registries, name, platform=Platform(os="linux", architecture="s390x"))
    found = await registries.inspect(parse(name), auth="")
    assert (found.descriptor.digest, found.descriptor.media_type) == (digest, model.OCI_INDEX)
    assert [one.architecture for one in found.platforms] == ["arm64", "amd64"]
    single = await registries.inspect(parse(f"{plain.host}/multi@{amd.digest}"), auth="")
    assert [str(one) for one in single.platforms] == ["linux/amd64"]
    with pytest.raises(NoSuchPlatform, match="does not match the specified platform"):
        await pull(
            registries,
            f"{plain.host}/multi@{amd.digest}",
            platform=Platform(os="linux", architecture="arm64"),
        )


async def test_all_tags_of_a_repository(
    make_store: Callable[..., ImageStore], plain: Registry
) -> None:
    one, two = make_store("one"), make_store("two")
    load(one, f"{plain.host}/r:a", f"{plain.host}/r:b")
    await push(Registries(one), f"{plain.host}/r")
    await pull(Registries(two), f"{plain.host}/r")
    assert {tag for image in two.all() for tag in image.tags} == {
        f"{plain.host}/r:a",
        f"{plain.host}/r:b",
    }


async def test_what_is_not_there(store: ImageStore, plain: Registry) -> None:
    load(store, f"{plain.host}/r:a")
    registries = Registries(store)
    await push(registries, f"{plain.host}/r:a")
    with pytest.raises(ManifestUnknown, match=r"manifest for .*/r:b not found: manifest unknown"):
        await pull(registries, f"{plain.host}/r:b")
    with pytest.raises(ManifestUnknown):
        await pull(registries, f"{plain.host}/r@sha256:{'0' * 64}")
    with pytest.raises((PullDenied, ManifestUnknown)):
        await pull(registries, f"{plain.host}/nowhere:b")
    with pytest.raises(NoSuchTag, match="does not exist locally with the tag"):
        await push(registries, f"{plain.host}/other:a")
    with pytest.raises(RegistryFault, match=r"refused|connect"):
        await pull(registries, "127.0.0.1:1/x:y")


async def test_login_with_htpasswd(tmp_path: Path, store: ImageStore) -> None:
    with registry(tmp_path / "registry", login=True) as locked:
        name = f"{locked.host}/secret:1"
        load(store, name)
        registries = Registries(store)
        with pytest.raises(NoCredentials, match="no basic auth credentials"):
            await push(registries, name)
        for unreadable in ("null", "bnVsbA==", "e30=", "%%%", "!"):
            with pytest.raises(NoCredentials):
                await push(registries, name, unreadable)
        await push(registries, name, LOGIN)
        await pull(registries, name, LOGIN.rstrip("="))
        with pytest.raises(LoginFailed, match="unauthorized"):
            await pull(registries, name, to_header(Credentials(username=USER, password="wrong")))
        good = Credentials(username=USER, password=PASSWORD, serveraddress=f"http://{locked.host}")
        assert await registries.login(good) == ""
        with pytest.raises(LoginFailed, match="unauthorized"):
            await registries.login(
                Credentials(username=USER, password="wrong", serveraddress=locked.host)
            )


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path, store: ImageStore) -> None:
    with registry(tmp_path / "registry", tls=True, login=True) as secure:
        assert secure.authority is not None
        name = f"{secure.host}/x:1"
        load(store, name)
        strict = RegistryConfig(insecure=(), certificates=tmp_path / "certs.d")
        with pytest.raises(RegistryFault, match="certificate"):
            await push(Registries(store, strict), name, LOGIN)
        folder = tmp_path / "certs.d" / secure.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(secure.authority.read_bytes())
        trusting = RegistryConfig(insecure=(), certificates=tmp_path / "certs.d")
        await push(Registries(store, trusting), name, LOGIN)
        await pull(Registries(store, RegistryConfig()), name, LOGIN)  # insecure: loopback


async def test_plain_http_only_where_configured(store: ImageStore, plain: Registry) -> None:
    load(store, f"{plain.host}/x:1")
    with pytest.raises(RegistryFault):
        await push(Registries(store, RegistryConfig(insecure=())), f"{plain.host}/x:1")


async def test_a_mirror_stands_in_for_the_hub(
    make_store: Callable[..., ImageStore], plain: Registry
) -> None:
    one, two = make_store("one"), make_store("two")
    load(one, f"{plain.host}/library/busybox:1.0")
    await push(Registries(one), f"{plain.host}/library/busybox:1.0")
    config = RegistryConfig(mirrors=("http://127.0.0.1:1", plain.url), hub="http://127.0.0.1:1")
    said = await pull(Registries(two, config), "busybox:1.0")
    assert statuses(said)[-1] == "Status: Downloaded newer image for busybox:1.0"
    assert two.get("busybox:1.0").tags == ("busybox:1.0",)
    with pytest.raises(RegistryFault):
        await pull(Registries(two, config), "busybox:2.0")


async def test_a_layer_that_lies_is_never_visible(
    store: ImageStore, plain: Registry, tmp_path: Path
) -> None:
    load(store, f"{plain.host}/x:1")
    await push(Registries(store), f"{plain.host}/x:1")
    layer = store.layers.all()[0]
    (sent,) = store.layers.remembered_blobs(layer.diff_id).values()
    Remover(store).remove(f"{plain.host}/x:1")
    Remover(store).remove("busybox")
    hexa = sent.digest.removeprefix("sha256:")
    stored = plain.root / "data/docker/registry/v2/blobs/sha256" / hexa[:2] / hexa / "data"
    broken = bytearray(stored.read_bytes())
    broken[len(broken) // 2] ^= 1
    stored.write_bytes(broken)
    with pytest.raises(Exception, match="verification failed") as refused:
        await pull(Registries(store), f"{plain.host}/x:1")
    assert type(refused.value).__name__ == "DigestMismatch"
    assert store.all() == [] and store.layers.driver.keys() == []
    assert list(store.blobs.partial.iterdir()) == []


async def test_layers_that_do_not_fit_the_configuration_are_refused(
    store: ImageStore, plain: Registry
) -> None:
    told = tar_of([file("told", b"1")])
    sent = tar_of([file("sent", b"2")])
    layers = iter([gzip.compress(sent)])
    put_image(plain, "liar", [told], lambda _: next(layers), tag="1")
    with pytest.raises(Exception, match="layer unpacks to"):
        await pull(Registries(store), f"{plain.host}/liar:1")
    assert store.all() == [] and store.layers.driver.keys() == []


async def test_a_built_image_keeps_its_digest_over_push_and_pull(
    make_store: Callable[..., ImageStore], plain: Registry
) -> None:
    one, two = make_store("one"), make_store("two")
    base = load(one)
    child = extend(
        one,
        base,
        config=RunConfig(cmd=["true"]),
        created_by="test",
        layer=io.BytesIO(tar_of([file("big", hashlib.sha256(b"x").digest() * 100_000)])),
    )
    name = f"{plain.host}/built:1"
    one.tag(child.id, parse(name))
    first = await push(Registries(one), name)
    await pull(Registries(two), name)
    assert two.get(name).id == child.id
    second = await push(Registries(two), name)
    assert first[-1].aux == second[-1].aux
    await Registries(one).pull(parse(name), auth="", platform=None, progress=discard)
    assert one.get(name).id == child.id
