"""Fetch a checkpoint from a Hugging Face hub, quickly or not at all.

huggingface_hub is imported when something is to be fetched, and its own progress bars and retries
are kept out: a worker's log stays clean, and a hub that is down is said to be down within seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all); the total grows while the files are looked up."""

HUB_TIMEOUT_S = 5.0
"""How long a hub may take to say that it is there."""


def fetch(repo_id: str, revision: str | None, patterns: Sequence[str], cache: Path, progress: Progress | None) -> Path:
    """Fetch the files that match `patterns` into a hub cache; what lies there already is not fetched again.

    Returns:
        The snapshot's folder, named after its commit.

    Raises:
        ConnectionError: no answer, no such repository or revision, no permission, or no space; the message says which.
    """
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Asked first and once: snapshot_download retries for half a minute where nobody listens.
        commit = HfApi().model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S).sha
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            etag_timeout=HUB_TIMEOUT_S,
            tqdm_class=_bar_class(progress),
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise ConnectionError(f"{repo_id}: {_first_line(error)}") from error
    if Path(folder).name != commit:  # the hub went away in between and an older copy was handed out
        raise ConnectionError(f"{repo_id}: the hub stopped answering")
    return Path(folder).absolute()


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


def _first_line(error: Exception) -> str:
    """The hub client explains itself over many lines; its first one says what happened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
