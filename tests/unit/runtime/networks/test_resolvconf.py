from __future__ import annotations

from lazarette.runtime.networks import resolvconf
from lazarette.runtime.networks.resolvconf import ResolvConf

HOST = resolvconf.parse(
    "# comment\nnameserver 127.0.0.1\nnameserver 192.0.2.53 ; x\nnameserver\n"
    "search a.test b.test\noptions edns0 ndots:2\n"
)


def test_parse() -> None:
    assert ResolvConf(("127.0.0.1", "192.0.2.53"), ("a.test", "b.test"), ("edns0", "ndots:2")) == (
        HOST
    )


def test_without_resolver_the_hosts_servers_but_its_loopback() -> None:
    made = resolvconf.for_container(HOST, embedded=False)
    assert made.render() == (
        b"nameserver 192.0.2.53\nsearch a.test b.test\noptions edns0 ndots:2\n"
    )


def test_what_is_given_wins() -> None:
    made = resolvconf.for_container(
        HOST, embedded=False, dns=["9.9.9.9"], search=["."], options=["rotate"]
    )
    assert made.render() == b"nameserver 9.9.9.9\noptions rotate\n"


def test_embedded() -> None:
    assert resolvconf.for_container(ResolvConf(), embedded=True).render() == (
        b"nameserver 127.0.0.11\noptions ndots:0\n"
    )
    assert resolvconf.for_container(HOST, embedded=True).options == ("edns0", "ndots:2")


def test_hosts() -> None:
    text = resolvconf.hosts([("172.17.0.2", "web")]).decode()
    assert "127.0.0.1\tlocalhost\n" in text and text.endswith("172.17.0.2\tweb\n")
