"""Find a model's files, check them, and name what is missing.

A checkpoint is looked for in MODEL_DIR, then in the Hugging Face caches of the machine, and fetched
when a hub answers. A pinned revision is the only one that is taken, and a folder that was named is
never replaced by another place. Nothing here reads tensors: that is `engine.weights`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import SpeechError
from engine.hub import Progress, fetch
from engine.models import ModelSpec

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod puts the model that an endpoint names as its cached model (RunPod docs, "Cached models")."""

OPTIONAL_FILES = (
    "conds.pt",
    "Cangjie5_TC.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "t3_*.yaml",
)
"""Fetched where the repository has them; a model speaks without them."""

_WEIGHT_SUFFIXES = (".safetensors", ".pt")
_LFS_POINTER = b"version https://git-lfs"
_EDGE_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds all of a model's required files.

    Args:
        folder: absolute path.
        spec: the model it was looked up for.
        revision: the commit it was taken from, None for a plain folder.
    """

    folder: Path
    spec: ModelSpec
    revision: str | None = None

    def find(self, name: str) -> Path | None:
        """The file of this name, or for weights its twin in the other format; None when it is not there."""
        return _find_file(self.folder, name)

    def path(self, name: str) -> Path:
        """As `find`.

        Raises:
            SpeechError: weights_missing.
        """
        found = self.find(name)
        if found is None:
            raise SpeechError("weights_missing", f"{self.spec.name}: {name} is not in {self.folder}", "model_dir")
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits that tell checkpoints apart by content, the same wherever the folder lies.

        blake2b over each required file's name, size, first and last MiB and 64 evenly spread blocks of 4 KiB, and for
        safetensors also a block from the middle of every tensor. So any tensor that differs throughout, as after
        training, is seen, at the price of some MiB of reading. It does not guard against tampering. conds.pt is left
        out: a built-in voice does not change what another voice's conditionals are.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in self.spec.required_files:
            path = self.path(name)
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            for sample in _samples(path):
                digest.update(sample)
        return digest.hexdigest()


def find_checkpoint(
    spec: ModelSpec,
    *,
    model_dir: Path | str | None = None,
    revision: str | None = None,
    allow_download: bool = True,
    progress: Progress | None = None,
    cache_dirs: Sequence[Path] | None = None,
) -> Checkpoint:
    """Look in `model_dir`, or else in the caches and then at the hub.

    Weights may be .safetensors or .pt whatever `spec` names; where both are there, the one it names is taken.
    A cached copy is used without asking the hub whether there is a newer one: only a pinned `revision`, or a cleared
    cache, changes what a worker speaks with.

    Args:
        model_dir: the folder to use, and no other place.
        revision: commit, tag or branch; None for the default branch.
        allow_download: whether to fetch from the hub. HF_HUB_OFFLINE=1 forbids it too.
        progress: told (bytes done, bytes in all) while fetching, from the fetching threads.
        cache_dirs: hub caches, by preference; a download goes to the first. None for this machine's.

    Raises:
        SpeechError: weights_missing, naming the model, the files, the places looked in and the command that
            fetches them; invalid_request for a revision that cannot be one, or that contradicts `model_dir`.
    """
    _check_revision(revision)
    if model_dir is not None:
        return _in_folder(spec, Path(model_dir).expanduser().absolute(), revision)
    caches = default_cache_dirs(os.environ) if cache_dirs is None else tuple(cache_dirs)
    looked: list[str] = []
    for cache in caches:
        folder, finding = _in_cache(cache, spec, revision)
        if folder is not None:
            return Checkpoint(folder, spec, folder.name)
        looked.append(f"{cache}: {finding}")
    folder, finding = _from_hub(spec, revision, caches[0], progress) if allow_download else (None, "not asked")
    if folder is not None:
        return Checkpoint(folder, spec, folder.name)
    raise _missing(spec, revision, [*looked, f"hub: {finding}"])


def default_cache_dirs(env: Mapping[str, str]) -> tuple[Path, ...]:
    """The machine's own cache, as huggingface_hub finds it, then RunPod's."""
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    own = Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    return (own,) if own == RUNPOD_CACHE else (own, RUNPOD_CACHE)


def _check_revision(revision: str | None) -> None:
    """A revision becomes part of a path in the cache, so it must not lead out of it."""
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise SpeechError(
            "invalid_request", f"expected a commit, tag or branch as revision, got {revision!r}", "model_revision"
        )


def _in_folder(spec: ModelSpec, folder: Path, revision: str | None) -> Checkpoint:
    commit = folder.name if folder.parent.name == "snapshots" else None
    if revision is not None and revision != commit:
        raise SpeechError(
            "invalid_request",
            f"{folder} is taken as it is; a revision ({revision}) cannot be had there",
            "model_revision",
        )
    try:
        problems = _problems(spec, folder)
    except PermissionError as error:
        problems = [_forbidden(error)]
    if problems:
        raise SpeechError("weights_missing", f"{spec.name}: {folder}: {', '.join(problems)}", "model_dir")
    return Checkpoint(folder, spec, commit)


def _in_cache(cache: Path, spec: ModelSpec, revision: str | None) -> tuple[Path | None, str]:
    """The snapshot folder, or None and why not."""
    repository = cache / f"models--{spec.repo_id.replace('/', '--')}"
    try:
        if not repository.is_dir():
            return None, f"no {spec.repo_id}"
        commit = _cached_commit(repository, revision)
        if commit is None:
            return None, f"no revision {revision or 'main'} of {spec.repo_id}"
        snapshot = (repository / "snapshots" / commit).absolute()
        problems = _problems(spec, snapshot)
    except PermissionError as error:  # a volume on which another user, such as root, keeps files to itself
        return None, _forbidden(error)
    return (None, f"revision {commit}: {', '.join(problems)}") if problems else (snapshot, "complete")


def _cached_commit(repository: Path, revision: str | None) -> str | None:
    """What the cache knows a revision to be. Without a pin, a cache that lost its refs but has one snapshot will do."""
    reference = repository / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    snapshots = repository / "snapshots"
    commits = [folder.name for folder in snapshots.iterdir() if folder.is_dir()] if snapshots.is_dir() else []
    if revision is None:
        return commits[0] if len(commits) == 1 else None
    return revision if revision in commits else None


def _from_hub(spec: ModelSpec, revision: str | None, cache: Path, progress: Progress | None) -> tuple[Path | None, str]:
    """The fetched snapshot's folder, or None and why not."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None, "HF_HUB_OFFLINE is set"
    try:
        folder = fetch(spec.repo_id, revision, (*spec.required_files, *OPTIONAL_FILES), cache, progress)
    except ConnectionError as error:
        return None, str(error)
    problems = _problems(spec, folder)
    return (None, f"{spec.repo_id} there: {', '.join(problems)}") if problems else (folder, "complete")


