"""Whatever an address says, and whatever its name stands for, no socket is opened to the inside of a network."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.guarded import MAX_URL_CHARS, AddressRefused, Deadline, Rules, check_url, guarded_client, is_public
from tests.jobs.https_server import HOST, HttpsServer, Resolver
from tests.jobs.https_server import server as server

PUBLIC = ["93.184.215.14", "1.1.1.1", "172.15.255.255", "172.32.0.1", "2606:4700:4700::1111", "2001:4860:4860::8888"]

NOT_PUBLIC = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.64.0.1", "100.100.100.200", "100.127.255.255"),
    *("192.0.0.192", "192.0.2.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "192.88.99.1"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:93.184.215.14", "::ffff:0:7f00:1", "::127.0.0.1", "64:ff9b::7f00:1"),
    *("64:ff9b:1::a00:1", "2002:7f00:1::1", "2002:5db8:d70e::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1"),
    *("2001:db8::1", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
    *("100::1", "5f00::1", "4000::1", "2606:4700::1%1"),
]

ODD_ADDRESSES = [
    *("http://voices.example/a", "ftp://voices.example/a", "file:///etc/passwd", "https:///a", "https:a", "//x.test/a"),
    *("https://localhost/a", "https://metadata/a", "https://voices.example./a", "https://voices..example/a"),
    *("https://user@voices.example/a", "https://user:secret@voices.example/a", "https://1.1.1.1@127.0.0.1/a"),
    *("https://voices.example\\@127.0.0.1/a", "https://voices.example:80/a", "https://voices.example:22/a"),
    *("https://voices.example:99999/a", "https://voices.example:8443/a", "https://voices.example:x/a"),
    *("https://0x7f000001/a", "https://2130706433/a", "https://017700000001/a", "https://0177.0.0.1/a"),
    *("https://0x7f.0.0.1/a", "https://127.1/a", "https://127.0.1/a", "https://127.0.0.1./a", "https://127.0.0.01/a"),
    *("https://%31%32%37.0.0.1/a", "https://127%2e0%2e0%2e1/a", "https://１２７.0.0.1/a", "https://①②⑦.0.0.1/a"),
    *("https://[::1%25eth0]/a", "https://[fe80::1%eth0]/a", "https://[2606:4700::1%251]/a", "https://[v1.x]/a"),
    *("https://[::1/a", "https://voices .example/a", "https://voices.example\n/a", "https://-voices.example/a"),
    f"https://voices.example/{'a' * MAX_URL_CHARS}",
    f"https://{'a' * 64}.example/a",
]


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that a socket was to be opened to; none is."""
    opened: list[object] = []

    def refuse(address: object, *_: object, **__: object) -> None:
        opened.append(address)
        raise OSError("a test opens no sockets")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return opened


def get(url: str, rules: Rules, deadline: Deadline | None = None) -> httpx.Response:
    with guarded_client(deadline or Deadline(20.0), rules) as client:
        return client.get(url)


