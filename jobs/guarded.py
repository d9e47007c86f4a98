"""Connections to addresses that clients name: to public servers alone, over TLS, and only for so long.

A worker stands in a network whose other machines trust it. So a name is resolved here, once, everything it stands for
must be public, and the socket is opened to the very address that was looked at: a name that answers differently when
it is asked again (DNS rebinding) is not asked again. Nothing is taken from the environment: no proxy, no .netrc, no
certificates. What may be reached is code (`Rules`), so that no setting can open the inside of the network.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

MAX_URL_CHARS = 2_000

HTTPS_PORTS = frozenset({443})
"""Other ports of a public machine are mostly not meant for the public."""

USER_AGENT = "worker-chatterbox"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
"""What IANA gives out: neither mapped IPv4 (::ffff:a.b.c.d), NAT64 (64:ff9b::), fc00::/7 nor fe80:: lies in it."""

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        # IANA's special-purpose registries. Written out, since `is_global` differs between versions of Python.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "2001::/23",  # IETF's: Teredo, benchmarking, ORCHID
        *("2001:db8::/32", "3fff::/20"),  # documentation
        "2002::/16",  # 6to4, which may stand for any IPv4 address
        "2620:4f:8000::/48",  # AS112: answers for private addresses
        "168.63.129.16/32",  # Azure's inside of each machine, at a public address
    )
)
_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?\Z")
"""Labels with dots between, the last not a number: libraries take 127.1 and 0x7f000001 for addresses too."""

_MAX_TRIED = 4  # addresses of one name
_CONNECT_S = 10.0
_TLS_RECORD_BYTES = 1 << 14


class AddressRefused(Exception):  # noqa: N818 (it says what happened to the address)
    """An address that may not be reached. Which rule it breaks is not told: that would map the network inside."""

    def __init__(self) -> None:
        super().__init__(
            "the address is not one of a public server that may be reached: https://name/…, without a port, a user "
            f"or a password, at most {MAX_URL_CHARS:,} characters"
        )


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and of a single machine."""
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address not in _GLOBAL_IPV6):
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def resolve(host: str, port: int) -> list[str]:
    """Every address that the machine's resolver has for a name.

    Raises:
        socket.gaierror
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Rules:
    """What a guarded client may reach.

    Args:
        resolve: gives the addresses of a name and a port; asked once for each connection.
        is_allowed: of an address, whether to connect to it.
        ports: that may be named; https has 443 where none is.
        tls: trusts whom to vouch for names; the usual authorities (certifi's).
    """

    resolve: Callable[[str, int], Sequence[str]] = resolve
    is_allowed: Callable[[Address], bool] = is_public
    ports: frozenset[int] = HTTPS_PORTS
    tls: ssl.SSLContext = field(default_factory=lambda: httpx.create_ssl_context(trust_env=False))


class Deadline:
    """The end of everything that is done through a client: after a time, or when told from any thread.

    Connections hang up at once. Only what cannot be interrupted runs on: asking the resolver, for as long as the
    machine lets it, and a connection that is just being opened, up to 10 s.

    Args:
        within_s: seconds from now, or from `begin`.
        clock: gives seconds.
    """

    def __init__(self, within_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.within_s = within_s
        self._clock = clock
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # of the next one
        self._handles: set[socket.socket] = set()
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._ends_s = self._clock() + self.within_s

    @property
    def is_over(self) -> bool:
        return self._cancelled.is_set() or self._clock() >= self._ends_s

    def left_s(self, at_most: float | None = None) -> float:
        """Seconds that may be waited.

        Raises:
            httpcore.TimeoutException: for none.
        """
        if self.is_over:
            raise httpcore.TimeoutException("the deadline is over")
        left_s = max(self._ends_s - self._clock(), 1e-3)  # 0 would mean not to wait at all
        return left_s if at_most is None else min(left_s, at_most)

    def rest(self, seconds: float) -> None:
        """Sleep, but not beyond the end."""
        self._cancelled.wait(min(seconds, max(self._ends_s - self._clock(), 0.0)))

    def cancel(self) -> None:
        """End it now: whoever waits for a connection is woken."""
        self._cancelled.set()
        with self._lock:
            for handle in self._handles:
                with contextlib.suppress(OSError):  # the other side was faster
                    handle.shutdown(socket.SHUT_RDWR)

    def hold(self, handle: socket.socket) -> None:
        """Hang this up at the end."""
        with self._lock:
            self._handles.add(handle)

    def release(self, handle: socket.socket) -> None:
        """Close what was held."""
        with self._lock:
            self._handles.discard(handle)
            handle.close()


def guarded_client(deadline: Deadline, rules: Rules | None = None) -> httpx.Client:
    """A client for addresses that someone else named. It keeps no cookies and no connections, and follows nothing.

    To follow a redirect, send `response.next_request`, which is checked as any request is. (With `follow_redirects`,
    httpx would read the whole body of each answer on the way into memory.)

    Args:
        deadline: of all that is done with this client.
        rules: what it may reach; by default public servers at port 443.

    Returns:
        A client whose requests raise `AddressRefused` before anything is sent, and httpx's own errors.
    """
    return httpx.Client(
        transport=_Transport(deadline, rules or Rules()),
        timeout=httpx.Timeout(None, connect=_CONNECT_S),  # the rest is the deadline's
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        trust_env=False,
    )


class _Transport(httpx.BaseTransport):
    """HTTP/1.1 over connections that `_Guard` opens, one for each request."""

    def __init__(self, deadline: Deadline, rules: Rules) -> None:
        self._rules = rules
        self._pool = httpcore.ConnectionPool(
            ssl_context=rules.tls, max_keepalive_connections=0, network_backend=_Guard(deadline, rules)
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        _check(request.url, self._rules.ports)
        assert isinstance(request.stream, httpx.SyncByteStream), request.stream
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        asked = httpcore.Request(
            request.method,
            url,
            headers=request.headers.raw,
            content=request.stream,
            extensions={"timeout": request.extensions.get("timeout", {})},
        )
        with _as_httpx():
            answer = self._pool.handle_request(asked)
        assert isinstance(answer.stream, Iterable), answer.stream
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """An answer's body as it comes."""

    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class _Guard(httpcore.NetworkBackend):
    """Opens sockets, to addresses that were looked at."""

    def __init__(self, deadline: Deadline, rules: Rules) -> None:
        self._deadline, self._rules = deadline, rules
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        trouble: Exception = httpcore.ConnectError("no address was tried")
        for address in self._addresses(host, port)[:_MAX_TRIED]:
            left_s = self._deadline.left_s(timeout)
            try:
                opened = self._sockets.connect_tcp(str(address), port, left_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                trouble = error
            else:
                return _Line(opened, self._deadline)
        raise trouble

    def _addresses(self, host: str, port: int) -> list[Address]:
        """What a host stands for, all of it allowed."""
        found = [_literal(host) or ipaddress.ip_address(text) for text in self._resolved(host, port)]
        if not found or not all(map(self._rules.is_allowed, found)):
            raise AddressRefused
        return list(dict.fromkeys(found))

    def _resolved(self, host: str, port: int) -> Sequence[str]:
        if _literal(host):
            return (host,)
        self._deadline.left_s()
        try:
            return self._rules.resolve(host, port)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise httpcore.ConnectError("the name cannot be resolved at the moment") from error
            raise AddressRefused from None  # as for a name inside: whether there is such a one is not to be learned


class _Line(httpcore.NetworkStream):
    """A connection that its deadline can hang up, by a second handle on it: TLS hides the first from other threads."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: Deadline, handle: socket.socket | None = None) -> None:
        self._inner, self._deadline = inner, deadline
        self._handle = handle or inner.get_extra_info("socket").dup()
        deadline.hold(self._handle)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.left_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _TLS_RECORD_BYTES):  # each a send of its own, and as long as is left
            self._inner.write(buffer[start : start + _TLS_RECORD_BYTES], self._deadline.left_s(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            secured = self._inner.start_tls(ssl_context, server_hostname, self._deadline.left_s(timeout))
        except BaseException:
            self.close()
            raise
        return _Line(secured, self._deadline, self._handle)

    def close(self) -> None:
        self._deadline.release(self._handle)
        self._inner.close()

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)


def check_url(url: str, ports: frozenset[int] = HTTPS_PORTS) -> httpx.URL:
    """An address as a guarded client will take it; what its name stands for is seen when it connects.

    Raises:
        AddressRefused
    """
    try:
        parsed = httpx.URL(url) if len(url) <= MAX_URL_CHARS else None
    except httpx.InvalidURL:
        parsed = None
    if parsed is None:
        raise AddressRefused
    _check(parsed, ports)
    return parsed


def _check(url: httpx.URL, ports: frozenset[int]) -> None:
    is_fit = (
        url.scheme == "https"
        and not url.userinfo
        and (url.port or 443) in ports
        and len(str(url)) <= MAX_URL_CHARS
        and _is_host(url.raw_host.decode("ascii"))
    )
    if not is_fit:
        raise AddressRefused


def _is_host(host: str) -> bool:
    """Whether this is a name, or an address in the one form that all libraries read alike."""
    address = _literal(host)
    if address is None:
        return _NAME.match(host) is not None
    return not isinstance(address, ipaddress.IPv6Address) or address.scope_id is None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@contextlib.contextmanager
def _as_httpx() -> Iterator[None]:
    """httpcore's errors under httpx's names, which are the same."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error
