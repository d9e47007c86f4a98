"""A real HTTPS server on this machine, with an authority of its own, that answers as badly as a test wants."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobs.guarded import Address, Rules

HOST = "voices.example"
LOOPBACK = ipaddress.ip_address("127.0.0.1")

Answer = Callable[["Exchange"], None]
"""Writes to a connection, whatever it likes."""


@dataclass
class Exchange:
    """One request, and the connection to answer it on.

    Args:
        path: with its query.
        head: the request's first lines.
        connection: to write to; closed when the answer returns.
        is_over: set when the test is.
    """

    path: str
    head: str
    connection: ssl.SSLSocket
    is_over: threading.Event

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self, body: bytes = b"", status: str = "200 OK", **headers: object) -> None:
        """A whole answer; underscores in names stand for dashes."""
        lines = {"Content-Length": len(body), "Connection": "close"}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.send(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    def redirect(self, location: str) -> None:
        self.answer(status="302 Found", Location=location)

    def wait_for_hang_up(self) -> bool:
        """Whether the other side ended the connection, and not the test."""
        self.connection.settimeout(0.05)
        while not self.is_over.is_set():
            try:
                if not self.connection.recv(1):
                    return True
            except TimeoutError:
                continue
            except OSError:
                return True
        return False


@dataclass
class HttpsServer:
    """Answers by path, each request in a thread.

    Args:
        folder: for its certificates.
        host: the name that its certificate is for.
        address: to listen at.
    """

    folder: Path
    host: str = HOST
    address: str = "127.0.0.1"
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_connections: int = 0

    def __post_init__(self) -> None:
        self.trust, self._tls = certificates(self.folder, self.host)
        self.is_over = threading.Event()
        self._listener = socket.create_server((self.address, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str = "/voice.wav", host: str = HOST) -> str:
        return f"https://{host}:{self.port}{path}"

    def rules(self, **changes: object) -> Rules:
        """This server is all that may be reached, under any name."""
        given: dict[str, object] = {
            "resolve": lambda host, port: [self.address],
            "is_allowed": is_loopback,
            "ports": frozenset({443, self.port}),
            "tls": self.trust,
        }
        return Rules(**{**given, **changes})  # type: ignore[arg-type]

    def close(self) -> None:
        self.is_over.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                self.num_connections += 1
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), raw:
            raw.settimeout(10.0)
            with self._tls.wrap_socket(raw, server_side=True) as connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := connection.recv(65_536)):
                        return
                    head += data
                text = head.decode("latin-1")
                path = text.split(" ", 2)[1]
                self.requests.append(path)
                self.heads.append(text)
                answer = self.answers.get(path.partition("?")[0], lambda exchange: exchange.answer(status="404 No"))
                answer(Exchange(path, text, connection, self.is_over))


def is_loopback(address: Address) -> bool:
    return address == LOOPBACK


def certificates(folder: Path, host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A new authority, and a server's certificate from it: what the client trusts, and what the server shows."""
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate("test authority", authority_key, "test authority", authority_key, is_authority=True)
    server = _certificate(host, server_key, "test authority", authority_key)
    chain, key = folder / f"{host}.pem", folder / f"{host}.key"
    chain.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(chain, key)
    return ssl.create_default_context(cadata=authority.public_bytes(serialization.Encoding.PEM).decode()), shown


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if not is_authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpsServer]:
    running = HttpsServer(tmp_path)
    yield running
    running.close()


class Resolver:
    """Gives one answer after another, the last one again and again.

    Args:
        answers: addresses of a name.
    """

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        del port
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]
