"""The frozen public types of the engine: what goes in, what comes out.

They check themselves when made, so that a request that exists is a request that can be served, and
they hold numpy arrays only: importing them (or a room beside them) never imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from engine import serialization
from engine.errors import SpeechError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

SAMPLE_RATE = 24_000
"""Hz of everything the engine gives out (S3Gen's own rate)."""

COMPACT_MARK = "/16"
"""End of the key of compacted conditionals."""

MAX_SEED = 2**63 - 1
DRAWN_SEED_BITS = 31
"""Seeds that are drawn are short enough to be read out and typed in again."""
UNVERIFIED_MARK = "the audio is watermarked, but too short or silent for the mark to be verified"
"""Warning of a result whose `watermarked` is False though its audio was marked."""


def _frozen(array: NDArray, dtype: type) -> NDArray:
    """A private copy that nobody can write to."""
    copy: NDArray = np.array(array, dtype=dtype, order="C", copy=True)
    copy.setflags(write=False)
    return copy


@dataclass(frozen=True, eq=False)
class VoicePrompt:
    """A recording of the voice to speak with.

    Args:
        audio: float (T,) mono in [-1, 1]; copied and made read-only.
        sample_rate: Hz.

    Raises:
        SpeechError: reference_unreadable when it is not finite mono audio.
    """

    audio: FloatArray
    sample_rate: int

    def __post_init__(self) -> None:
        audio = np.asarray(self.audio)
        if audio.ndim != 1 or audio.size == 0 or not np.issubdtype(audio.dtype, np.floating):
            raise SpeechError(
                "reference_unreadable",
                f"expected float mono audio of shape (T,), got {audio.dtype} {audio.shape}",
                "audio",
            )
        with np.errstate(over="ignore"):
            frozen = _frozen(audio, np.float32)
        if not np.isfinite(frozen).all():
            raise SpeechError("reference_unreadable", "the audio holds NaN or infinity", "audio")
        is_integer = isinstance(self.sample_rate, int | np.integer) and not isinstance(self.sample_rate, bool)
        if not is_integer or not 4_000 <= self.sample_rate <= 384_000:
            raise SpeechError(
                "reference_unreadable",
                f"expected a sample rate from 4000 to 384000 Hz, got {self.sample_rate!r}",
                "sample_rate",
            )
        object.__setattr__(self, "audio", frozen)
        object.__setattr__(self, "sample_rate", int(self.sample_rate))

    @property
    def duration_s(self) -> float:
        return self.audio.size / self.sample_rate

    @functools.cached_property
    def key(self) -> str:
        """Content hash: equal audio at an equal rate has an equal key, on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.sample_rate.to_bytes(4, "little"))
        digest.update(self.audio.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Conditionals:
    """What a voice prompt becomes: all that T3 and S3Gen need to know of a voice.

    Valid for one model family and one checkpoint only; `model_key` says which.

    Args:
        key: the prompt's content hash combined with `model_key`.
        model_key: family, checkpoint fingerprint and preprocessing version.
        speaker_embedding: float32 (256,) voice-encoder embedding, for T3.
        t3_prompt_tokens: int32 (N,) speech tokens of the prompt's start, for T3.
        s3_prompt_tokens: int32 (M,) speech tokens of the decoder reference, for S3Gen.
        s3_prompt_mel: float32 (F, 80) log-mel frames of the decoder reference, 50 per second.
        s3_embedding: float32 (192,) CAMPPlus x-vector, for S3Gen.
    """

    key: str
    model_key: str
    speaker_embedding: FloatArray
    t3_prompt_tokens: IntArray
    s3_prompt_tokens: IntArray
    s3_prompt_mel: FloatArray
    s3_embedding: FloatArray

    def __post_init__(self) -> None:
        for name, dtype in _CONDITIONAL_ARRAYS.items():
            object.__setattr__(self, name, _frozen(getattr(self, name), dtype))
        assert self.speaker_embedding.ndim == 1, self.speaker_embedding.shape
        assert self.s3_prompt_mel.ndim == 2 and self.s3_prompt_mel.shape[1] == 80, self.s3_prompt_mel.shape

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _CONDITIONAL_ARRAYS)

    def compacted(self) -> Conditionals:
        """The same voice as `to_bytes(compact=True)` keeps it: its mel in 16 bits, and a key that says so.

        Nearly the same is not the same: what is cached of one of the two must not serve the other.
        """
        if self.key.endswith(COMPACT_MARK):
            return self
        mel = serialization.on_grid(self.s3_prompt_mel)
        return dataclasses.replace(self, key=self.key + COMPACT_MARK, s3_prompt_mel=mel)

    def to_bytes(self, *, compact: bool = False) -> bytes:
        """Serialise as safetensors: `from_bytes` reads this back exactly, or, from half of the bytes, `compacted()`."""
        kept = self.compacted() if compact else self
        arrays: dict[str, NDArray] = {name: getattr(kept, name) for name in _CONDITIONAL_ARRAYS}
        about: dict[str, object] = {"format": "conditionals/1", "key": kept.key, "model_key": kept.model_key}
        if compact:
            arrays["s3_prompt_mel"], *grid = serialization.to_grid(kept.s3_prompt_mel)
            arrays |= {name: serialization.narrow(arrays[name]) for name in ("t3_prompt_tokens", "s3_prompt_tokens")}
            about |= {"format": "conditionals/2", "mel_grid": grid}
        return serialization.to_bytes(arrays, about)

    @classmethod
    def from_bytes(cls, data: bytes) -> Conditionals:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: when the data is damaged or of another format.
        """
        arrays, about = serialization.from_bytes(data)
        try:
            if about["format"] == "conditionals/2":
                arrays["s3_prompt_mel"] = serialization.from_grid(arrays["s3_prompt_mel"], *about["mel_grid"])
            elif about["format"] != "conditionals/1":
                raise ValueError(f"unknown conditionals format {about['format']!r}")
            return cls(key=about["key"], model_key=about["model_key"], **arrays)
        except (KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"damaged conditionals: {error}") from error


_CONDITIONAL_ARRAYS: Mapping[str, type] = {
    "speaker_embedding": np.float32,
    "t3_prompt_tokens": np.int32,
    "s3_prompt_tokens": np.int32,
    "s3_prompt_mel": np.float32,
    "s3_embedding": np.float32,
}

Voice = VoicePrompt | Conditionals


@dataclass(frozen=True)
class Segment:
    """A stretch of text with its own voice, language or following pause.

    Args:
        text: what to say.
        voice: None for the request's voice.
        language: ISO 639-1 code; None for the request's language.
        pause_after_s: silence after the segment, seconds; None for the default pause.
    """

    text: str
    voice: Voice | None = None
    language: str | None = None
    pause_after_s: float | None = None

    def __post_init__(self) -> None:
        _check_text(self.text)
        _check_voice(self.voice)
        if self.language is not None:
            _check_language(self.language)
        if self.pause_after_s is not None:
            _check_number("pause_after_s", self.pause_after_s, 0.0, 60.0)


@dataclass(frozen=True)
class Range:
    """The values a speech parameter may take."""

    low: float
    high: float
    integer: bool = False


PARAMETERS: Mapping[str, Range] = {
    "temperature": Range(0.05, 5.0),
    "top_p": Range(1e-6, 1.0),
    "top_k": Range(1, 10_000, integer=True),
    "min_p": Range(0.0, 1.0),
    "repetition_penalty": Range(1.0, 5.0),
    "exaggeration": Range(0.0, 2.0),
    "cfg_weight": Range(0.0, 3.0),
    "max_new_tokens": Range(1, 4_000, integer=True),
}
"""Speech parameters of a request and their bounds. What a model does not have is a warning in the
result, never an error (see `ModelSpec.parameters`)."""


@dataclass(frozen=True, kw_only=True)
class SpeechRequest:
    """What to say and how. None means the model's default.

    Args:
        text: what to say, or
        segments: several stretches of text; exactly one of the two.
        voice: a prompt or ready conditionals; None for the model's built-in voice.
        language: ISO 639-1 code.
        seed: 0 to 2**63 - 1; None draws one, which the result names.
        temperature, top_p, top_k, min_p, repetition_penalty: sampling of speech tokens.
        exaggeration: emotion intensity, 0.5 is neutral (original, multilingual).
        cfg_weight: classifier-free guidance of the decoder, 0 turns it off (original, multilingual).
        max_new_tokens: upper bound of speech tokens per chunk (25 per second).
        pronunciations: words to what is said in their place, such as {"SQL": "sequel"}; see `engine.text.Lexicon`.

    Raises:
        SpeechError: text_empty, invalid_request.
    """

    text: str | None = None
    segments: tuple[Segment, ...] = ()
    voice: Voice | None = None
    language: str = "en"
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    exaggeration: float | None = None
    cfg_weight: float | None = None
    max_new_tokens: int | None = None
    pronunciations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments or ()))
        object.__setattr__(self, "pronunciations", _frozen_mapping(self.pronunciations))
        if not all(isinstance(segment, Segment) for segment in self.segments):
            raise SpeechError("invalid_request", "expected segments to be a sequence of Segment", "segments")
        _check_voice(self.voice)
        _check_language(self.language)
        if (self.text is None) == (not self.segments):
            raise SpeechError("invalid_request", "expected exactly one of text and segments", "text")
        if self.text is not None:
            _check_text(self.text)
        _check_seed(self.seed)
        for name, bounds in PARAMETERS.items():
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, bounds.low, bounds.high, integer=bounds.integer)

    @property
    def known_seed(self) -> int:
        """The seed, or one drawn now."""
        return _drawn_seed() if self.seed is None else self.seed

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """The request as segments: `text` is a single one."""
        return self.segments if self.text is None else (Segment(self.text),)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConversionRequest:
    """A recording to say again in another voice.

    Args:
        audio: float (T,) mono in [-1, 1], of any length; copied and made read-only.
        sample_rate: Hz.
        voice: a prompt or ready conditionals; None for the model's built-in voice.
        seed: 0 to 2**63 - 1; None draws one, which the result names.

    Raises:
        SpeechError: reference_unreadable, invalid_request.
    """

    audio: FloatArray
    sample_rate: int
    voice: Voice | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        recording = VoicePrompt(self.audio, self.sample_rate)
        object.__setattr__(self, "audio", recording.audio)
        object.__setattr__(self, "sample_rate", recording.sample_rate)
        _check_voice(self.voice)
        _check_seed(self.seed)

    @property
    def duration_s(self) -> float:
        return self.audio.size / self.sample_rate

    @property
    def known_seed(self) -> int:
        """The seed, or one drawn now."""
        return _drawn_seed() if self.seed is None else self.seed