def rules_that_resolve_to(*addresses: str) -> Rules:
    return Rules(resolve=lambda host, port: addresses)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_all_other_addresses_are_not(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@given(st.one_of(st.ip_addresses(), st.sampled_from(PUBLIC).map(ipaddress.ip_address)))
def test_what_is_public_is_global_unicast_for_the_standard_library_too(address: Any) -> None:
    if is_public(address):
        assert address.is_global and not address.is_multicast and not address.is_reserved


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_socket_is_opened_to_an_address_inside_that_is_written_out(address: str, no_sockets: list[object]) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(AddressRefused):
        get(f"https://{host}/a", Rules())
    assert no_sockets == []


@pytest.mark.parametrize("url", ODD_ADDRESSES)
def test_an_odd_spelling_is_refused_before_anyone_is_asked(url: str, no_sockets: list[object]) -> None:
    resolver = Resolver(["93.184.215.14"])
    with pytest.raises(AddressRefused):
        check_url(url)
    with pytest.raises((AddressRefused, httpx.InvalidURL, httpx.UnsupportedProtocol)):
        get(url, Rules(resolve=resolver))
    assert resolver.asked == no_sockets == []


@pytest.mark.parametrize("dots", ["127。0。0。1", "127．0．0．1", "127｡0｡0｡1"])
def test_dots_of_other_scripts_are_dots(dots: str, no_sockets: list[object]) -> None:
    with pytest.raises(AddressRefused):
        get(f"https://{dots}/a", Rules())
    assert no_sockets == []


@pytest.mark.parametrize(
    "url", ["https://voices.example/a", "https://VOICES.example/a b?c=ü", "https://bücher.example"]
)
def test_ordinary_addresses_are_taken(url: str) -> None:
    assert check_url(url).scheme == "https"
    assert check_url("https://voices.example:443/a").host == "voices.example"


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_that_stands_for_an_address_inside_is_refused(address: str, no_sockets: list[object]) -> None:
    with pytest.raises(AddressRefused):
        get("https://voices.example/a", rules_that_resolve_to(address))
    assert no_sockets == []


@pytest.mark.parametrize("addresses", [("1.1.1.1", "10.0.0.1"), ("10.0.0.1", "1.1.1.1"), ("1.1.1.1", "::1"), ()])
def test_all_that_a_name_stands_for_must_be_public(addresses: tuple[str, ...], no_sockets: list[object]) -> None:
    with pytest.raises(AddressRefused):
        get("https://voices.example/a", rules_that_resolve_to(*addresses))
    assert no_sockets == []


def test_the_socket_goes_to_the_address_that_was_looked_at(no_sockets: list[object]) -> None:
    resolver = Resolver(["93.184.215.14", "2606:4700:4700::1111"], ["127.0.0.1"])
    with pytest.raises(httpx.ConnectError):
        get("https://voices.example/a", Rules(resolve=resolver))
    assert no_sockets == [("93.184.215.14", 443), ("2606:4700:4700::1111", 443)]
    assert resolver.asked == ["voices.example"]


def test_a_name_that_changes_its_mind_reaches_the_address_it_had(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(b"sound")
    resolver, looked_up = Resolver(["127.0.0.1"], ["127.0.0.2"]), []
    real = socket.getaddrinfo

    def noted(host: Any, *args: Any, **kwargs: Any) -> Any:
        looked_up.append(host)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    assert get(server.url("/a"), server.rules(resolve=resolver)).content == b"sound"
    assert (resolver.asked, set(looked_up)) == ([HOST], {"127.0.0.1"})
    with pytest.raises(AddressRefused):  # now it stands for another
        get(server.url("/a"), server.rules(resolve=resolver))
    assert server.num_connections == 1


def test_each_request_of_a_client_is_looked_at_anew(server: HttpsServer) -> None:
    def answer_and_wait_for_more(exchange: Any) -> None:
        exchange.answer(b"sound", Connection="keep-alive")
        exchange.wait_for_hang_up()

    server.answers["/a"] = answer_and_wait_for_more
    resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
    with guarded_client(Deadline(20.0), server.rules(resolve=resolver)) as client:
        assert client.get(server.url("/a")).content == b"sound"
        with pytest.raises(AddressRefused):
            client.get(server.url("/a"))


@pytest.mark.parametrize(
    "location",
    ["http://voices.example/a", "https://127.0.0.2/a", "https://0x7f000001/a", "https://u:p@voices.example/a"],
)
def test_a_redirect_is_followed_by_the_same_rules(location: str, server: HttpsServer) -> None:
    server.answers["/a"] = lambda exchange: exchange.redirect(location)
    with guarded_client(Deadline(20.0), server.rules()) as client:
        response = client.get(server.url("/a"))
        assert response.next_request is not None
        with pytest.raises(AddressRefused):
            client.send(response.next_request)
    assert server.requests == ["/a"]


def test_every_refusal_reads_alike(no_sockets: list[object]) -> None:
    told = set()
    for url, addresses in [
        *((f"https://{address}/a", ()) for address in ("10.0.0.1", "127.0.0.1")),
        *(("https://voices.example/?sig=SECRET", (address,)) for address in ("10.0.0.1", "::1")),
        ("https://user:SECRET@voices.example/a", ("1.1.1.1",)),
    ]:
        with pytest.raises(AddressRefused) as caught:
            get(url, rules_that_resolve_to(*addresses))
        told.add(str(caught.value))
    assert len(told) == 1 and "SECRET" not in told.pop()


def test_a_name_that_nobody_knows_reads_like_a_name_inside() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def busy(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with pytest.raises(AddressRefused):
        get("https://voices.example/a", Rules(resolve=unknown))
    with pytest.raises(httpx.ConnectError):
        get("https://voices.example/a", Rules(resolve=busy))


def test_the_certificate_must_be_for_the_name_and_from_an_authority(server: HttpsServer, tmp_path: Path) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(b"sound")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        get(server.url("/a", host="other.example"), server.rules())
    with pytest.raises(httpx.ConnectError, match="certificate"):
        get(server.url("/a"), server.rules(tls=httpx.create_ssl_context(trust_env=False)))
    assert server.requests == []


def test_nothing_is_taken_from_the_environment(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text(f"machine {HOST} login me password SECRET\n")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.answers["/a"] = lambda exchange: exchange.answer(b"sound")
    assert get(server.url("/a"), server.rules()).content == b"sound"
    assert "authorization" not in server.heads[0].lower()


def test_cookies_are_not_kept(server: HttpsServer) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(Set_Cookie="id=1; Path=/")
    with guarded_client(Deadline(20.0), server.rules()) as client:
        for _ in range(2):
            client.get(server.url("/a"))
    assert all("cookie" not in head.lower() for head in server.heads)


def test_what_is_sent_arrives_whole(server: HttpsServer) -> None:
    body, received = bytes(range(256)) * 1_000, bytearray()

    def take(exchange: Any) -> None:
        received.extend(exchange.head.encode("latin-1").partition(b"\r\n\r\n")[2])
        while len(received) < len(body):
            received.extend(exchange.connection.recv(65_536))
        exchange.answer()

    server.answers["/a"] = take
    with guarded_client(Deadline(20.0), server.rules()) as client:
        assert client.put(server.url("/a"), content=iter([body]), headers={"Content-Length": str(len(body))}).is_success
    assert len(received) == len(body)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_server_that_never_shakes_hands_is_given_up_in_time(server: HttpsServer, silent: socket.socket) -> None:
    port = silent.getsockname()[1]
    with pytest.raises(httpx.TransportError):
        get(f"https://{HOST}:{port}/a", server.rules(ports=frozenset({port})), Deadline(0.3))


def test_cancelling_wakes_who_waits(server: HttpsServer) -> None:
    is_asked, hung_up = threading.Event(), threading.Event()

    def wait(exchange: Any) -> None:
        is_asked.set()
        if exchange.wait_for_hang_up():
            hung_up.set()

    server.answers["/a"] = wait
    deadline = Deadline(600.0)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            get(server.url("/a"), server.rules(), deadline)
        except httpx.TransportError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert is_asked.wait(20)
    deadline.cancel()
    thread.join(20)
    assert ended and hung_up.wait(20)


def test_a_deadline_counts_by_its_clock_and_begins_anew() -> None:
    now_s = [0.0]
    deadline = Deadline(10.0, clock=lambda: now_s[0])
    assert deadline.left_s() == 10.0 and deadline.left_s(3.0) == 3.0
    now_s[0] = 9.0
    assert deadline.left_s(3.0) == 1.0
    deadline.begin()
    assert deadline.left_s() == 10.0
    now_s[0] = 19.0
    assert deadline.is_over
    deadline.begin()
    deadline.cancel()
    assert deadline.is_over


def test_no_request_begins_after_the_deadline(no_sockets: list[object]) -> None:
    deadline = Deadline(10.0)
    deadline.cancel()
    with pytest.raises(httpx.TimeoutException):
        get("https://voices.example/a", rules_that_resolve_to("1.1.1.1"), deadline)
    assert no_sockets == []


def test_the_usual_authorities_are_trusted_and_certificates_are_required() -> None:
    tls = Rules().tls
    assert tls.check_hostname and tls.verify_mode == ssl.CERT_REQUIRED
    assert Rules().ports == {443}
