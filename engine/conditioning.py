"""From a recording of a voice to what T3 and S3Gen need to know of it.

Upstream prepares a voice from a file, and writes the result on the shared model. Here it is a function of
an audio array: the same steps with the same numbers (upstream's `prepare_conditionals` and
`S3Token2Mel.embed_ref`), through upstream's networks, with no file, no print and nothing kept between
calls. The three networks are small beside the rest of a checkpoint and are loaded by themselves.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint import Checkpoint
from engine.errors import SpeechError
from engine.models import SPEECH_VOCAB_SIZE, ModelSpec
from engine.types import SAMPLE_RATE, Conditionals, FloatArray, VoicePrompt
from engine.upstream import chatterbox

if TYPE_CHECKING:
    from torch import Tensor

    from engine.weights import WeightFile

PREPROCESSING_VERSION = 1
"""Raised whenever the same prompt would give other conditionals than before, so that kept ones are not used."""

ENCODER_RATE = 16_000
"""Hz of what the speech tokenizer, the speaker encoder and the voice encoder hear (upstream's S3_SR)."""

SILENCE_PEAK = 10 ** (-60 / 20)
"""Below -60 dBFS nothing of a voice is left to imitate."""

_HEAD_WIDTH = 64
_MEL_FLOOR = 1e-5


def model_key(spec: ModelSpec, fingerprint: str) -> str:
    """What conditionals are valid for: a family's checkpoint, prepared by this version of the code."""
    return f"{spec.family}/{fingerprint}/{PREPROCESSING_VERSION}"


def conditionals_key(prompt: VoicePrompt, spec: ModelSpec, fingerprint: str) -> str:
    """The key that a prompt's conditionals will have, known before they are computed."""
    return key_of(prompt.key, model_key(spec, fingerprint))


def key_of(prompt_key: str, model_key: str) -> str:
    """The key of the conditionals that a prompt of this content hash has for this checkpoint."""
    return _digest(prompt_key, model_key)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ the audio


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt as the networks hear it.

    Args:
        audio_24k: float32 (T,) at 24 kHz, whole.
        audio_16k: float32 (2T/3,), the same at 16 kHz.
    """

    audio_24k: FloatArray
    audio_16k: FloatArray


def prepare_reference(prompt: VoicePrompt, spec: ModelSpec) -> Reference:
    """Resample a prompt as `librosa.load(path, sr=24000)` does a file, and bring it to the model's loudness.

    Raises:
        SpeechError: reference_too_short, reference_silent.
    """
    if prompt.duration_s <= spec.min_reference_s:
        raise SpeechError(
            "reference_too_short",
            f"expected more than {spec.min_reference_s:g} s of reference audio for {spec.name}, "
            f"got {prompt.duration_s:.2f} s",
            "reference_audio",
        )
    if np.abs(prompt.audio - prompt.audio.mean()).max() < SILENCE_PEAK:
        raise SpeechError("reference_silent", "the reference audio holds no sound above -60 dBFS", "reference_audio")
    audio = resample(prompt.audio, prompt.sample_rate, SAMPLE_RATE)
    if spec.reference_lufs is not None:
        audio = _at_loudness(audio, spec.reference_lufs)
    return Reference(audio, resample(audio, SAMPLE_RATE, ENCODER_RATE))


def resample(audio: FloatArray, source_hz: int, target_hz: int) -> FloatArray:
    """Change the sample rate as upstream's `librosa.load(path, sr=…)` does."""
    import librosa

    return librosa.resample(np.array(audio), orig_sr=source_hz, target_sr=target_hz, res_type="soxr_hq")


def _at_loudness(audio: FloatArray, target_lufs: float) -> FloatArray:
    """Scale to an integrated loudness (ITU-R BS.1770-4); audio too quiet to have one is left as it is."""
    import pyloudnorm

    with np.errstate(divide="ignore"):  # this thread's alone, which filters of warnings are not
        loudness = float(pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(audio))
    gain = 10.0 ** ((target_lufs - loudness) / 20.0) if math.isfinite(loudness) else 1.0
    return audio * np.float32(gain)


class MelExtractor:
    """S3Gen's log-mel of 24 kHz audio: 80 bands up to 8 kHz, 50 frames per second.

    The numbers of upstream's `s3gen.utils.mel.mel_spectrogram`, without its process-wide caches and warnings.
    """

    NUM_FFT = 1920
    HOP = 480

    def __init__(self, device: str) -> None:
        import librosa
        import torch

        filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=self.NUM_FFT, n_mels=80, fmin=0, fmax=8000)
        self._filters = torch.from_numpy(filters).float().to(device)  # (80, 961)
        self._window = torch.hann_window(self.NUM_FFT).to(device)

    def __call__(self, audio: Tensor) -> Tensor:
        """(1, T) audio → (F, 80) log-mel."""
        import torch

        margin = (self.NUM_FFT - self.HOP) // 2
        padded = torch.nn.functional.pad(audio[None], (margin, margin), mode="reflect")[0]
        spectrum = torch.stft(padded, self.NUM_FFT, self.HOP, window=self._window, center=False, return_complex=True)
        magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)  # (1, 961, F)
        return torch.log(torch.clamp(self._filters @ magnitude, min=_MEL_FLOOR))[0].T