def _frozen_mapping(pronunciations: object) -> Mapping[str, str]:
    if not isinstance(pronunciations, Mapping):
        raise SpeechError(
            "invalid_request", "pronunciations: expected words to what is said in their place", "pronunciations"
        )
    return MappingProxyType(dict(pronunciations))


def _drawn_seed() -> int:
    return secrets.randbits(DRAWN_SEED_BITS)


def _check_seed(seed: int | None) -> None:
    if seed is not None:
        _check_number("seed", seed, 0, MAX_SEED, integer=True)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise SpeechError("invalid_request", f"expected text, got {type(text).__name__}", "text")
    if not any(character.isalnum() for character in text):
        raise SpeechError("text_empty", "the text holds nothing that can be spoken", "text")


def _check_voice(voice: object) -> None:
    if voice is not None and not isinstance(voice, VoicePrompt | Conditionals):
        raise SpeechError(
            "invalid_request", f"expected a VoicePrompt or Conditionals, got {type(voice).__name__}", "voice"
        )


def _check_language(language: object) -> None:
    if not isinstance(language, str):
        raise SpeechError("invalid_request", f"expected a language code, got {type(language).__name__}", "language")


def _check_number(name: str, value: object, low: float, high: float, *, integer: bool = False) -> None:
    expected = f"expected {'an integer' if integer else 'a number'} from {low:g} to {high:g}"
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise SpeechError("invalid_request", f"{name}: {expected}, got {value!r}", name)
    if value != value or not low <= value <= high:  # NaN is not itself; integers may be beyond float's range
        raise SpeechError("invalid_request", f"{name}: {expected}, got {value!r}", name)


