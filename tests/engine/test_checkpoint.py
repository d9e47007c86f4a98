"""Checkpoints are found where they are said to be, at the revision that was asked for, or named as missing."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine import checkpoint as checkpoint_module
from engine.checkpoint import RUNPOD_CACHE, Checkpoint, default_cache_dirs, find_checkpoint
from engine.errors import SpeechError
from engine.models import MODELS, ModelSpec

TURBO, MULTILINGUAL = MODELS["turbo"], MODELS["multilingual"]
FIRST, SECOND = "1" * 40, "2" * 40
ROOT = Path(checkpoint_module.__file__).parents[1]


def write_weights(path: Path, seed: int = 0, size: int = 8) -> None:
    values = np.random.default_rng(seed).standard_normal((3, size)).astype(np.float32)
    save_file({name: values[index].copy() for index, name in enumerate("abc")}, path)


def write_file(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_weights(path, seed + zlib.crc32(path.name.encode()))
    else:
        path.write_text(f"{path.name} {seed}")


def write_folder(folder: Path, spec: ModelSpec = TURBO, seed: int = 0, without: tuple[str, ...] = ()) -> Path:
    for name in (*spec.required_files, "conds.pt"):
        if name not in without:
            write_file(folder / name, seed)
    return folder


def write_cache(
    cache: Path, commit: str, *, spec: ModelSpec = TURBO, ref: str | None = "main", without: tuple[str, ...] = ()
) -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs/, named by refs/."""
    repository = cache / f"models--{spec.repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for path in write_folder(cache / "staging" / commit, spec, without=without).iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes() + path.name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    if ref is not None:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


def find(*caches: Path, spec: ModelSpec = TURBO, **options) -> Checkpoint:
    return find_checkpoint(spec, cache_dirs=caches, allow_download=False, **options)


def refusal(*caches: Path, code: str = "weights_missing", spec: ModelSpec = TURBO, **options) -> str:
    with pytest.raises(SpeechError) as raised:
        find(*caches, spec=spec, **options)
    assert raised.value.code == code
    return raised.value.message


# --------------------------------------------------------------------------------------- MODEL_DIR


def test_a_named_folder_is_taken_before_any_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "hub", FIRST)
    folder = write_folder(tmp_path / "tuned")
    found = find(tmp_path / "hub", model_dir=folder)
    assert (found.folder, found.revision) == (folder, None)


def test_an_incomplete_named_folder_names_its_gaps_and_is_never_replaced(tmp_path: Path) -> None:
    write_cache(tmp_path / "hub", FIRST)
    folder = write_folder(tmp_path / "tuned", without=(TURBO.t3_file, "merges.txt"))
    message = refusal(tmp_path / "hub", model_dir=folder)
    assert f"{TURBO.t3_file} is missing" in message
    assert "merges.txt is missing" in message
    assert str(folder) in message
    assert "no such folder" in refusal(tmp_path / "hub", model_dir=tmp_path / "nowhere")


def test_weights_may_come_in_the_other_format_and_the_named_one_is_preferred(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mtl", MULTILINGUAL, without=("s3gen.pt", "ve.pt"))
    assert "s3gen.pt is missing" in refusal(spec=MULTILINGUAL, model_dir=folder)
    write_weights(folder / "s3gen.safetensors")
    write_weights(folder / "ve.safetensors")
    found = find(spec=MULTILINGUAL, model_dir=folder)
    assert found.path("s3gen.pt") == folder / "s3gen.safetensors"
    write_file(folder / "s3gen.pt")
    assert found.path("s3gen.pt") == folder / "s3gen.pt"


def test_tokenizer_files_have_no_other_format(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", without=("vocab.json",))
    (folder / "vocab.pt").write_text("x")
    assert "vocab.json is missing" in refusal(model_dir=folder)


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_pointer, "Git LFS pointer"),
        (_cut, "cut short"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\x10" * 64), "not a safetensors file"),
        (lambda path: path.write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "not a safetensors file"),
    ],
)
def test_a_damaged_weight_file_is_named_with_its_damage(tmp_path: Path, damage, complaint: str) -> None:
    folder = write_folder(tmp_path / "a")
    damage(folder / TURBO.s3gen_file)
    message = refusal(model_dir=folder)
    assert TURBO.s3gen_file in message
    assert complaint in message


def test_optional_files_are_found_or_none_and_a_missing_path_is_an_error(tmp_path: Path) -> None:
    found = find(model_dir=write_folder(tmp_path / "a", without=("conds.pt",)))
    assert found.find("conds.pt") is None
    with pytest.raises(SpeechError, match=r"conds\.pt"):
        found.path("conds.pt")


# ------------------------------------------------------------------------------------------ caches


def test_a_cached_snapshot_is_found_through_its_ref(tmp_path: Path) -> None:
    write_cache(tmp_path, FIRST, ref=None)
    snapshot = write_cache(tmp_path, SECOND)
    found = find(tmp_path)
    assert (found.folder, found.revision) == (snapshot, SECOND)
    assert found.path(TURBO.t3_file).is_file()


