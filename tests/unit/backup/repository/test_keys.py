from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lazarette.backup.repository import keys
from lazarette.backup.repository.keys import KeyFile, KitSecret, Passphrase, PassphraseCost
from lazarette.backup.stores.local import LocalStore
from lazarette.storage.clock import FakeClock
from lazarette.storage.errors import Conflict, InvalidArgument, NotFound

CHEAP = PassphraseCost(memory_kib=64, passes=1, lanes=1)
PASSPHRASE = Passphrase("correct horse")
KIT = KitSecret(b"k" * 20)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore(str(tmp_path))
    yield opened
    opened.close()


def test_every_secret_opens_the_same_keys(store: LocalStore) -> None:
    file = KeyFile.generate()
    made = keys.create(store, [PASSPHRASE, file, KIT], cost=CHEAP)
    for secret in (PASSPHRASE, file, KIT):
        opened = keys.unlock(store, secret)
        assert opened.repository_id == made.repository_id
        assert opened.chunk_id_key == made.chunk_id_key
        assert opened.data_key() == made.data_key()
    subkeys = {made.chunk_id_key, made.index_key, made.data_key(), made.metadata_key()}
    assert len(subkeys) == 4
    assert {len(subkey) for subkey in subkeys} == {32}


@pytest.mark.parametrize(
    "cost",
    [CHEAP, PassphraseCost("scrypt", memory_kib=64, passes=1, lanes=1)],
    ids=lambda c: c.name,
)
def test_a_wrong_passphrase_opens_nothing(store: LocalStore, cost: PassphraseCost) -> None:
    keys.create(store, [PASSPHRASE], cost=cost)
    assert keys.unlock(store, PASSPHRASE).can_read
    with pytest.raises(keys.WrongKey) as wrong:
        keys.unlock(store, Passphrase("Correct horse"))
    assert wrong.value.exit_code == 40
    with pytest.raises(keys.WrongKey):
        keys.unlock(store, KIT)


def test_an_empty_store_has_no_keys(store: LocalStore) -> None:
    with pytest.raises(keys.NoKeys):
        keys.unlock(store, PASSPHRASE)
    with pytest.raises(InvalidArgument):
        keys.create(store, [])
    with pytest.raises(InvalidArgument):
        keys.create(store, [Passphrase("")])


def test_a_second_repository_is_refused(store: LocalStore) -> None:
    keys.create(store, [KIT])
    with pytest.raises(Conflict):
        keys.create(store, [KIT])


def test_keys_are_added_and_removed(store: LocalStore) -> None:
    clock = FakeClock()
    made = keys.create(store, [PASSPHRASE], cost=CHEAP, clock=clock)
    clock.advance(1)
    added = keys.add(store, made, KIT, label="safe", clock=clock)
    first, second = keys.listing(store)
    assert second == added
    assert (first.kind, second.kind, second.label) == ("passphrase", "kit", "safe")
    keys.remove(store, first.id[:8])
    with pytest.raises(keys.WrongKey):
        keys.unlock(store, PASSPHRASE)
    with pytest.raises(keys.LastKey):
        keys.remove(store, second.id)
    with pytest.raises(NotFound):
        keys.remove(store, "ffff")
    assert keys.unlock(store, KIT).data_key() == made.data_key()


def test_rotation_keeps_old_data_readable_and_drops_old_secrets(store: LocalStore) -> None:
    made = keys.create(store, [PASSPHRASE, KIT], cost=CHEAP)
    fresh = KeyFile.generate()
    rotated = keys.rotate(store, made, [fresh])
    opened = keys.unlock(store, fresh)
    assert (opened.epoch, rotated.epoch) == (1, 1)
    assert opened.data_key(0) == made.data_key()
    assert opened.data_key() == rotated.data_key() != made.data_key()
    assert opened.chunk_id_key == made.chunk_id_key
    assert opened.index_key == made.index_key
    for secret in (PASSPHRASE, KIT):
        with pytest.raises(keys.WrongKey):
            keys.unlock(store, secret)
    with pytest.raises(keys.DamagedKey):
        opened.data_key(2)


def test_a_writer_seals_what_only_a_reader_opens(store: LocalStore) -> None:
    reader = keys.create(store, [PASSPHRASE], cost=CHEAP)
    host = KeyFile.generate()
    keys.add(store, reader.for_writer(), host, label="host-a")
    writer = keys.unlock(store, host)
    assert not writer.can_read
    assert writer.chunk_id_key == reader.chunk_id_key
    assert writer.index_key == reader.index_key
    for forbidden in (writer.data_key, writer.metadata_key):
        with pytest.raises(keys.CannotRead):
            forbidden()
    key, envelope = writer.seal_pack_key()
    assert AESGCM(key)
    assert reader.open_pack_key(envelope) == key
    with pytest.raises(keys.CannotRead):
        writer.open_pack_key(envelope)
    for place in (0, 40):
        bent = bytearray(envelope)
        bent[place] ^= 1
        with pytest.raises(keys.DamagedKey):
            reader.open_pack_key(bytes(bent))
    with pytest.raises(keys.DamagedKey):
        reader.open_pack_key(envelope[:30])
    reading = next(info for info in keys.listing(store) if not info.writer)
    with pytest.raises(keys.LastKey):
        keys.remove(store, reading.id)


def test_damage_is_told_from_a_wrong_secret(store: LocalStore) -> None:
    keys.create(store, [KIT])
    [info] = keys.listing(store)
    name = keys.PREFIX + info.id
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(keys.DamagedKey):
        keys.unlock(store, KIT)
    assert keys.listing(store) == []


def test_a_key_object_cannot_ask_for_absurd_work(store: LocalStore) -> None:
    keys.create(store, [KIT])
    absurd = PassphraseCost(memory_kib=1 << 40)
    made = keys.unlock(store, KIT)
    with pytest.raises(keys.DamagedKey):
        keys.add(store, made, PASSPHRASE, cost=absurd)


def test_secrets_never_show(store: LocalStore) -> None:
    file = KeyFile(b"s" * 32)
    made = keys.create(store, [file])
    for shown in (repr(PASSPHRASE), repr(file), repr(KIT), repr(made)):
        assert "horse" not in shown
        assert "sss" not in shown
        assert "kkk" not in shown


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    file = KeyFile.generate()
    file.write(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyFile.read(str(path)) == file
    with pytest.raises(Conflict):
        file.write(str(path))
    with pytest.raises(NotFound):
        KeyFile.read(str(tmp_path / "none"))
    for wrong in (b"", b"hello", path.read_bytes()[:-3], b"\xff" * 100):
        path.write_bytes(wrong)
        with pytest.raises(InvalidArgument):
            KeyFile.read(str(path))
