"""The command line as a person runs it, and a bucket that it can reach over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.voice_library.conftest import bucket as bucket
from tests.voice_library.conftest import s3_options as s3_options
from voice_library import S3Options

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def bucket_uri(bucket: str) -> str:
    """A place in a new, empty bucket."""
    return f"s3://{bucket}/library"


@pytest.fixture
def voices(s3_options: S3Options) -> Run:
    """Runs scripts/voices.py in a process of its own: voices("list", "--json", library=…)."""

    def run(*arguments: object, library: object = None, **environment: str) -> subprocess.CompletedProcess[str]:
        where = () if library is None else ("--library", str(library))
        command = [sys.executable, "scripts/voices.py", *where, *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VOICES_", "BUCKET_"))}
        keys = {
            "AWS_ACCESS_KEY_ID": s3_options.access_key_id,
            "AWS_SECRET_ACCESS_KEY": s3_options.secret_access_key,
            "AWS_DEFAULT_REGION": s3_options.region,
            "BUCKET_ENDPOINT_URL": s3_options.endpoint_url,
        }
        env = {**kept, **{name: str(value) for name, value in keys.items()}, **environment}
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