# ------------------------------------------------------------------------------- the three networks


@dataclass(frozen=True, eq=False)
class _Networks:
    """Upstream's modules, in eval mode on one device; calling them changes nothing in them."""

    tokenizer: Any
    speaker_encoder: Any
    voice_encoder: Any


def _load_networks(spec: ModelSpec, model_dir: Path, device: str) -> _Networks:
    from engine.weights import WeightFile

    files = Checkpoint(model_dir, spec)
    with WeightFile(files.path(spec.s3gen_file)) as weights:
        tokenizer = _load_tokenizer(weights, device)
        speaker_encoder = _load_speaker_encoder(weights, device)
    with WeightFile(files.path(spec.voice_encoder_file)) as weights:
        return _Networks(tokenizer, speaker_encoder, _load_voice_encoder(weights, device))


def _size(weights: WeightFile, key: str, axis: int = 0) -> int:
    """A network's size, read from the shape of one of its tensors."""
    if key not in weights.keys():  # noqa: SIM118 (a file, not a mapping)
        raise SpeechError("weights_missing", f"{weights.path} holds no {key}", "model")
    return weights.shape(key)[axis]


def _load_tokenizer(weights: WeightFile, device: str) -> Any:
    """S3Tokenizer. Upstream ignores the sizes it is given, so the parts that have sizes are put in afterwards."""
    import librosa
    import torch

    upstream = chatterbox("models.s3tokenizer.s3tokenizer")
    from s3tokenizer.model_v2 import AudioEncoderV2, FSQVectorQuantization, precompute_freqs_cis

    from engine.weights import load_module

    width = _size(weights, "tokenizer.encoder.conv1.weight")
    num_mels = _size(weights, "tokenizer.encoder.conv1.weight", axis=1)
    blocks = {key.split(".")[3] for key in weights.keys() if key.startswith("tokenizer.encoder.blocks.")}  # noqa: SIM118
    with torch.device("meta"):
        tokenizer = upstream.S3Tokenizer("speech_tokenizer_v2_25hz")
        tokenizer.encoder = AudioEncoderV2(num_mels, width, width // _HEAD_WIDTH, len(blocks), stride=2, use_sdpa=False)
        tokenizer.quantizer = FSQVectorQuantization(width, SPEECH_VOCAB_SIZE)
    # What is computed rather than learned: original's file lacks the first two, no file holds the third.
    filters = librosa.filters.mel(sr=ENCODER_RATE, n_fft=tokenizer.n_fft, n_mels=num_mels)
    tokenizer._mel_filters = torch.from_numpy(filters).float()
    tokenizer.window = torch.hann_window(tokenizer.n_fft)
    tokenizer.encoder.freqs_cis = precompute_freqs_cis(_HEAD_WIDTH, 2048).to(device)
    return load_module(tokenizer, weights, device=device, prefix="tokenizer.", strict=False)


def _load_speaker_encoder(weights: WeightFile, device: str) -> Any:
    """CAMPPlus."""
    import torch

    from engine.weights import load_module

    growth = _size(weights, "speaker_encoder.xvector.block1.tdnnd1.cam_layer.linear_local.weight")
    bottleneck = _size(weights, "speaker_encoder.xvector.block1.tdnnd1.linear1.weight")
    with torch.device("meta"):
        encoder = chatterbox("models.s3gen.xvector").CAMPPlus(
            memory_efficient=False,
            embedding_size=_size(weights, "speaker_encoder.xvector.dense.linear.weight"),
            growth_rate=growth,
            bn_size=bottleneck // growth,
            init_channels=_size(weights, "speaker_encoder.xvector.tdnn.linear.weight"),
        )
    return load_module(encoder, weights, device=device, prefix="speaker_encoder.")


def _load_voice_encoder(weights: WeightFile, device: str) -> Any:
    import torch

    from engine.weights import load_module

    with torch.device("meta"):
        encoder = chatterbox("models.voice_encoder").VoiceEncoder()
    return load_module(encoder, weights, device=device)


# ---------------------------------------------------------------------------------- the conditioner


class Conditioner:
    """Turns voice prompts into conditionals for one checkpoint. May be called from several threads at once."""

    def __init__(self, spec: ModelSpec, networks: _Networks, fingerprint: str, device: str) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self._device = device
        self._networks = networks
        self._mel = MelExtractor(device)
        torchaudio = chatterbox("models.s3gen.s3gen").ta
        # embed_ref brings S3Gen's reference to 16 kHz with torchaudio's filter, not with soxr
        self._to_16k = torchaudio.transforms.Resample(SAMPLE_RATE, ENCODER_RATE).to(device)

    @classmethod
    def load(cls, spec: ModelSpec, model_dir: Path | str, fingerprint: str, device: Any = "cpu") -> Conditioner:
        """Read the speech tokenizer, the speaker encoder and the voice encoder, and nothing else of the files.

        Args:
            spec: the family member.
            model_dir: the checkpoint's folder; sizes are read from its weights.
            fingerprint: tells the checkpoint from others, see `Checkpoint.fingerprint`.
            device: a torch device or its name.

        Raises:
            SpeechError: weights_missing, model_unavailable.
        """
        return cls(spec, _load_networks(spec, Path(model_dir), str(device)), fingerprint, str(device))

    @property
    def tokenizer(self) -> Any:
        """Upstream's S3Tokenizer, in eval mode."""
        return self._networks.tokenizer

    @property
    def model_key(self) -> str:
        return model_key(self.spec, self.fingerprint)

    def key(self, prompt: VoicePrompt) -> str:
        """The key that `embed(prompt)` will have."""
        return conditionals_key(prompt, self.spec, self.fingerprint)

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """Compute a voice's conditionals: equal to upstream's from a file that holds the same audio.

        A prompt shorter than the references the model takes gives fewer tokens and frames; of a longer one T3 and
        S3Gen hear the start (`encoder_reference_s`, `decoder_reference_s`), the voice encoder all of it.

        Raises:
            SpeechError: reference_too_short, reference_silent.
        """
        import torch

        reference = prepare_reference(prompt, self.spec)
        with torch.inference_mode():
            tokens, mel, embedding = self._decoder_reference(reference.audio_24k)
            return Conditionals(
                key=self.key(prompt),
                model_key=self.model_key,
                speaker_embedding=self._speaker_embedding(reference.audio_16k),
                t3_prompt_tokens=self._t3_prompt_tokens(reference.audio_16k).cpu().numpy(),
                s3_prompt_tokens=tokens.cpu().numpy(),
                s3_prompt_mel=mel.cpu().numpy(),
                s3_embedding=embedding.cpu().numpy(),
            )

    def _decoder_reference(self, audio_24k: FloatArray) -> tuple[Tensor, Tensor, Tensor]:
        """What S3Gen hears: tokens (M,), log-mel (F, 80) and x-vector (192,).

        Lengths that are no multiple of 40 ms give an odd number of frames or a token too many: F // 2 are kept.
        """
        import torch

        start = audio_24k[: int(self.spec.decoder_reference_s * SAMPLE_RATE)]
        audio = torch.from_numpy(start).to(self._device)[None]  # (1, T)
        mel = self._mel(audio)
        audio_16k = self._to_16k(audio)
        embedding = self._networks.speaker_encoder.inference(audio_16k)[0]
        return self._tokenize(audio_16k)[: len(mel) // 2], mel, embedding

    def _t3_prompt_tokens(self, audio_16k: FloatArray) -> Tensor:
        import torch

        start = audio_16k[: int(self.spec.encoder_reference_s * ENCODER_RATE)]
        return self._tokenize(torch.from_numpy(start)[None], self.spec.max_prompt_tokens)

    def _tokenize(self, audio_16k: Tensor, max_tokens: int | None = None) -> Tensor:
        """(1, T) at 16 kHz → speech tokens (N,), 25 per second."""
        tokens, _ = self._networks.tokenizer(audio_16k, max_len=max_tokens)
        return tokens[0]

    def _speaker_embedding(self, audio_16k: FloatArray) -> FloatArray:
        """(256,): partial utterances of 1.6 s embedded, averaged and normalised."""
        return self._networks.voice_encoder.embeds_from_wavs([audio_16k], sample_rate=ENCODER_RATE)[0]


class LazyConditioner:
    """The conditioning networks, loaded when the first voice or recording comes that is not ready."""

    def __init__(self, load: Callable[[], Conditioner]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._conditioner: Conditioner | None = None

    def get(self) -> Conditioner:
        with self._lock:
            if self._conditioner is None:
                self._conditioner = self._load()
            return self._conditioner

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """As `Conditioner.embed`."""
        return self.get().embed(prompt)


def builtin_conditionals(model_dir: Path | str, spec: ModelSpec, fingerprint: str) -> Conditionals | None:
    """Read conds.pt, the voice that a checkpoint brings along; None when it brings none.

    Raises:
        SpeechError: weights_missing when the file is there and is not what upstream writes.
    """
    from engine.weights import load_pickled

    path = Path(model_dir) / "conds.pt"
    if not path.is_file():
        return None
    saved = load_pickled(path)
    try:
        arrays = _builtin_arrays(saved["t3"], saved["gen"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise SpeechError("weights_missing", f"{path} does not hold a voice: {error!r}", "model") from error
    key = model_key(spec, fingerprint)
    return Conditionals(key=_digest(key, *(array.tobytes() for array in arrays.values())), model_key=key, **arrays)


def _builtin_arrays(t3: dict[str, Any], gen: dict[str, Any]) -> dict[str, Any]:
    """Upstream's batches of one, as arrays without the batch axis."""
    num_tokens = int(gen["prompt_token_len"].reshape(-1)[0])
    return {
        "speaker_embedding": t3["speaker_emb"].float().reshape(-1).numpy(),
        "t3_prompt_tokens": t3["cond_prompt_speech_tokens"].reshape(-1).numpy(),
        "s3_prompt_tokens": gen["prompt_token"].reshape(-1)[:num_tokens].numpy(),
        "s3_prompt_mel": gen["prompt_feat"].float()[0].numpy(),
        "s3_embedding": gen["embedding"].float().reshape(-1).numpy(),
    }
