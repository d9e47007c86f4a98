"""Tiny checkpoints and upstream's own modules, made once per test session and then shared.

Treat what these fixtures give as read-only: the folders and modules serve every test of the session.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.random_checkpoint import PlantedSpeech, UpstreamModels, load_upstream, write_checkpoint

Checkpoint = Callable[[str], Path]
PlantedCheckpoint = Callable[[str, PlantedSpeech], Path]
Upstream = Callable[[str], UpstreamModels]


@pytest.fixture(scope="session")
def checkpoint_root() -> Iterator[Path]:
    """A folder that goes with the session: a tiny checkpoint is up to 230 MB, too much to leave behind."""
    with tempfile.TemporaryDirectory(prefix="tiny-checkpoints-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_root: Path) -> Checkpoint:
    """model name → folder with a tiny random checkpoint of it."""

    @functools.cache
    def write(model: str) -> Path:
        return write_checkpoint(checkpoint_root / model, model)

    return write


@pytest.fixture(scope="session")
def planted_checkpoint(checkpoint_root: Path) -> PlantedCheckpoint:
    """(model name, plan) → folder with a tiny checkpoint that says just that."""

    @functools.cache
    def write(model: str, plan: PlantedSpeech) -> Path:
        folder = tempfile.mkdtemp(prefix=f"{model}-planted-", dir=checkpoint_root)
        return write_checkpoint(Path(folder), model, plan=plan)

    return write


@pytest.fixture(scope="session")
def tiny_upstream(tiny_checkpoint: Checkpoint) -> Upstream:
    """model name → upstream's own modules with the weights of that model's `tiny_checkpoint`."""

    @functools.cache
    def load(model: str) -> UpstreamModels:
        return load_upstream(tiny_checkpoint(model), model)

    return load
