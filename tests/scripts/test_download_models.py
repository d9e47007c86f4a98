"""scripts/download_models.py as a person or an image's build runs it, against a hub on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint import find_checkpoint
from engine.manifest import MANIFEST
from scripts.download_models import read_token
from tests.scripts.hub import COMMIT, DOWN, OTHER_COMMIT, TURBO, Hub, model_files, weights

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
NEEDED = {*TURBO.required_files, "conds.pt"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(model_files()) as hub:
        yield hub


def fetch(cache: Path, endpoint: str, *arguments: object, **env: str) -> Done:
    """Run the script in a process of its own: the hub's client reads its endpoint when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "scripts/download_models.py", *map(str, arguments)],
        cwd=ROOT,
        env=kept | {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)} | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(done: Done) -> str:
    assert done.returncode == 1, (done.stdout, done.stderr)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return line


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def test_a_model_is_fetched_into_the_cache_with_a_manifest_and_found_there_by_a_worker(
    tmp_path: Path, hub: Hub
) -> None:
    succeeded(fetch(tmp_path, hub.endpoint, "turbo", "--revision", ""))  # as the Dockerfile says "the default branch"
    found = find_checkpoint(TURBO, cache_dirs=[tmp_path], allow_download=False)
    assert found.revision == COMMIT
    assert {path.name for path in found.folder.iterdir()} == NEEDED | {MANIFEST}
    for name in NEEDED:
        assert (found.folder / name).read_bytes() == hub.files[name]
    manifest = manifest_of(found.folder)
    assert (manifest["repository"], manifest["revision"]) == (TURBO.repo_id, COMMIT)
    assert {name: record["size"] for name, record in manifest["files"].items()} == {
        name: len(hub.files[name]) for name in NEEDED
    }

    hub.sent.clear()
    succeeded(fetch(tmp_path, hub.endpoint, "turbo"))
    assert hub.sent == [], "what is there and sound is not fetched again"
    assert "7 files" in succeeded(fetch(tmp_path, hub.endpoint, "--check", tmp_path))


def test_a_pinned_revision_is_found_by_its_name_and_its_commit(tmp_path: Path, hub: Hub) -> None:
    succeeded(fetch(tmp_path, hub.endpoint, "turbo", "--revision", "v2"))
    for revision in ("v2", OTHER_COMMIT):
        assert (
            find_checkpoint(TURBO, revision=revision, cache_dirs=[tmp_path], allow_download=False).revision
            == OTHER_COMMIT
        )
    assert "no revision v3" in failed(fetch(tmp_path, hub.endpoint, "turbo", "--revision", "v3"))


