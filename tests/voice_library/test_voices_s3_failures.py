"""Buckets that refuse, hang, lie or vanish: a clear code, nothing half-written, nothing lost."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, S3Options, VoiceLibrary
from voice_library.s3_store import S3Store

HURRIED = {"connect_timeout_s": 0.5, "read_timeout_s": 0.5, "attempts": 1}


def options(endpoint_url: str) -> S3Options:
    return S3Options(endpoint_url, "us-east-1", "id", "secret", **HURRIED)  # type: ignore[arg-type]


class Gate:
    """A proxy in front of the S3 service that can be told to break connections in several ways.

    Args:
        target: host and port of the service.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.num_bytes_let_through: int | None = None
        self.strip = b""
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                for source, sink, is_request in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, sink, is_request), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        num_passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if is_request and self.strip:
                    data = data.replace(self.strip, b"X-Ignored")
                limit = self.num_bytes_let_through
                if is_request and limit is not None:
                    data = data[: max(limit - num_passed, 0)]
                num_passed += len(data)
                if data:
                    sink.sendall(data)  # what is over the limit never arrives, and the connection stays open
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate(s3_options: S3Options) -> Iterator[Gate]:
    url = httpx.URL(s3_options.endpoint_url or "")
    gate = Gate((url.host, url.port or 80))
    yield gate
    gate.close()


def test_a_service_that_does_not_answer_is_a_storage_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LibraryError) as raised:
        VoiceLibrary.open("s3://bucket/v", s3=options(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert raised.value.code == "storage_failed"
    assert "s3://bucket/v" in raised.value.message and "timeout" in raised.value.message.lower()
    assert "secret" not in raised.value.message + repr(options("http://x"))


def test_a_service_that_is_not_there_is_a_storage_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(LibraryError) as raised:
        VoiceLibrary.open("s3://bucket", s3=options(f"http://127.0.0.1:{port}"))
    assert raised.value.code == "storage_failed"


def test_a_bucket_that_does_not_exist_is_named(s3_options: S3Options) -> None:
    with pytest.raises(LibraryError, match="bucket does not exist") as raised:
        VoiceLibrary.open("s3://no-such-bucket/v", s3=s3_options)
    assert raised.value.code == "storage_failed"


def test_a_bucket_without_rights_is_a_storage_failure_and_keeps_what_it_has(bucket: str, s3_options: S3Options) -> None:
    with VoiceLibrary.open(f"s3://{bucket}/v", s3=s3_options, refresh_s=0.0) as library:
        voice = library.add("Anna", sound(), RATE)
        with without_rights(s3_options):
            for work in (
                library.refresh,
                library.check,
                lambda: S3Store(bucket, "v", s3_options).read("snapshot.json", 10),
                lambda: library.add("Berta", sound(1), RATE),
                lambda: library.get_audio(voice.voice_id),
                lambda: library.delete(voice.voice_id),
                lambda: library.put_conditionals(voice.voice_id, "key", b"x"),
                lambda: VoiceLibrary.open(f"s3://{bucket}/v", s3=s3_options),
            ):
                with pytest.raises(LibraryError, match="access denied") as raised:
                    work()
                assert raised.value.code == "storage_failed"
            assert library.get(voice.voice_id) == voice  # what is known serves on
        assert [each.name for each in library.list().voices] == ["Anna"] and library.check() == []


@contextlib.contextmanager
def without_rights(s3_options: S3Options) -> Iterator[None]:
    """Makes the service check credentials, of which it knows none."""
    url = f"{s3_options.endpoint_url}/moto-api/reset-auth"
    httpx.post(url, content="0").raise_for_status()
    try:
        yield
    finally:
        httpx.post(url, content="inf").raise_for_status()


def test_a_bucket_that_hangs_half_way_loses_nothing_and_leaves_nothing_half_written(
    bucket: str, gate: Gate, s3_options: S3Options
) -> None:
    with VoiceLibrary.open(f"s3://{bucket}/v", s3=s3_options, refresh_s=0.0) as direct:
        voice = direct.add("Anna", sound(), RATE)
        for num_bytes in (0, 700, 3_000, 6_000):
            gate.num_bytes_let_through = None
            with VoiceLibrary.open(f"s3://{bucket}/v", s3=options(gate.url), refresh_s=0.0) as library:
                gate.num_bytes_let_through = num_bytes
                with pytest.raises(LibraryError) as raised:
                    library.add("Berta", sound(1, 24_000), RATE)
                assert raised.value.code == "storage_failed"
            gate.num_bytes_let_through = None
            assert [each.name for each in direct.list().voices] == ["Anna"] and direct.check() == []
        direct.add("Berta", sound(1), RATE)
        assert direct.get_audio(voice.voice_id)[0].size == 2_400


def test_an_endpoint_that_ignores_conditions_is_refused_before_it_loses_a_voice(bucket: str, gate: Gate) -> None:
    gate.strip = b"If-None-Match"
    with VoiceLibrary.open(f"s3://{bucket}/v", s3=options(gate.url)) as library:
        with pytest.raises(LibraryError, match="ignores conditional puts") as raised:
            library.add("Anna", sound(), RATE)
        assert raised.value.code == "storage_failed" and library.list().total == 0


def test_a_create_whose_answer_got_lost_is_known_for_its_own(bucket: str, s3_options: S3Options) -> None:
    store = S3Store(bucket, "v", s3_options)
    assert store.create("a", b"mine")
    assert store.create("a", b"mine")  # as when boto3 sends it again
    assert not store.create("a", b"other")


def test_a_folder_that_cannot_be_written_is_a_storage_failure(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path / "voices")
    (tmp_path / "voices").write_bytes(b"in the way")
    with pytest.raises(LibraryError) as raised:
        library.add("Anna", sound(), RATE)
    assert raised.value.code == "storage_failed" and str(tmp_path) in raised.value.message
