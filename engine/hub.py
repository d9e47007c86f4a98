"""Fetch a checkpoint from a Hugging Face hub, quickly or not at all.

huggingface_hub is imported when something is to be fetched, and its own progress bars and retries
are kept out: a worker's log stays clean, and a hub that is down is said to be down within seconds.

`fetch` is what a worker does at its start. `list_files`, `download` and `download_to_cache` are for those who
prepare weights: they go on with half a file where they were cut off, which the hub's client does not, and
compare every file with what the hub says of its content.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.manifest import sha256_of

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all); the total grows while the files are looked up."""

HUB_TIMEOUT_S = 5.0
"""How long a hub may take to say that it is there."""


def fetch(
    repo_id: str,
    revision: str | None,
    patterns: Sequence[str],
    cache: Path,
    progress: Progress | None,
    token: str | None = None,
) -> Path:
    """Fetch the files that match `patterns` into a hub cache; what lies there already is not fetched again.

    Args:
        token: of the hub; None for the one that the hub's client finds, if any.

    Returns:
        The snapshot's folder, named after its commit.

    Raises:
        ConnectionError: no answer, no such repository or revision, no permission, or no space; the message says which.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _told_plainly(repo_id, revision):
        # Asked first and once: snapshot_download retries for half a minute where nobody listens.
        commit = HfApi(token=token).model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S).sha
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            etag_timeout=HUB_TIMEOUT_S,
            tqdm_class=_bar_class(progress),
            token=token,
        )
    if Path(folder).name != commit:  # the hub went away in between and an older copy was handed out
        raise ConnectionError(f"{repo_id}: the hub stopped answering")
    return Path(folder).absolute()


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it.

    Args:
        name: its path in the repository.
        size: bytes.
        sha256: of its content, in hex, for large files (Git LFS); None for small ones.
        blob_id: Git's SHA-1 of it; of a large one, of the pointer to it.
    """

    name: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def etag(self) -> str:
        """What the hub calls its content, and a hub cache the file that holds it."""
        return self.sha256 or self.blob_id

    def is_content_of(self, path: Path) -> bool:
        """Whether a local file holds it, byte for byte."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return self.etag == (sha256_of(path) if self.sha256 else _git_blob_id(path))


@dataclass(frozen=True)
class Listing:
    """Files of a repository at one commit."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def list_files(repo_id: str, revision: str | None, patterns: Sequence[str], token: str | None = None) -> Listing:
    """Ask the hub for the files that match `patterns`.

    Raises:
        ConnectionError: as `fetch`.
    """
    from huggingface_hub import HfApi

    with _told_plainly(repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S, files_metadata=True)
        wanted = [
            sibling
            for sibling in info.siblings or ()
            if any(fnmatch.fnmatchcase(sibling.rfilename, pattern) for pattern in patterns)
        ]
        if info.sha is None or any(sibling.size is None or sibling.blob_id is None for sibling in wanted):
            raise ValueError("the hub does not say what its files are")
        files = [
            RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id or "")
            for each in wanted
        ]
    return Listing(repo_id, info.sha, tuple(files))


def download(listing: Listing, path_of: Callable[[RemoteFile], Path], progress: Progress, token: str | None) -> None:
    """Fetch what is not there yet, each file to its place once it is whole and its content is the hub's.

    Half a file stays beside its place when the connection breaks for good, and is gone on with the next time.

    Raises:
        ConnectionError: as `fetch`; or a file did not arrive as the hub describes it, or is being fetched by another
            process.
    """
    num_done = 0
    for file in listing.files:
        path = path_of(file)
        if not file.is_content_of(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _told_plainly(listing.repository, listing.commit):
                _download_file(listing, file, path, _shifted(progress, num_done, listing.num_bytes), token)
        num_done += file.size
        progress(num_done, listing.num_bytes)


def download_to_cache(
    listing: Listing, revision: str | None, cache: Path, progress: Progress, token: str | None
) -> Path:
    """As `download`, into a hub cache, where whoever asks for the revision finds it.

    Returns:
        The snapshot's folder, named after its commit.
    """
    blobs = cache / f"models--{listing.repository.replace('/', '--')}" / "blobs"
    download(listing, lambda file: blobs / file.etag, progress, token)
    # The contents are there; the hub's client adds the revision and the names.
    names = [file.name for file in listing.files]
    folder = fetch(listing.repository, revision, names, cache, None, token)
    if folder.name != listing.commit:
        raise ConnectionError(f"{listing.repository}: it changed while it was being fetched; fetch it again")
    return folder


def _shifted(progress: Progress, num_before: int, total: int) -> Progress:
    """One file's progress as that of all."""
    return lambda num_done, _: progress(num_before + num_done, total)


def _download_file(listing: Listing, file: RemoteFile, path: Path, progress: Progress, token: str | None) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repository, file.name, revision=listing.commit)
    # Uncompressed: a place in the file is one in what comes.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    part = path.with_name(f".{path.name}.{file.etag[:12]}.part")  # of other content, another file
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{file.name} is being fetched by another process") from error
        if stream.tell() > file.size:
            stream.truncate(0)
            stream.seek(0)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.size,
            tqdm_class=_bar_class(progress),
        )
        stream.flush()
        os.fsync(stream.fileno())
        if not file.is_content_of(part):  # still locked: nobody takes the file for half of one meanwhile
            part.unlink()
            raise ValueError(f"{file.name} arrived damaged: its content is not what the hub says it is; fetch it again")
        part.replace(path)


def _git_blob_id(path: Path) -> str:
    """Git's name of a file's content (git-scm.com/book, "Git Objects")."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def download_bar(label: str) -> Iterator[Progress]:
    """A progress bar on standard error, for a person at a terminal: `with download_bar("nano") as progress:`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _bar_class(progress: Progress | None) -> type[Any]:
    """A tqdm class that draws nothing and tells `progress` how far the bytes have come.

    The hub's client draws one bar of files and one or two of bytes (received, written), whose totals it sets later.
    """
    from tqdm import tqdm

    lock, bars = threading.Lock(), []

    class Listener(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))
            self.counts_bytes = kwargs.get("unit") == "B"
            if self.counts_bytes:
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if progress is not None and self.counts_bytes:
                    progress(int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars)))

    return Listener


@contextlib.contextmanager
def _told_plainly(repo_id: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as a ConnectionError of one line."""
    import httpx
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except RevisionNotFoundError as error:
        raise ConnectionError(f"{repo_id}: no revision {revision} there") from error
    except GatedRepoError as error:
        raise ConnectionError(f"{repo_id}: access has to be granted there, and HF_TOKEN set") from error
    except RepositoryNotFoundError as error:
        raise ConnectionError(f"{repo_id}: no such repository, or one that needs a token (HF_TOKEN)") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise ConnectionError(f"{repo_id}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The hub client explains itself over many lines; its first one says what happened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