def test_a_folder_is_filled_checked_and_not_mixed_with_another_commit(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "turbo"
    succeeded(fetch(tmp_path, hub.endpoint, "turbo", "--to", folder))
    assert {path.name for path in folder.iterdir()} == NEEDED | {MANIFEST}
    assert find_checkpoint(TURBO, model_dir=folder).folder == folder
    succeeded(fetch(tmp_path, hub.endpoint, "--check", folder))
    assert COMMIT in failed(fetch(tmp_path, hub.endpoint, "turbo", "--to", folder, "--revision", "v2"))

    weights = bytearray((folder / TURBO.t3_file).read_bytes())
    weights[-1] ^= 1
    (folder / TURBO.t3_file).write_bytes(weights)
    (folder / "merges.txt").unlink()
    message = failed(fetch(tmp_path, hub.endpoint, "--check", folder))
    assert f"{TURBO.t3_file} has another SHA-256" in message
    assert "merges.txt is missing" in message

    hub.sent.clear()
    succeeded(fetch(tmp_path, hub.endpoint, "turbo", "--to", folder))
    assert {name for name, _ in hub.sent} == {TURBO.t3_file, "merges.txt"}, "only what is damaged is fetched again"
    succeeded(fetch(tmp_path, hub.endpoint, "--check", folder))


@pytest.fixture
def long_hub(hub: Hub) -> Hub:
    """One with a file of more than 10 MiB, which the hub's client hands on at a time."""
    hub.files[TURBO.t3_file] = weights(3_000_000)
    return hub


def test_a_broken_connection_is_gone_on_with_where_it_broke(tmp_path: Path, long_hub: Hub) -> None:
    long_hub.cuts = {TURBO.t3_file: [11_000_000]}
    succeeded(fetch(tmp_path, long_hub.endpoint, "turbo"))
    assert [start for name, start in long_hub.sent if name == TURBO.t3_file] == [0, 10 << 20]


def test_a_download_that_failed_half_way_is_gone_on_with_by_the_next(tmp_path: Path, long_hub: Hub) -> None:
    long_hub.cuts = {TURBO.t3_file: [11_000_000, DOWN]}
    folder = tmp_path / "turbo"
    assert "503" in failed(fetch(tmp_path, long_hub.endpoint, "turbo", "--to", folder))
    assert not (folder / TURBO.t3_file).exists()
    assert not (folder / MANIFEST).exists()
    long_hub.sent.clear()
    succeeded(fetch(tmp_path, long_hub.endpoint, "turbo", "--to", folder))
    assert (TURBO.t3_file, 10 << 20) in long_hub.sent
    assert (folder / TURBO.t3_file).read_bytes() == long_hub.files[TURBO.t3_file]
    assert {path.name for path in folder.iterdir()} == NEEDED | {MANIFEST}, "no half files are left"


@pytest.mark.parametrize("name", [TURBO.s3gen_file, "vocab.json"])
def test_content_that_is_not_what_the_hub_says_is_never_put_in_place(tmp_path: Path, hub: Hub, name: str) -> None:
    hub.served = {name: hub.files[name][:-1] + b"\0"}
    assert f"{name} arrived damaged" in failed(fetch(tmp_path, hub.endpoint, "turbo"))
    assert not list(tmp_path.rglob(name))
    hub.served = {}
    succeeded(fetch(tmp_path, hub.endpoint, "turbo"))


def test_a_private_repository_opens_to_the_token(tmp_path: Path) -> None:
    with Hub(model_files(), token="hf_secret") as hub:
        message = failed(fetch(tmp_path, hub.endpoint, "turbo"))
        assert "HF_TOKEN" in message
        assert "turbo" in succeeded(fetch(tmp_path, hub.endpoint, "turbo", HF_TOKEN="hf_secret"))


def test_the_token_is_the_environments_or_else_the_builds_secret(tmp_path: Path) -> None:
    secret = tmp_path / "hf_token"
    assert read_token({}, secret) is None
    secret.write_text("from the build\n")
    assert read_token({"HF_TOKEN": ""}, secret) == "from the build"
    assert read_token({"HF_TOKEN": "own"}, secret) == "own"


def test_a_dry_run_says_what_is_missing_and_fetches_nothing(tmp_path: Path, hub: Hub) -> None:
    output = succeeded(fetch(tmp_path, hub.endpoint, "turbo", "--dry-run"))
    assert f"to fetch  {TURBO.t3_file}" in output
    assert "README.md" not in output
    assert hub.sent == []


def test_without_a_hub_the_reason_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert TURBO.repo_id in failed(fetch(tmp_path, endpoint, "turbo"))


def test_a_repository_that_lacks_a_needed_file_is_refused_before_anything_is_fetched(tmp_path: Path, hub: Hub) -> None:
    del hub.files["merges.txt"]
    assert "lacks merges.txt" in failed(fetch(tmp_path, hub.endpoint, "turbo"))
    assert hub.sent == []


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    assert "model_unavailable" in failed(fetch(tmp_path, "http://127.0.0.1:1", "draft"))
    assert fetch(tmp_path, "http://127.0.0.1:1").returncode == 2
    assert fetch(tmp_path, "http://127.0.0.1:1", "turbo", "nano", "--to", tmp_path).returncode == 2
    assert "no weights-manifest.json" in failed(fetch(tmp_path, "http://127.0.0.1:1", "--check", tmp_path))
