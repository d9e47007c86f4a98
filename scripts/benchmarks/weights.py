"""Checkpoints of random weights, written once to a cache folder and used by both sides.

Two kinds: all random, for decoding and rendering by themselves; and with a T3 that says a known number of
tokens and then stops, for whole utterances (random weights hardly ever stop). The second shares all other
files with the first. Written under a temporary name, so that an interrupted run leaves nothing half done.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.models import SILENCE_TOKEN, SPEECH_VOCAB_SIZE
from scripts.benchmarks.options import Options


def random_checkpoint(options: Options) -> Path:
    """The folder with random weights."""
    from engine.random_checkpoint import write_checkpoint

    def write(folder: Path) -> None:
        write_checkpoint(folder, options.model, size=options.size, seed=options.seed)

    return _once(_folder(options), write)


def speaking_checkpoint(options: Options, num_tokens: int) -> Path:
    """The folder whose T3 says exactly so many tokens, whatever the text and the voice, and stops."""
    source = random_checkpoint(options)

    def write(folder: Path) -> None:
        for file in source.iterdir():
            if file.name != options.spec.t3_file:
                _link(file, folder / file.name)
        _write_planted(source / options.spec.t3_file, folder / options.spec.t3_file, num_tokens, options.seed)

    return _once(_folder(options, f"says-{num_tokens}"), write)


def _write_planted(source: Path, target: Path, num_tokens: int, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    from engine.random_checkpoint import PlantedSpeech
    from engine.random_checkpoint.planted import plant

    state = load_file(source)
    plant(state, PlantedSpeech(distinct_tokens(num_tokens, seed)), seed)
    save_file(state, target)


def distinct_tokens(count: int, seed: int) -> tuple[int, ...]:
    """Different speech tokens, without the one of silence."""
    import numpy as np

    drawn = np.random.default_rng(seed).permutation(SPEECH_VOCAB_SIZE)
    return tuple(int(token) for token in drawn if token != SILENCE_TOKEN)[:count]


def _folder(options: Options, *suffixes: str) -> Path:
    seed = (f"seed-{options.seed}",) if options.seed else ()
    return options.cache_dir / "-".join((options.model, options.size, *seed, *suffixes))


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _link(source: Path, target: Path) -> None:
    """A second name for a file of up to a gigabyte, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
