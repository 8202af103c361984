from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarette.backup.repository import keys, kit
from lazarette.backup.repository.kit import RecoveryKit, WrongRecoveryKit
from lazarette.backup.stores.local import LocalStore
from lazarette.storage.clock import FakeClock

URL = "s3://backups/host-a?endpoint=https://s3.example.net"
kits = st.builds(
    RecoveryKit,
    st.sampled_from([URL, "file:///mnt/backup disk/repo", "s3://b/ü"]),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=20, max_size=20),
    st.just("2026-11-25T10:04:30Z"),
)


@given(kits)
def test_text_and_code_read_back(made: RecoveryKit) -> None:
    assert kit.parse(made.text()) == made
    assert kit.parse(made.uri()) == made


@given(kits)
def test_reading_forgives_how_people_type(made: RecoveryKit) -> None:
    lines = [
        line.lower().replace("-", " ").replace("0", "o").replace("1", "l")
        if line.startswith("key")
        else line
        for line in made.text().splitlines()
    ]
    lines = [line.replace("key l", "key 1") for line in lines]
    assert kit.parse("\r\n\n".join(lines)).secret == made.secret


@given(kits, st.integers(0, 1), st.integers(0, 18), st.sampled_from(kit._ALPHABET))
def test_a_wrong_character_is_found_with_its_line(
    made: RecoveryKit, number: int, place: int, symbol: str
) -> None:
    lines = made.text().splitlines()
    row = 4 + number
    start = len("key 1       ")
    typed = lines[row]
    if typed[start + place] in "- " or typed[start + place] == symbol:
        return
    lines[row] = typed[: start + place] + symbol + typed[start + place + 1 :]
    try:
        read = kit.parse("\n".join(lines))
    except WrongRecoveryKit as wrong:
        assert wrong.exit_code == 41
        assert f"key {number + 1}" in wrong.message or "belong together" in wrong.message
    else:
        pytest.fail(f"read as {read}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("key 2", "kez 2"), "no line 'key 2'"),
        (lambda text: text.replace(URL, URL + "x"), "belong together"),
        (lambda text: text.replace("id  ", "xd  "), "line 'id'"),
        (lambda text: text.replace("repository ", "repo "), "'repository'"),
        (lambda text: text.replace("check  ", "check U"), "a character no kit has"),
        (lambda text: text[: text.index("key 2") + 20], "characters instead of"),
        (lambda text: "", "no line 'key 1'"),
        (lambda text: "lazarette:kit9?x=1", "version"),
        (lambda text: "lazarette:kit1?key=AAAA", "whole key"),
    ],
)
def test_what_is_wrong_is_said(change, said: str) -> None:  # type: ignore[no-untyped-def]
    made = RecoveryKit(URL, b"r" * 16, b"s" * 20, "2026-11-25T10:04:30Z")
    with pytest.raises(WrongRecoveryKit) as wrong:
        kit.parse(change(made.text()))
    assert said in wrong.value.message


def test_codes_are_drawn() -> None:
    made = kit.make(URL, b"r" * 16, clock=FakeClock())
    assert ElementTree.fromstring(made.qr_svg()).tag.endswith("svg")
    assert made.qr_terminal().count("\n") > 10
    assert made.made == "2023-11-14T22:13:20Z"
    assert made.secret.hex() not in repr(made)


def test_a_kit_opens_its_repository(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    file = keys.KeyFile.generate()
    made = keys.create(store, [file])
    paper = kit.make(store.url, made.repository_id)
    keys.add(store, made, paper.key, label="paper")
    typed = kit.parse(paper.text())
    assert keys.unlock(store, typed.key).data_key() == made.data_key()
    store.close()
