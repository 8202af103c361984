from pathlib import Path

import pytest

from lazarette.runtime.images.endpoints import Endpoint, RegistryConfig
from lazarette.runtime.images.errors import RegistryFault
from lazarette.storage.errors import InvalidArgument


def urls(config: RegistryConfig, domain: str, *, mirrors: bool = True) -> list[str]:
    return [endpoint.url for endpoint in config.endpoints(domain, mirrors=mirrors)]


def test_only_the_hub_has_mirrors_and_only_to_pull() -> None:
    config = RegistryConfig(mirrors=("https://near.io/",), hub="https://hub")
    assert urls(config, "docker.io") == ["https://near.io", "https://hub"]
    assert urls(config, "docker.io", mirrors=False) == ["https://hub"]
    assert urls(config, "reg.io") == ["https://reg.io"]


@pytest.mark.parametrize(
    "domain", ["127.0.0.1:5000", "127.9.9.9", "localhost", "localhost:80", "[::1]:5000",
               "old.io", "other.io:5000", "10.1.2.3:5000"]
)  # fmt: skip
def test_insecure_registries_may_lack_tls(domain: str) -> None:
    config = RegistryConfig(
        insecure=("127.0.0.0/8", "::1/128", "old.io", "other.io:5000", "10.0.0.0/8")
    )
    first, second = config.endpoints(domain)
    assert (first.url, first.checked) == (f"https://{domain}", False)
    assert second.url == f"http://{domain}"
    assert config.tls(first) is not None


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is no registry"):
        RegistryConfig().endpoints("[", mirrors=False)


@pytest.mark.parametrize("domain", ["reg.io", "other.io", "11.1.2.3", "old.io.evil"])
def test_all_others_need_checked_tls(domain: str) -> None:
    config = RegistryConfig(insecure=("old.io", "other.io:5000", "10.0.0.0/8"))
    (only,) = config.endpoints(domain)
    assert (only.url, only.checked) == (f"https://{domain}", True)
    assert config.tls(only) is True


def test_a_broken_certificate_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "reg.io"
    folder.mkdir()
    (folder / "ca.crt").write_text("nonsense")
    with pytest.raises(RegistryFault, match=r"certificates in .*reg\.io cannot be used"):
        RegistryConfig(certificates=tmp_path).tls(Endpoint("https://reg.io"))


def test_proxies_of_the_environment_but_not_for_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inner.io")
    assert Endpoint("https://reg.io").proxy == "http://proxy:3128"
    assert Endpoint("https://inner.io").proxy is None
    assert Endpoint("https://127.0.0.1:5000").proxy is None
    assert Endpoint("https://localhost:5000").proxy is None
