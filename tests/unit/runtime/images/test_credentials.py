"""Logins in headers and in the user's ``config.json``, with and without helpers."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest

from lazarette.runtime.images.credentials import (
    HUB_KEY,
    Credentials,
    DockerConfig,
    from_config_header,
    from_header,
    host_of,
    to_header,
)
from lazarette.storage.errors import InternalError

LOGIN = Credentials(username="u", password="p?>~", serveraddress="reg.io")

# A helper as docker-credential-pass is one: keeps logins in a file beside it.
HELPER = r"""#!/usr/bin/env python3
import json, pathlib, sys
kept = pathlib.Path(__file__).with_suffix(".json")
logins = json.loads(kept.read_text()) if kept.exists() else {}
said = sys.stdin.read()
if sys.argv[1] == "store":
    told = json.loads(said)
    logins[told["ServerURL"]] = told
elif sys.argv[1] == "erase":
    logins.pop(said, None)
elif said in logins:
    print(json.dumps(logins[said]))
elif said == "broken":
    sys.exit("cannot")
else:
    print("credentials not found in native keychain")
    sys.exit(1)
kept.write_text(json.dumps(logins))
"""


@pytest.fixture
def config(tmp_path: Path) -> DockerConfig:
    return DockerConfig(tmp_path / "docker")


def written(tmp_path: Path) -> dict[str, object]:
    found = json.loads((tmp_path / "docker/config.json").read_text())
    assert isinstance(found, dict)
    return found


def test_headers_are_read_padded_or_not_in_either_alphabet() -> None:
    header = to_header(LOGIN)
    for text in (header, header.rstrip("="), header.replace("-", "+").replace("_", "/")):
        assert from_header(text) == LOGIN
    old = base64.b64encode(b'{"auth": "' + base64.b64encode(b"a:b:c") + b'"}').decode()
    assert (from_header(old).username, from_header(old).password) == ("a", "b:c")


@pytest.mark.parametrize("text", ["", "null", "bnVsbA==", "e30=", "{}", "%%%", "AAAA", "W10=", "é"])
def test_what_cannot_be_read_is_no_login(text: str) -> None:
    assert not from_header(text)
    assert from_config_header(text) == {}


def test_one_bad_entry_of_a_config_header_does_not_spoil_the_rest() -> None:
    told = {"https://reg.io/v1/": {"username": "u"}, "bad": 5, HUB_KEY: {"auth": "dTpw"}}
    found = from_config_header(base64.urlsafe_b64encode(json.dumps(told).encode()).decode())
    assert found["reg.io"].username == "u"
    assert found["docker.io"].password == "p"
    assert "bad" not in found


def test_a_login_does_not_show_its_secret() -> None:
    assert "p?>~" not in repr(LOGIN) and "p?>~" not in str(LOGIN)


@pytest.mark.parametrize(
    ("server", "host"),
    [
        ("", "docker.io"),
        (HUB_KEY, "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("https://reg.io:5000/v2/", "reg.io:5000"),
        ("localhost:5000", "localhost:5000"),
    ],
)
def test_servers_by_host(server: str, host: str) -> None:
    assert host_of(server) == host


def test_the_file_keeps_what_it_does_not_know(config: DockerConfig, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    before = {"psFormat": "x", "auths": {"https://other.io/v1/": {"auth": "dTpw"}}}
    (tmp_path / "docker/config.json").write_text(json.dumps(before))
    config.store("https://reg.io", LOGIN)
    found = written(tmp_path)
    assert found["psFormat"] == "x"
    assert set(found["auths"]) == {"https://other.io/v1/", "reg.io"}  # type: ignore[call-overload]
    mode = (tmp_path / "docker/config.json").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert config.get("reg.io").password == "p?>~"
    assert config.get("other.io").username == "u"
    assert config.erase("reg.io") and not config.erase("reg.io")
    assert not config.get("reg.io") and config.get("other.io")


def test_the_hub_has_its_old_key(config: DockerConfig, tmp_path: Path) -> None:
    config.store("", Credentials(username="u", identitytoken="t"))
    assert set(written(tmp_path)["auths"]) == {HUB_KEY}  # type: ignore[call-overload]
    assert config.get("docker.io").identitytoken == "t"


def test_a_broken_file_is_told_and_kept(config: DockerConfig, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text("{")
    with pytest.raises(InternalError, match="cannot be read"):
        config.get("reg.io")
    with pytest.raises(InternalError, match="cannot be read"):
        config.store("reg.io", LOGIN)
    assert (tmp_path / "docker/config.json").read_text() == "{"


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_helper_keeps_the_secret(
    config: DockerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    helper = tmp_path / "docker-credential-tests"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "docker").mkdir()
    value: object = "tests" if key == "credsStore" else {"reg.io": "tests", "broken": "tests"}
    (tmp_path / "docker/config.json").write_text(json.dumps({key: value}))
    assert not config.get("reg.io")
    config.store("reg.io", LOGIN)
    assert "p?>~" not in (tmp_path / "docker/config.json").read_text()
    assert config.get("reg.io").password == "p?>~"
    config.store("reg.io", Credentials(username="u", identitytoken="t"))
    assert config.get("reg.io").identitytoken == "t"
    assert config.erase("reg.io")
    assert not config.get("reg.io")
    with pytest.raises(InternalError, match="failed to get"):
        config.get("broken")


def test_a_helper_is_a_name_not_a_path(config: DockerConfig, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text(json.dumps({"credsStore": "../../bin/sh"}))
    with pytest.raises(InternalError, match="no usable name"):
        config.get("reg.io")
