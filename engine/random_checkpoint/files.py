"""The checkpoint folder itself: written as upstream publishes it, read as upstream reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models import SPEECH_VOCAB_SIZE, ModelSpec, get_model
from engine.random_checkpoint.modules import (
    Size,
    build_upstream_s3gen,
    build_upstream_t3,
    build_upstream_voice_encoder,
)
from engine.random_checkpoint.planted import PlantedSpeech, plant
from engine.random_checkpoint.values import generator, random_state
from engine.upstream import chatterbox

if TYPE_CHECKING:
    from torch import Tensor

_COMPUTED_BUFFERS = ("tokenizer._mel_filters", "tokenizer.window")
"""Upstream's S3Gen.ignore_state_dict_missing: absent from original's file, present in the others."""

_PROMPT_TOKENS = {"tiny": 50, "full": 250}
"""Speech tokens of the built-in voice's decoder reference: 2 s keeps tests quick, 10 s is upstream's most."""


def write_checkpoint(
    folder: Path, model: str, *, size: Size = "tiny", seed: int = 0, plan: PlantedSpeech | None = None
) -> Path:
    """Write a complete checkpoint of random weights in upstream's layout, one file after another.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        model: a name of `engine.models.MODELS`.
        size: "tiny" for tests, "full" for the published shapes.
        seed: the same seed writes the same weights.
        plan: what T3 shall say; None leaves it random, and it will hardly ever stop by itself.

    Returns:
        The folder.
    """
    spec = get_model(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_t3(folder / spec.t3_file, spec, size, seed, plan)
    _write_s3gen(folder / spec.s3gen_file, spec, size, seed)
    _save(random_state(build_upstream_voice_encoder("meta"), seed), folder / spec.voice_encoder_file)
    _write_conditionals(folder / "conds.pt", spec, size, seed)
    _write_tokenizer(folder, spec)
    return folder


def _write_t3(path: Path, spec: ModelSpec, size: Size, seed: int, plan: PlantedSpeech | None) -> None:
    state = random_state(build_upstream_t3(spec.name, size, "meta"), seed)
    if plan is not None:
        plant(state, plan, seed)
    _save(state, path)


def _write_s3gen(path: Path, spec: ModelSpec, size: Size, seed: int) -> None:
    state = random_state(build_upstream_s3gen(spec.name, size, "meta"), seed)
    if _loads_loosely(spec):
        for name in _COMPUTED_BUFFERS:
            del state[name]
    _save(state, path)


def _loads_loosely(spec: ModelSpec) -> bool:
    """Whether upstream loads the S3Gen file with strict=False."""
    return spec.s3gen_file == "s3gen.safetensors"


def _save(state: dict[str, Tensor], path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def _write_conditionals(path: Path, spec: ModelSpec, size: Size, seed: int) -> None:
    """The built-in voice, in the layout of upstream's `Conditionals.save`."""
    import torch

    source = generator("conds", seed)
    num_tokens = _PROMPT_TOKENS[size]
    cond = chatterbox("models.t3.modules.cond_enc").T3Cond(
        speaker_emb=torch.nn.functional.normalize(torch.rand(1, 256, generator=source)),
        cond_prompt_speech_tokens=_speech_tokens(spec.max_prompt_tokens, source),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    gen = {
        "prompt_token": _speech_tokens(num_tokens, source),
        "prompt_token_len": torch.tensor([num_tokens]),
        "prompt_feat": torch.randn(1, 2 * num_tokens, 80, generator=source) * 2 - 5,  # log-mel of speech
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192, generator=source),
    }
    torch.save({"t3": cond.__dict__, "gen": gen}, path)


def _speech_tokens(count: int, source: Any) -> Tensor:
    import torch

    return torch.randint(SPEECH_VOCAB_SIZE, (1, count), generator=source)


def _write_tokenizer(folder: Path, spec: ModelSpec) -> None:
    from engine import random_tokenizers

    if spec.family == "turbo":
        random_tokenizers.write_turbo_tokenizer(folder)
    elif spec.family == "multilingual":
        random_tokenizers.write_multilingual_tokenizer(folder)
    else:
        random_tokenizers.write_original_tokenizer(folder)


@dataclass(frozen=True, eq=False)
class UpstreamModels:
    """Upstream's own modules with a checkpoint's weights, on the CPU in eval mode.

    Args:
        t3: upstream's T3 (Turbo and Nano without `tfmr.wte`, as upstream leaves it).
        s3gen: upstream's S3Gen.
        voice_encoder: upstream's VoiceEncoder.
        conds: upstream's Conditionals of the built-in voice.
    """

    t3: Any
    s3gen: Any
    voice_encoder: Any
    conds: Any


def load_upstream(folder: Path, model: str, size: Size = "tiny") -> UpstreamModels:
    """Load a folder into upstream's modules with the strictness of upstream's `from_local`.

    Raises:
        RuntimeError: when names or shapes do not fit.
    """
    spec = get_model(model)
    t3 = build_upstream_t3(model, size)
    t3.load_state_dict(_load(folder / spec.t3_file))
    if spec.backbone == "gpt2":
        del t3.tfmr.wte
    s3gen = build_upstream_s3gen(model, size)
    s3gen.load_state_dict(_load(folder / spec.s3gen_file), strict=not _loads_loosely(spec))
    voice_encoder = build_upstream_voice_encoder()
    voice_encoder.load_state_dict(_load(folder / spec.voice_encoder_file))
    conds = chatterbox("tts").Conditionals.load(folder / "conds.pt")
    return UpstreamModels(t3.eval(), s3gen.eval(), voice_encoder.eval(), conds)


def _load(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
