"""The facts of each Chatterbox family member, in one table.

Adding a fine-tune is adding a row here, or pointing MODEL_DIR at its folder with MODEL naming the
family it was made from. Sizes (layers, widths) are not here: they are read from the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import SpeechError

SPEECH_TOKEN_RATE = 25
"""Speech tokens per second of audio (S3 tokenizer v2, 25 Hz)."""

SPEECH_VOCAB_SIZE = 6561
"""3**8 codes of the S3 tokenizer; ids from here on are control tokens."""

START_SPEECH_TOKEN = 6561
STOP_SPEECH_TOKEN = 6562
SILENCE_TOKEN = 4299
"""The speech token of silence that Turbo and Nano append before S3Gen (upstream's S3GEN_SIL)."""

START_TEXT_TOKEN = 255
STOP_TEXT_TOKEN = 0


@dataclass(frozen=True)
class SamplingDefaults:
    """Upstream's own defaults; None where the model has no such parameter."""

    temperature: float
    top_p: float
    repetition_penalty: float
    top_k: int | None = None
    min_p: float | None = None
    exaggeration: float | None = None
    cfg_weight: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One family member.

    Args:
        name: what MODEL is set to.
        family: original, multilingual or turbo; members of a family share code paths.
        repo_id: Hugging Face repository.
        t3_file, s3gen_file, voice_encoder_file: weight files in the checkpoint folder.
        tokenizer_files: files the text front end reads.
        text_vocab_size: rows of T3's text embedding.
        backbone: "llama" (RoPE, learned input positions, perceiver) or "gpt2".
        meanflow: S3Gen's flow is distilled to two mean-flow steps without CFG.
        num_flow_steps: Euler steps of the flow.
        encoder_reference_s: seconds of the prompt that T3 hears.
        decoder_reference_s: seconds of the prompt that S3Gen hears.
        min_reference_s: shortest prompt the model takes.
        max_prompt_tokens: most speech tokens of the prompt that T3 sees.
        reference_lufs: loudness the prompt is brought to first, or None.
        sampling: defaults; a parameter that is None there does not exist for the model.
        languages: ISO 639-1 codes.
        trim_last_token: cut the audio of the last token, which decodes to noise (multilingual).
    """

    name: str
    family: str
    repo_id: str
    t3_file: str
    s3gen_file: str
    voice_encoder_file: str
    tokenizer_files: tuple[str, ...]
    text_vocab_size: int
    backbone: str
    meanflow: bool
    num_flow_steps: int
    encoder_reference_s: float
    decoder_reference_s: float
    min_reference_s: float
    max_prompt_tokens: int
    reference_lufs: float | None
    sampling: SamplingDefaults
    languages: tuple[str, ...]
    trim_last_token: bool = False

    @property
    def required_files(self) -> tuple[str, ...]:
        """Files without which the model cannot speak. conds.pt (the built-in voice) is optional."""
        return (self.t3_file, self.s3gen_file, self.voice_encoder_file, *self.tokenizer_files)

    @property
    def parameters(self) -> frozenset[str]:
        """Speech parameters that this model has."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "exaggeration", "cfg_weight")
        return frozenset({name for name in names if getattr(self.sampling, name) is not None} | {"max_new_tokens"})

    @property
    def uses_cfg(self) -> bool:
        return self.sampling.cfg_weight is not None


_ENGLISH = ("en",)
_MULTILINGUAL = (
    *("ar", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "it", "ja"),
    *("ko", "ms", "nl", "no", "pl", "pt", "ru", "sv", "sw", "tr", "zh"),
)
_LLAMA_SAMPLING = SamplingDefaults(
    temperature=0.8, top_p=1.0, repetition_penalty=1.2, min_p=0.05, exaggeration=0.5, cfg_weight=0.5
)
_GPT2_SAMPLING = SamplingDefaults(temperature=0.8, top_p=0.95, repetition_penalty=1.2, top_k=1000)
_GPT2_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")


def _original(name: str, **changes: object) -> ModelSpec:
    facts: dict[str, object] = {
        "family": "original",
        "repo_id": "ResembleAI/chatterbox",
        "t3_file": "t3_cfg.safetensors",
        "s3gen_file": "s3gen.safetensors",
        "voice_encoder_file": "ve.safetensors",
        "tokenizer_files": ("tokenizer.json",),
        "text_vocab_size": 704,
        "backbone": "llama",
        "meanflow": False,
        "num_flow_steps": 10,
        "encoder_reference_s": 6.0,
        "decoder_reference_s": 10.0,
        "min_reference_s": 1.0,
        "max_prompt_tokens": 150,
        "reference_lufs": None,
        "sampling": _LLAMA_SAMPLING,
        "languages": _ENGLISH,
    }
    return ModelSpec(name=name, **(facts | changes))  # type: ignore[arg-type]


def _multilingual(name: str, t3_file: str) -> ModelSpec:
    return _original(
        name,
        family="multilingual",
        t3_file=t3_file,
        s3gen_file="s3gen.pt",
        voice_encoder_file="ve.pt",
        tokenizer_files=("grapheme_mtl_merged_expanded_v1.json",),
        text_vocab_size=2454,
        languages=_MULTILINGUAL,
        trim_last_token=True,
    )


def _turbo(name: str, repo_id: str, t3_file: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="turbo",
        repo_id=repo_id,
        t3_file=t3_file,
        s3gen_file="s3gen_meanflow.safetensors",
        voice_encoder_file="ve.safetensors",
        tokenizer_files=_GPT2_TOKENIZER,
        text_vocab_size=50276,
        backbone="gpt2",
        meanflow=True,
        num_flow_steps=2,
        encoder_reference_s=15.0,
        decoder_reference_s=10.0,
        min_reference_s=5.0,
        max_prompt_tokens=375,
        reference_lufs=-27.0,
        sampling=_GPT2_SAMPLING,
        languages=_ENGLISH,
    )


MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _turbo("turbo", "ResembleAI/chatterbox-turbo", "t3_turbo_v1.safetensors"),
        _turbo("nano", "ResembleAI/chatterbox-nano", "t3_nano_v1.safetensors"),
        _original("original"),
        _multilingual("multilingual", "t3_mtl23ls_v2.safetensors"),
        _multilingual("multilingual-v3", "t3_mtl23ls_v3.safetensors"),
    )
}

DRAFT = "draft"
"""The weightless voice (see `engine.draft`); it has no row because it has no checkpoint."""


def get_model(name: str) -> ModelSpec:
    """Look a model up by name.

    Raises:
        SpeechError: model_unavailable, listing the names there are.
    """
    if name not in MODELS:
        raise SpeechError(
            "model_unavailable", f"unknown model {name!r}; expected one of {', '.join([*MODELS, DRAFT])}", "model"
        )
    return MODELS[name]