def _forbidden(error: PermissionError) -> str:
    return f"{error.filename} cannot be read by user {os.geteuid()}, as which this process runs"


def _missing(spec: ModelSpec, revision: str | None, looked: Sequence[str]) -> SpeechError:
    pin = f" --revision {revision}" if revision else ""
    names = " ".join(spec.required_files)
    return SpeechError(
        "weights_missing",
        f"{spec.name}: the weights were not found ({', '.join(spec.required_files)}). "
        f"Looked in {'; '.join(looked)}. "
        f"Fetch them with `make run MODEL={spec.name}`, `python scripts/download_models.py {spec.name}{pin}` or "
        f"`hf download {spec.repo_id} {names} conds.pt{pin}`, "
        "or set MODEL_DIR to a folder that holds them.",
        "model",
    )


# ------------------------------------------------------------------------------- files in a folder


def _find_file(folder: Path, name: str) -> Path | None:
    suffix = Path(name).suffix
    others = [other for other in _WEIGHT_SUFFIXES if other != suffix] if suffix in _WEIGHT_SUFFIXES else []
    candidates = [folder / name, *((folder / name).with_suffix(other) for other in others)]
    return next((path for path in candidates if path.is_file()), None)


def _problems(spec: ModelSpec, folder: Path) -> list[str]:
    """What keeps a folder from being a checkpoint, by file; empty when nothing does."""
    if not folder.is_dir():
        return ["no such folder"]
    found = {name: _find_file(folder, name) for name in spec.required_files}
    missing = [f"{name} is missing" for name, path in found.items() if path is None]
    damaged = [f"{path.name} {damage}" for path in found.values() if path and (damage := _damage(path))]
    return missing + damaged


def _damage(path: Path) -> str | None:
    """What is wrong with a file, as far as its size and first bytes tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if size == 0:
        return "is empty"
    if path.suffix != ".safetensors":
        return None
    try:
        data_start, tensors = _read_header(path)
        expected = data_start + max((end for _, end in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is not a safetensors file"
    return f"is cut short ({size} of {expected} bytes)" if size < expected else None


def _read_header(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where a safetensors file's data starts, and each tensor's first and last byte in it.

    The format: 8 bytes of little-endian length, that much JSON, then the data
    (https://github.com/huggingface/safetensors#format).
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    tensors = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    return 8 + length, tensors


# ------------------------------------------------------------------------------------- fingerprint


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for offset, length in _sample_places(path, size):
            file.seek(offset)
            yield file.read(length)


def _sample_places(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the fingerprint reads, in file order."""
    if size <= 2 * _EDGE_BYTES:
        yield 0, size
        return
    blocks = {_EDGE_BYTES + (size - 2 * _EDGE_BYTES) * index // _NUM_BLOCKS for index in range(_NUM_BLOCKS)}
    if path.suffix == ".safetensors":
        data_start, tensors = _read_header(path)
        blocks |= {data_start + (start + end) // 2 for start, end in tensors.values()}
        yield 0, data_start
    yield 0, _EDGE_BYTES
    yield from ((offset, _BLOCK_BYTES) for offset in sorted(blocks))
    yield size - _EDGE_BYTES, _EDGE_BYTES
