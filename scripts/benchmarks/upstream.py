"""Upstream's own classes, quiet, with the conditionals of the checkpoint's built-in voice ready-made."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.random_checkpoint import UpstreamModels, load_upstream, t3_config
from engine.upstream import chatterbox
from scripts.benchmarks.options import Options

_CLASSES = {
    "original": ("tts", "ChatterboxTTS"),
    "multilingual": ("mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("tts_turbo", "ChatterboxTurboTTS"),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what upstream prints and warns of out of our table (its progress bars: see `silence_progress_bars`)."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_modules(options: Options, folder: Path) -> UpstreamModels:
    """Upstream's modules on the benchmark's device.

    Multilingual in the release adds an alignment analyzer, which forces a slow attention and changes when
    speech ends. It is left out, in upstream's favour: with it the two sides would not say the same tokens.
    """
    with quiet():
        models = load_upstream(folder, options.model, options.size)
        if options.spec.family == "multilingual":
            models.t3.hp = t3_config("original")
        for module in (models.t3, models.s3gen, models.voice_encoder, models.conds):
            module.to(options.place)
    return models


def load_speaker(options: Options, folder: Path) -> Any:
    """Upstream's ChatterboxTTS, ChatterboxTurboTTS or ChatterboxMultilingualTTS with a folder's weights.

    Put together from its parts as its `from_local` does, because that knows neither the tiny sizes nor Nano.
    """
    models = load_modules(options, folder)
    kind = upstream_class(options.spec.family)
    with quiet():
        tokenizer = _load_tokenizer(options, folder)
        return kind(models.t3, models.s3gen, models.voice_encoder, tokenizer, str(options.place), conds=models.conds)


def upstream_class(family: str) -> Any:
    module, name = _CLASSES[family]
    return getattr(chatterbox(module), name)


def _load_tokenizer(options: Options, folder: Path) -> Any:
    if options.spec.family == "turbo":
        tokenizer = chatterbox("tts_turbo").AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    name = "MTLTokenizer" if options.spec.family == "multilingual" else "EnTokenizer"
    return getattr(chatterbox("models.tokenizers"), name)(str(folder / options.spec.tokenizer_files[0]))


def generate(speaker: Any, text: str) -> Any:
    """One call of upstream's `generate` with its own defaults: float32 (samples,)."""
    language = {"language_id": "en"} if type(speaker).__name__ == "ChatterboxMultilingualTTS" else {}
    with quiet():
        return speaker.generate(text, **language)[0]