@dataclass(frozen=True)
class Chunk:
    """One stretch of text as it was spoken.

    Args:
        index: position in the request, from 0.
        text: the text as the caller wrote it.
        start_s, end_s: where it lies in the waveform, seconds.
        attempts: how often it was decoded.
        flags: what the guard found in the kept attempt, empty when all is well.
    """

    index: int
    text: str
    start_s: float
    end_s: float
    attempts: int = 1
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Speech:
    """A finished utterance.

    Args:
        waveform: float32 (T,) mono in [-1, 1].
        sample_rate: Hz.
        chunks: the spoken stretches of text, in order; of a converted recording its pieces, their text empty.
        seed: the seed that gives this audio again.
        model: the name of the model that spoke.
        watermarked: whether the Perth watermark is in the audio and was found there.
        timings: seconds by stage (queue, condition, prefill, decode, vocode, master, total).
        warnings: what was asked for and could not be done, in words.
    """

    waveform: FloatArray
    sample_rate: int
    chunks: tuple[Chunk, ...]
    seed: int
    model: str
    watermarked: bool
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        return self.waveform.size / self.sample_rate


@dataclass(frozen=True, eq=False)
class SpeechPiece:
    """A piece of a stream. Pieces follow each other without gap; the last is `final`.

    Args:
        seq: position in the stream, from 0.
        waveform: float32 (T,) mono.
        sample_rate: Hz.
        final: whether the stream ends here.
        num_chunks_done, num_chunks: how many of the request's chunks are spoken to their end by now, and of how many.
        speech: on the final piece, the whole result; its waveform is empty (the pieces carry it).
    """

    seq: int
    waveform: FloatArray
    sample_rate: int
    final: bool
    num_chunks_done: int = 0
    num_chunks: int = 0
    speech: Speech | None = None


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is loaded.

    Args:
        model: a name of `engine.models.MODELS`, or "draft".
        model_dir: folder with the weights; None looks in the Hugging Face cache, then downloads.
        model_revision: hub revision (commit, tag or branch); None for the default branch.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto", "float32", "bfloat16" of T3 and the flow, or "float16" of T3's matrices on an x86 CPU; the
            vocoder stays float32.
        max_rows: chunks decoded at once; None chooses from the device's memory.
        max_queued: requests that may wait or run at once; one more is refused.
        use_graphs: capture CUDA graphs of the decoding step (off for debugging).
        watermark: mark all audio. Turning it off is for measurements only.
        max_chunk_chars: the longest stretch of text decoded at once.
        num_threads: CPU threads; None chooses from the machine.
        allow_download: whether a missing checkpoint may be fetched from the hub.
    """

    model: str = "turbo"
    model_dir: Path | str | None = None
    model_revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_rows: int | None = None
    max_queued: int = 10_000
    use_graphs: bool = True
    watermark: bool = True
    max_chunk_chars: int = 280
    num_threads: int | None = None
    allow_download: bool = True

    def __post_init__(self) -> None:
        if self.model_dir is not None:
            if not isinstance(self.model_dir, str | Path):
                raise SpeechError("invalid_request", f"model_dir: expected a path, got {self.model_dir!r}", "model_dir")
            object.__setattr__(self, "model_dir", Path(self.model_dir))
        for name in ("model", "device", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise SpeechError("invalid_request", f"{name}: expected text, got {getattr(self, name)!r}", name)
        for name in ("watermark", "use_graphs", "allow_download"):
            if not isinstance(getattr(self, name), bool):
                raise SpeechError(
                    "invalid_request", f"{name}: expected True or False, got {getattr(self, name)!r}", name
                )
        if self.num_threads is not None:
            _check_number("num_threads", self.num_threads, 1, 1024, integer=True)
        _check_number("max_queued", self.max_queued, 1, 10_000_000, integer=True)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SpeechError(
                "invalid_request", f"expected dtype auto, float32, bfloat16 or float16, got {self.dtype!r}", "dtype"
            )
        if self.max_rows is not None:
            _check_number("max_rows", self.max_rows, 1, 4096, integer=True)
        _check_number("max_chunk_chars", self.max_chunk_chars, 40, 1000, integer=True)

    def replace(self, **changes: object) -> EngineConfig:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
