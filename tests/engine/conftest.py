"""Tiny checkpoints and upstream's own modules, made once per test session and then shared.

Treat what these fixtures give as read-only: the folders and modules serve every test of the session.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from engine.random_checkpoint import PlantedSpeech, Size, UpstreamModels, load_upstream, write_checkpoint

if TYPE_CHECKING:
    from engine.t3.model import T3

Checkpoint = Callable[[str], Path]
PlantedCheckpoint = Callable[[str, PlantedSpeech], Path]
Upstream = Callable[[str], UpstreamModels]


class LoadT3(Protocol):
    """What `tiny_t3` gives."""

    def __call__(self, model: str, plan: PlantedSpeech | None = None) -> T3: ...


@pytest.fixture(scope="session")
def checkpoint_root() -> Iterator[Path]:
    """A folder that goes with the session: a tiny checkpoint is up to 230 MB, too much to leave behind."""
    with tempfile.TemporaryDirectory(prefix="tiny-checkpoints-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Size:
    """Of the random checkpoints: tiny, or `--size full` for a comparison with upstream by hand."""
    wanted: Size = pytestconfig.getoption("--size")
    return wanted


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_root: Path, size: Size) -> Checkpoint:
    """model name → folder with a tiny random checkpoint of it."""

    @functools.cache
    def write(model: str) -> Path:
        return write_checkpoint(checkpoint_root / model, model, size=size)

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
def tiny_upstream(tiny_checkpoint: Checkpoint, size: Size) -> Upstream:
    """model name → upstream's own modules with the weights of that model's `tiny_checkpoint`."""

    @functools.cache
    def load(model: str) -> UpstreamModels:
        return load_upstream(tiny_checkpoint(model), model, size)

    return load


@pytest.fixture(scope="session")
def tiny_t3(checkpoint_root: Path) -> LoadT3:
    """(model name, plan) → our T3 of tiny random or planted weights, from a folder that holds nothing else."""

    @functools.cache
    def load(model: str, plan: PlantedSpeech | None = None) -> T3:
        from safetensors.torch import save_file

        from engine.models import get_model
        from engine.random_checkpoint import build_upstream_t3
        from engine.random_checkpoint.planted import plant
        from engine.random_checkpoint.values import random_state
        from tests.engine.support import load_our_t3

        state = random_state(build_upstream_t3(model, device="meta"), seed=0)
        if plan is not None:
            plant(state, plan, seed=0)
        folder = Path(tempfile.mkdtemp(prefix=f"{model}-t3-", dir=checkpoint_root))
        save_file(state, folder / get_model(model).t3_file)
        return load_our_t3(folder, model)

    return load
