"""Speech to speech: a recording of any length, said again in another voice, as long as it was.

A recording is heard as speech tokens, like those that T3 makes of a text, and S3Gen speaks them in the wanted
voice. Upstream speaks them in one pass, which breaks above some forty seconds. Here a long recording is cut where
it is quietest; each piece is spoken with a little of its neighbours, and where two meet one fades into the other,
so that a cut that found no silence does not click either. Pieces are an utterance's chunks whose tokens are
already there, so all the rest, faults and memory included, is as it is for speech.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from engine import guard, noise
from engine.audio.assembly import Stretch, crossfade
from engine.conditioning import ENCODER_RATE, SILENCE_PEAK, resample
from engine.errors import SpeechError
from engine.intake import Intake
from engine.listening import Listener
from engine.models import SPEECH_TOKEN_RATE, ModelSpec
from engine.types import SAMPLE_RATE, Conditionals, ConversionRequest, FloatArray, IntArray, Speech
from engine.utterance import ChunkWork, Utterance

MAX_PIECE_TOKENS = 20 * SPEECH_TOKEN_RATE
"""With the voice's prompt of up to 10 s a pass then has 30 s, far from the 40 s at which upstream breaks. Longer ones
would save nothing: measured on a CPU, a second of audio costs the same, within 5 %, in pieces of 12, 20 and 30 s."""
MIN_PIECE_TOKENS = 12 * SPEECH_TOKEN_RATE
"""Each pass speaks the voice's prompt again, so shorter pieces are dear; and eight seconds of speech hold a pause."""
MIN_LAST_TOKENS = 4 * SPEECH_TOKEN_RATE
NEIGHBOUR_TOKENS = 10
"""What a piece speaks of each neighbour: more than the flow's look-ahead of three and the fade at a pass's start."""
MIN_RECORDING_S = 0.1

SAMPLES_PER_TOKEN = SAMPLE_RATE // SPEECH_TOKEN_RATE
_QUIET_TOKENS = 4  # to both sides of a cut: loudness is that of a third of a second
_QUIET_DB = -45.0  # below the loudest place: a pause, however deep


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording that one pass speaks, in tokens.

    Args:
        start, end: its own.
        first, last: with what it speaks of its neighbours.
    """

    start: int
    end: int
    first: int
    last: int


def split(audio_16k: FloatArray, num_tokens: int) -> tuple[Piece, ...]:
    """Cut a recording into pieces that S3Gen can speak; together they are all of it."""
    cuts = [0, *find_cuts(loudness_db(audio_16k, num_tokens)), num_tokens]
    return tuple(
        Piece(start, end, max(0, start - NEIGHBOUR_TOKENS), min(num_tokens, end + NEIGHBOUR_TOKENS))
        for start, end in itertools.pairwise(cuts)
    )


def loudness_db(audio_16k: FloatArray, num_tokens: int) -> FloatArray:
    """How loud it is around the start of each token: whole dB below the loudest place, float32 (num_tokens,).

    Whole, and no lower than a pause, so that of places equally quiet the last can be taken.
    """
    size = ENCODER_RATE // SPEECH_TOKEN_RATE
    padded = np.zeros(num_tokens * size, np.float64)
    heard = audio_16k[: padded.size]
    padded[: heard.size] = heard
    total = np.concatenate(([0.0], np.cumsum(np.square(padded).reshape(num_tokens, size).sum(axis=1))))
    at = np.arange(num_tokens)
    around = total[np.minimum(at + _QUIET_TOKENS, num_tokens)] - total[np.maximum(at - _QUIET_TOKENS, 0)]
    level = 10 * np.log10(np.maximum(around / max(around.max(), 1e-30), 1e-12))
    return np.maximum(np.round(level), _QUIET_DB).astype(np.float32)


def find_cuts(level_db: FloatArray) -> list[int]:
    """Tokens at which to cut: each the last of the quietest places that leave a piece neither short nor long."""
    cuts: list[int] = []
    start, end = 0, len(level_db)
    while end - start > MAX_PIECE_TOKENS:
        low, high = start + MIN_PIECE_TOKENS, min(start + MAX_PIECE_TOKENS, end - MIN_LAST_TOKENS)
        quietest_from_behind = int(np.argmin(level_db[low : high + 1][::-1]))
        start = high - quietest_from_behind
        cuts.append(start)
    return cuts


@dataclass
class PieceWork(ChunkWork):
    """A piece on its way: its tokens are there from the start, and all of them are spoken."""

    piece: Piece = field(kw_only=True)

    def rendered_tokens(self, spec: ModelSpec) -> IntArray:
        return self.spoken_tokens

    def num_kept_tokens(self, spec: ModelSpec) -> int:
        return len(self.spoken_tokens)


@dataclass
class Conversion(Utterance):
    """A recording on its way.

    Args:
        num_samples: of the recording at 24 kHz, and so of the result.
    """

    chunks: Sequence[PieceWork]
    num_samples: int = field(kw_only=True)

    def plan(self) -> tuple[range, ...]:
        """A pass for each piece: neighbours overlap and cannot share one."""
        return tuple(range(index, index + 1) for index in range(len(self.chunks)))

    def joiner(self) -> PieceJoiner:
        """Puts its pieces together."""
        return PieceJoiner([work.piece for work in self.chunks], self.num_samples)


class PieceJoiner:
    """Fades pieces into each other, once all are there.

    Args:
        pieces: in order.
        num_samples: of the whole.
    """

    def __init__(self, pieces: Sequence[Piece], num_samples: int) -> None:
        self._pieces, self._num_samples = pieces, num_samples
        self._waveforms: list[Tensor] = []
        self.spans_s: tuple[tuple[float, float], ...] = ()

    @property
    def num_joined(self) -> int:
        return len(self.spans_s)

    def push(self, samples: Tensor, *, is_end: bool) -> Tensor:
        """Take a piece."""
        assert is_end
        self._waveforms.append(samples)
        return samples.new_zeros(0)

    def finish(self) -> Tensor:
        """The whole, float32 (num_samples,)."""
        stretches = [_stretch(piece, w) for piece, w in zip(self._pieces, self._waveforms, strict=True)]
        whole = crossfade(stretches, self._num_samples)
        self.spans_s = whole.spans_s
        return whole.waveform


def _stretch(piece: Piece, waveform: Tensor) -> Stretch:
    """Where a piece's audio lies; a prompt of an odd number of frames took 20 ms off its front."""
    num_lost = (piece.last - piece.first) * SAMPLES_PER_TOKEN - len(waveform)
    first = piece.first * SAMPLES_PER_TOKEN + num_lost
    return Stretch(waveform, first, piece.start * SAMPLES_PER_TOKEN, piece.end * SAMPLES_PER_TOKEN)


