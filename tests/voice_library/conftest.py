"""Both places a library can lie in: a real folder, and a real S3 service (moto's) over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from voice_library import S3Options, VoiceLibrary
from voice_library.folder_store import FolderStore
from voice_library.s3_store import S3Store
from voice_library.store import Store

OpenLibrary = Callable[..., VoiceLibrary]


@pytest.fixture(scope="session")
def s3_options() -> Iterator[S3Options]:
    """How to reach an S3 service that lives as long as the session."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Options(f"http://{host}:{port}", "us-east-1", "id", "secret", read_timeout_s=10.0)
    server.stop()


@pytest.fixture
def bucket(s3_options: S3Options) -> str:
    """A new, empty bucket."""
    name = f"voices-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3",
        endpoint_url=s3_options.endpoint_url,
        region_name=s3_options.region,
        aws_access_key_id=s3_options.access_key_id,
        aws_secret_access_key=s3_options.secret_access_key,
    )
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A new store of either kind."""
    if request.param == "folder":
        return FolderStore(tmp_path / "voices")
    return S3Store(request.getfixturevalue("bucket"), "some/prefix", request.getfixturevalue("s3_options"))


@pytest.fixture
def open_library(store: Store) -> Iterator[OpenLibrary]:
    """Opens the same library again and again, as other workers would; each sees changes at once."""
    opened = []

    def open_one(**options: object) -> VoiceLibrary:
        opened.append(VoiceLibrary(store, **{"refresh_s": 0.0, **options}))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for library in opened:
        library.close()


@pytest.fixture
def library(open_library: OpenLibrary) -> VoiceLibrary:
    return open_library()