@pytest.mark.parametrize("revision", [FIRST, "v1", "refs/pr/3"])
def test_a_pinned_commit_tag_or_branch_is_taken_whatever_main_is(tmp_path: Path, revision: str) -> None:
    write_cache(tmp_path, FIRST, ref=None if revision == FIRST else revision)
    write_cache(tmp_path, SECOND)
    assert find(tmp_path, revision=revision).revision == FIRST


@pytest.mark.parametrize("revision", [SECOND, "v2", "1" * 7])
def test_a_pinned_revision_that_is_not_cached_is_never_replaced(tmp_path: Path, revision: str) -> None:
    write_cache(tmp_path, FIRST)
    message = refusal(tmp_path, revision=revision)
    assert revision in message
    assert f"--revision {revision}" in message


def test_an_incomplete_snapshot_is_passed_over_for_the_next_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "own", FIRST, without=("merges.txt",))
    snapshot = write_cache(tmp_path / "runpod", SECOND)
    assert find(tmp_path / "own", tmp_path / "runpod").folder == snapshot


def test_a_snapshot_whose_blob_is_gone_is_incomplete(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, FIRST)
    (snapshot / TURBO.t3_file).resolve().unlink()
    assert f"{TURBO.t3_file} is missing" in refusal(tmp_path)


def test_without_refs_one_snapshot_will_do_and_two_are_not_guessed_between(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, FIRST, ref=None)
    assert find(tmp_path).folder == snapshot
    write_cache(tmp_path, SECOND, ref=None)
    assert "no revision main" in refusal(tmp_path)


def test_what_is_missing_is_told_with_places_and_command(tmp_path: Path) -> None:
    message = refusal(tmp_path / "own", tmp_path / "runpod")
    for part in ("turbo", *TURBO.required_files, str(tmp_path / "own"), str(tmp_path / "runpod"), "MODEL_DIR"):
        assert part in message
    assert "make run MODEL=turbo" in message
    assert f"hf download {TURBO.repo_id}" in message


@pytest.mark.parametrize("revision", ["../../etc", "a/../b", "", "/etc", "-x", "a b"])
def test_a_revision_that_could_lead_elsewhere_is_refused(tmp_path: Path, revision: str) -> None:
    refusal(tmp_path, code="invalid_request", revision=revision)


def test_a_revision_beside_a_named_folder_must_be_that_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tuned")
    refusal(code="invalid_request", model_dir=folder, revision=FIRST)
    snapshot = write_cache(tmp_path, FIRST)
    assert find(model_dir=snapshot, revision=FIRST).revision == FIRST
    refusal(code="invalid_request", model_dir=snapshot, revision=SECOND)