class ConversionIntake:
    """From a request to a conversion: the voice resolved, the recording heard and cut. Thread-safe.

    Args:
        intake: of speech, whose voices and ids are shared.
        listener: gives the speech tokenizer; loads it when it is first asked.
    """

    def __init__(self, intake: Intake, listener: Callable[[], Listener]) -> None:
        self._intake, self._listener = intake, listener

    def accept(
        self, request: ConversionRequest, future: Future[Speech], submitted_s: float, check: Callable[[], None]
    ) -> Conversion:
        """Make a conversion.

        Args:
            submitted_s: `time.perf_counter()` when it was asked for.
            check: called now and then; what it raises ends the work.

        Raises:
            SpeechError: invalid_request, reference_too_short, reference_silent, and what `check` raises.
        """
        started = time.perf_counter()
        check()
        audio = hear(request)
        conditionals = self._intake.resolve(request.voice)
        check()
        tokens = self._listener().tokens(audio, check)
        seed = request.known_seed
        conversion = Conversion(
            id=self._intake.next_id(),
            future=future,
            seed=seed,
            settings=None,
            exaggeration=None,
            chunks=[_work(piece, tokens, conditionals, seed) for piece in split(audio, len(tokens))],
            submitted_s=submitted_s,
            num_samples=max(1, round(request.duration_s * SAMPLE_RATE)),
        )
        conversion.add_time("queue", started - submitted_s)
        conversion.add_time("condition", time.perf_counter() - started)
        return conversion


def hear(request: ConversionRequest) -> FloatArray:
    """The recording as the speech tokenizer hears it: float32 (T,) at 16 kHz.

    Raises:
        SpeechError: reference_too_short, reference_silent.
    """
    if request.duration_s < MIN_RECORDING_S:
        raise SpeechError(
            "reference_too_short",
            f"expected at least {MIN_RECORDING_S:g} s of audio to convert, got {request.duration_s:.3f} s",
            "audio",
        )
    if np.abs(request.audio - request.audio.mean()).max() < SILENCE_PEAK:
        raise SpeechError("reference_silent", "the audio to convert holds no sound above -60 dBFS", "audio")
    return np.ascontiguousarray(resample(request.audio, request.sample_rate, ENCODER_RATE), np.float32)


def _work(piece: Piece, tokens: IntArray, conditionals: Conditionals, seed: int) -> PieceWork:
    own = tokens[piece.first : piece.last]
    return PieceWork(
        text="",
        text_tokens=np.zeros(0, np.int32),
        conditionals=conditionals,
        expectation=guard.Expectation(len(own), len(own), len(own)),
        max_new_tokens=0,
        seed=noise.derive_seed(seed, "piece", piece.start),
        attempts=1,
        tokens=own,
        is_done=True,
        piece=piece,
    )
