"""The command line as a person runs it, and a bucket that it can reach over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    """An empty bucket as s3://…"""
    name = f"voices-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}/library"


@pytest.fixture
def voices(s3_endpoint: str) -> Run:
    """Runs scripts/voices.py in a process of its own: voices("list", "--json", library=…)."""

    def run(*arguments: object, library: object = None, **environment: str) -> subprocess.CompletedProcess[str]:
        where = () if library is None else ("--library", str(library))
        command = [sys.executable, "scripts/voices.py", *where, *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VOICES_", "BUCKET_"))}
        env = {**kept, **KEYS, "BUCKET_ENDPOINT_URL": s3_endpoint, **environment}
        return subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run