def test_cache_folders_follow_the_environment_with_runpods_last() -> None:
    assert default_cache_dirs({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == (Path("/a"), RUNPOD_CACHE)
    assert default_cache_dirs({"HF_HOME": "/b"}) == (Path("/b/hub"), RUNPOD_CACHE)
    assert default_cache_dirs({"XDG_CACHE_HOME": "/c"}) == (Path("/c/huggingface/hub"), RUNPOD_CACHE)
    assert default_cache_dirs({"HF_HUB_CACHE": str(RUNPOD_CACHE)}) == (RUNPOD_CACHE,)
    assert default_cache_dirs({})[0] == Path.home() / ".cache/huggingface/hub"


# ------------------------------------------------------------------------------------- fingerprint


def fingerprint(folder: Path, spec: ModelSpec = TURBO) -> str:
    return Checkpoint(folder, spec).fingerprint


def test_the_fingerprint_is_the_same_wherever_the_folder_lies_and_whatever_voice_is_built_in(tmp_path: Path) -> None:
    one, two = write_folder(tmp_path / "one"), write_folder(tmp_path / "two", without=("conds.pt",))
    assert fingerprint(one) == fingerprint(two)
    assert len(fingerprint(one)) == 32


@pytest.mark.parametrize("name", TURBO.required_files)
def test_the_fingerprint_changes_with_any_required_file(tmp_path: Path, name: str) -> None:
    one, two = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    write_file(two / name, seed=1)
    assert (one / name).stat().st_size == (two / name).stat().st_size
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize("changed", range(0, 400, 23))
def test_the_fingerprint_sees_one_retrained_tensor_in_a_large_file(tmp_path: Path, changed: int) -> None:
    name = "big.safetensors"
    spec = dataclasses.replace(TURBO, t3_file=name, s3gen_file=name, voice_encoder_file=name, tokenizer_files=())
    before = {f"layer{index:03}": np.zeros(6_000, np.float32) for index in range(400)}  # 9.6 MB
    after = before | {f"layer{changed:03}": np.full(6_000, 1e-3, np.float32)}
    found = []
    for folder, tensors in ((tmp_path / "one", before), (tmp_path / "two", after)):
        folder.mkdir()
        save_file(tensors, folder / name)
        found.append(fingerprint(folder, spec))
    assert found[0] != found[1]


# --------------------------------------------------------------------------------------------- hub

_FIND = """
import json, sys
from pathlib import Path
from engine.checkpoint import find_checkpoint
from engine.errors import SpeechError
from engine.models import MODELS
steps = []
progress = (lambda done, total: steps.append((done, total))) if sys.argv[3] == "bar" else None
try:
    found = find_checkpoint(MODELS["turbo"], revision=sys.argv[2] or None, cache_dirs=[Path(sys.argv[1])],
                            progress=progress)
    print(json.dumps({"folder": str(found.folder), "revision": found.revision, "steps": steps[-1:]}))
except SpeechError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


def find_at_hub(cache: Path, endpoint: str, *, revision: str = "", bar: bool = False, **env: str) -> dict:
    """In a process of its own: the hub's client reads its endpoint when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", _FIND, str(cache), revision, "bar" if bar else ""],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "%|" not in done.stderr, f"a progress bar was drawn: {done.stderr}"
    return json.loads(done.stdout)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("revision", ["", FIRST])
def test_a_hub_that_refuses_connections_is_weights_missing(tmp_path: Path, closed_port: int, revision: str) -> None:
    result = find_at_hub(tmp_path, f"http://127.0.0.1:{closed_port}", revision=revision)
    assert result["code"] == "weights_missing"
    assert "hub:" in result["message"]


def test_a_hub_that_accepts_and_never_answers_is_weights_missing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = find_at_hub(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert result["code"] == "weights_missing"


class Hub:
    """As much of a Hugging Face hub as a download needs: model info, file tree, files."""

    def __init__(self, files: dict[str, bytes], revisions: dict[str, str]) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(self.path.split("?")[0])
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 (the server looks for this name)

            def log_message(self, *args: object) -> None:
                pass

        self.files, self.revisions = files, revisions
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        api = f"/api/models/{TURBO.repo_id}"
        if path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in self.files.items()
            ]
            return self.as_json(entries)
        if path == api or path.startswith(f"{api}/revision/"):
            commit = self.commit(path.partition("/revision/")[2] or "main")
            siblings = [{"rfilename": name} for name in self.files]
            known = self.as_json({"id": TURBO.repo_id, "sha": commit, "siblings": siblings})
            return known if commit else (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        name = path.rpartition("/")[2]
        if path.startswith(f"/{TURBO.repo_id}/resolve/") and name in self.files:
            commit = self.commit(path.split("/")[4]) or ""
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(self.files[name])}"'}, self.files[name]
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.revisions.values() else self.revisions.get(revision)

    @staticmethod
    def as_json(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_folder(tmp_path / "upload")
    (folder / "README.md").write_text("a model card")
    (folder / "t3_other.safetensors").write_text("weights of another model")
    hub = Hub({path.name: path.read_bytes() for path in folder.iterdir()}, {"main": FIRST, "v2": SECOND})
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def test_a_download_fetches_what_the_model_needs_once_and_no_more(tmp_path: Path, hub: Hub) -> None:
    cache = tmp_path / "hub"
    result = find_at_hub(cache, hub.endpoint, bar=True)
    snapshot = Path(result["folder"])
    assert result["revision"] == FIRST
    assert {path.name for path in snapshot.iterdir()} == {*TURBO.required_files, "conds.pt"}
    num_bytes = sum(path.stat().st_size for path in snapshot.iterdir())
    assert result["steps"] == [[num_bytes, num_bytes]], "progress ends where the bytes end"

    asked = len(hub.requests)
    again = find_at_hub(cache, hub.endpoint)
    assert again["folder"] == result["folder"]
    assert len(hub.requests) == asked, "a cached model needs no hub"


def test_a_download_takes_the_pinned_revision_beside_a_cached_other_one(tmp_path: Path, hub: Hub) -> None:
    write_cache(tmp_path / "hub", FIRST)
    assert find_at_hub(tmp_path / "hub", hub.endpoint, revision="v2")["revision"] == SECOND
    missing = find_at_hub(tmp_path / "hub", hub.endpoint, revision="v3")
    assert missing["code"] == "weights_missing"
    assert "v3" in missing["message"]


def test_a_download_completes_an_incomplete_snapshot(tmp_path: Path, hub: Hub) -> None:
    write_cache(tmp_path / "hub", FIRST, without=("merges.txt",))
    assert find_at_hub(tmp_path / "hub", hub.endpoint)["revision"] == FIRST
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert [request.rpartition("/")[2] for request in fetched] == ["merges.txt"]


def test_a_repository_that_lacks_a_file_is_named_with_it(tmp_path: Path, hub: Hub) -> None:
    del hub.files[TURBO.t3_file]
    result = find_at_hub(tmp_path / "hub", hub.endpoint)
    assert result["code"] == "weights_missing"
    assert f"{TURBO.t3_file} is missing" in result["message"]


def test_an_offline_setting_keeps_the_hub_from_being_asked(tmp_path: Path, hub: Hub) -> None:
    result = find_at_hub(tmp_path / "hub", hub.endpoint, HF_HUB_OFFLINE="1")
    assert result["code"] == "weights_missing"
    assert "HF_HUB_OFFLINE" in result["message"]
    assert not hub.requests
