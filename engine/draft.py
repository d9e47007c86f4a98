"""The draft voice: formant speech without weights, for trying and testing a deployment.

It has the interface of `engine.Engine` and says so in every result (`model` is "draft"), so that
everything around a model — jobs, formats, delivery, order, joins — can be tried on any machine in
seconds. Speech parameters mean nothing to it. A reference voice gives it its pitch and nothing else.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import cachetools
import numpy as np

from engine.audio.mastering import resample
from engine.audio.pitch import median_f0
from engine.audio.reading import MIN_REFERENCE_S, check_reference
from engine.errors import SpeechError
from engine.espeak import MAX_RATE_WPM, MIN_RATE_WPM, NORMAL_RATE_WPM, EspeakLibrary, library
from engine.models import DRAFT
from engine.stream import SpeechStream
from engine.text.lexicon import Lexicon
from engine.text.planning import PlannedChunk, plan
from engine.types import (
    PARAMETERS,
    SAMPLE_RATE,
    UNVERIFIED_MARK,
    Chunk,
    Conditionals,
    ConversionRequest,
    EngineConfig,
    FloatArray,
    Speech,
    SpeechRequest,
    Voice,
    VoicePrompt,
)
from engine.work import WorkStore

if TYPE_CHECKING:
    from engine.audio.watermark import Watermarker

MODEL_KEY = "draft/1"

SILENT = "silent"
"""Flag of a chunk that eSpeak NG made no sound of (a script that the language's rules do not know)."""

_NUM_THREADS = 2  # one speaks (eSpeak takes one text at a time) while another marks
_FAR_AHEAD_S = 0.05  # between two looks at whether a stream is wanted further
_MAX_CACHED_VOICES = 1024  # a few hundred bytes each

_PITCH_HZ = (66.0, 73.0, 83.0, 93.0, 106.0, 120.0, 137.0, 155.0, 177.0, 199.0)
_PITCH_SETTING = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
"""Median F0 of the eSpeak voice by its pitch setting, as measured: within 5 % in ten languages."""
_OWN_PITCH_HZ = 106.0

_SHIFT_WINDOW = 1024
"""Samples of the pitch shift's window, 43 ms: three periods of a deep voice, and gaps between words stay gaps."""


@dataclass(frozen=True)
class _Tone:
    """How eSpeak reaches a pitch: its setting, and how much faster the result is then played."""

    pitch: int = 50
    speed_up: float = 1.0

    @classmethod
    def of(cls, f0_hz: float | None) -> _Tone:
        """Beyond eSpeak's range the rest is made by playing slower speech faster, which moves the
        formants along: a smaller throat, as a child's."""
        if f0_hz is None:
            return cls()
        reached = min(max(f0_hz, _PITCH_HZ[0]), _PITCH_HZ[-1])
        return cls(round(float(np.interp(reached, _PITCH_HZ, _PITCH_SETTING))), f0_hz / reached)

    @property
    def rate_wpm(self) -> int:
        return round(min(max(NORMAL_RATE_WPM / self.speed_up, MIN_RATE_WPM), MAX_RATE_WPM))


class DraftEngine:
    """Speaks with eSpeak NG. Safe to use from several threads; no request leaves anything behind.

    Args:
        espeak: this process's library.
        watermarker: marks all audio; None only where the configuration turned it off.
    """

    model = DRAFT
    sample_rate = SAMPLE_RATE
    min_reference_s = MIN_REFERENCE_S
    parameters: frozenset[str] = frozenset()
    """Speech parameters that it honours: none."""

    def __init__(self, espeak: EspeakLibrary, watermarker: Watermarker | None, max_chunk_chars: int) -> None:
        self._espeak = espeak
        self._watermarker = watermarker
        self._max_chunk_chars = max_chunk_chars
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="draft")
        self._closed = threading.Event()
        self._lock = threading.Lock()  # of what is below
        self._voices: cachetools.LRUCache[str, Conditionals] = cachetools.LRUCache(_MAX_CACHED_VOICES)
        self._num_spoken = 0
        self._streams: set[threading.Thread] = set()

    @classmethod
    def load(cls, config: EngineConfig) -> DraftEngine:
        """Load eSpeak NG and the watermarker.

        Raises:
            SpeechError: model_unavailable, watermark_unavailable.
        """
        from engine.audio.watermark import Watermarker  # imports torch, which the draft voice needs for nothing else

        return cls(library(), Watermarker.load() if config.watermark else None, config.max_chunk_chars)

    @property
    def languages(self) -> tuple[str, ...]:
        """ISO 639 codes that eSpeak NG knows; regional ones such as en-us are understood as well."""
        return tuple(sorted(code for code in self._espeak.voices if len(code) <= 3))

    def speak(self, request: SpeechRequest) -> Speech:
        """Speak a request and wait for it.

        Raises:
            SpeechError: language_unsupported, invalid_request, reference_too_short, reference_silent,
                generation_failed, watermark_unavailable, cancelled.
        """
        return self.submit(request).result()

    def submit(self, request: SpeechRequest) -> Future[Speech]:
        """Start speaking. The future stays pending until its result is set, so cancel() works at any time."""
        return self._start(lambda job: self._whole(request, job))

    def submit_conversion(self, request: ConversionRequest) -> Future[Speech]:
        """Start saying a recording again in another voice; a future as `submit`'s."""
        return self._start(lambda job: self._converted(request, job))

    def convert(
        self, audio: FloatArray, sample_rate: int, voice: Voice | None = None, *, seed: int | None = None
    ) -> Speech:
        """Say what a recording says in another voice: its pitch is shifted, its timing kept.

        Args:
            audio: float32 (T,) in [-1, 1].
            sample_rate: Hz.
            voice: whose median pitch to take; None for eSpeak's own.
            seed: named in the result, and nothing else: no chance is involved.

        Raises:
            SpeechError: reference_unreadable, reference_too_short, reference_silent, invalid_request,
                watermark_unavailable, cancelled.
        """
        request = ConversionRequest(audio=audio, sample_rate=sample_rate, voice=voice, seed=seed)
        return self.submit_conversion(request).result()

    def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
        """Speak chunk by chunk; a piece is a chunk and the pause behind it.

        Args:
            early: give each piece as soon as it is spoken; else what has been marked in the blocks of a whole.
            work: not needed: nothing of a voice without weights is worth keeping.

        Raises:
            SpeechError: cancelled where the engine is closed; what is wrong with the request, as `speak`, instead of
                the first piece.
        """
        job = _Job(Future(), self._closed)
        stream = SpeechStream(job.future)
        thread = threading.Thread(
            target=job.fulfil, args=(lambda job: self._streamed(request, job, stream, early=early),), daemon=True
        )
        with self._lock:
            if self._closed.is_set():
                raise SpeechError("cancelled", "the engine is closed")
            self._streams = {alive for alive in self._streams if alive.is_alive()} | {thread}
            thread.start()
        return stream

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """The voice's median F0 in Hz as `speaker_embedding` (1,); 0 where nothing is voiced. Cached.

        Raises:
            SpeechError: reference_too_short, reference_silent.
        """
        with self._lock:
            cached = self._voices.get(prompt.key)
        if cached is not None:
            return cached
        check_reference(prompt.audio, prompt.sample_rate, field="voice")
        conditionals = _conditionals(prompt, self.voice_key(prompt.key))
        with self._lock:
            self._voices[prompt.key] = conditionals
        return conditionals

    def voice_key(self, prompt_key: str) -> str:
        """The key of `embed`'s result, from the prompt's own: what keeps conditionals keeps them under it."""
        return f"{prompt_key}:{MODEL_KEY}"

    def stats(self) -> dict[str, object]:
        """Figures for people."""
        with self._lock:
            return {"model": self.model, "num_spoken": self._num_spoken, "num_cached_voices": len(self._voices)}

    is_lost = False
    """It needs no device that could fail for good."""

    def free_bytes(self) -> dict[str, int]:
        """Nothing to speak of is needed, so nothing is said."""
        return {}

    def close(self) -> None:
        """Give up what is under way (`cancelled`) and wait for the threads."""
        with self._lock:
            self._closed.set()
            streams, self._streams = self._streams, set()
        self._pool.shutdown(wait=True)
        for thread in streams:
            thread.join()

    def __enter__(self) -> DraftEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, work: Callable[[_Job], Speech]) -> Future[Speech]:
        job = _Job(Future(), self._closed)
        try:
            self._pool.submit(job.fulfil, work)
        except RuntimeError as error:  # the pool takes nothing after shutdown
            raise SpeechError("cancelled", "the engine is closed") from error
        return job.future

    def _whole(self, request: SpeechRequest, job: _Job) -> Speech:
        clock = _Clock(job.submitted_s)
        utterance = self._prepare(request)
        clock.lap("condition")
        parts = list(self._spoken(utterance, job))
        clock.lap("decode")
        speech = utterance.speech(parts, np.concatenate([part.waveform for part in parts]))
        return self._finished(speech, clock)

    def _streamed(self, request: SpeechRequest, job: _Job, stream: SpeechStream, *, early: bool) -> Speech:
        """In a thread of its own, which waits while too much waits to be taken."""
        clock = _Clock(job.submitted_s)
        utterance = self._prepare(request)
        clock.lap("condition")
        marking = self._watermarker.start(SAMPLE_RATE, early=early) if self._watermarker is not None else None
        parts: list[_Part] = []
        for part in self._spoken(utterance, job):
            waveform = marking.push(part.waveform) if marking is not None else part.waveform
            parts.append(part.without_audio())
            stream.put_audio(waveform, SAMPLE_RATE, len(parts), len(utterance.chunks))
            while stream.is_far_ahead:
                job.check()
                time.sleep(_FAR_AHEAD_S)
        clock.lap("decode")
        rest, watermarked = marking.finish() if marking is not None else (np.zeros(0, np.float32), False)
        stream.put_audio(rest, SAMPLE_RATE, len(parts), len(utterance.chunks))
        clock.lap("master")
        return self._counted(utterance.speech(parts, np.zeros(0, np.float32)), watermarked, clock)

    def _prepare(self, request: SpeechRequest) -> _Utterance:
        """Whatever can be wrong with a request is found here, before a word is spoken."""
        chunks = plan(request.all_segments, language=request.language, max_chars=self._max_chunk_chars)
        tones: list[_Tone] = []
        warnings = [f"draft has no {name}" for name in PARAMETERS if getattr(request, name) is not None]
        for segment in request.all_segments:
            f0_hz, missing = self._f0(segment.voice or request.voice)
            tones.append(_Tone.of(f0_hz))
            warnings += missing
        spoken = [(chunk, self._language(chunk.language), tones[chunk.segment_index]) for chunk in chunks]
        lexicon = Lexicon(request.pronunciations)
        return _Utterance(spoken, lexicon, request.known_seed, tuple(dict.fromkeys(warnings)))

    def _f0(self, voice: Voice | None) -> tuple[float | None, list[str]]:
        """The pitch to speak at in Hz, None for eSpeak's own; and what there is to say about it."""
        if voice is None:
            return None, []
        conditionals = self.embed(voice) if isinstance(voice, VoicePrompt) else voice
        if conditionals.model_key != MODEL_KEY:
            raise SpeechError(
                "invalid_request", f"voice: expected conditionals of {MODEL_KEY}, got {conditionals.model_key}", "voice"
            )
        f0_hz = float(conditionals.speaker_embedding[0])
        if f0_hz > 0:
            return f0_hz, []
        return None, ["no pitch was found in the reference voice; draft speaks at its own"]

    def _language(self, language: str) -> str:
        code = language.strip().lower().replace("_", "-")
        for candidate in (code, code.partition("-")[0]):
            if candidate in self._espeak.voices:
                return candidate
        raise SpeechError("language_unsupported", f"language: draft does not speak {language[:40]!r}", "language")

    def _spoken(self, utterance: _Utterance, job: _Job) -> Iterator[_Part]:
        for chunk, language, tone in utterance.chunks:
            job.check()
            yield self._speak_chunk(chunk, utterance.lexicon.apply(chunk.text), language, tone)

    def _speak_chunk(self, chunk: PlannedChunk, text: str, language: str, tone: _Tone) -> _Part:
        spoken = np.zeros(0, np.float32)
        if chunk.speakable:
            samples = self._espeak.speak(text, language, tone.pitch, tone.rate_wpm)
            played_hz = round(self._espeak.sample_rate * tone.speed_up)
            spoken = resample(samples.astype(np.float32) / np.float32(32768), played_hz, SAMPLE_RATE)
        return _Part.of(chunk, spoken)

    def _converted(self, request: ConversionRequest, job: _Job) -> Speech:
        clock = _Clock(job.submitted_s)
        check_reference(request.audio, request.sample_rate, min_s=0.0, field="audio")
        target_hz, warnings = self._f0(request.voice)
        waveform = resample(request.audio, request.sample_rate, SAMPLE_RATE)
        source_hz = median_f0(waveform, SAMPLE_RATE)
        clock.lap("condition")
        job.check()
        if source_hz is None:
            warnings = [*warnings, "no pitch was found in the recording; it is returned as it was"]
        else:
            waveform = _shift_pitch(waveform, (target_hz or _OWN_PITCH_HZ) / source_hz)
        clock.lap("decode")
        whole = (Chunk(0, "", 0.0, waveform.size / SAMPLE_RATE),)
        seed, warned = request.known_seed, tuple(warnings)
        return self._finished(Speech(waveform, SAMPLE_RATE, whole, seed, DRAFT, False, warnings=warned), clock)

    def _finished(self, speech: Speech, clock: _Clock) -> Speech:
        waveform, watermarked = speech.waveform, False
        if self._watermarker is not None:
            waveform, watermarked = self._watermarker.apply(waveform, SAMPLE_RATE)
        clock.lap("master")
        return self._counted(dataclasses.replace(speech, waveform=waveform), watermarked, clock)

    def _counted(self, speech: Speech, watermarked: bool, clock: _Clock) -> Speech:
        with self._lock:
            self._num_spoken += 1
        is_unverified = self._watermarker is not None and not watermarked
        warnings = (*speech.warnings, *([UNVERIFIED_MARK] if is_unverified else []))
        return dataclasses.replace(speech, watermarked=watermarked, timings=clock.timings(), warnings=warnings)


@dataclass(frozen=True)
class _Job:
    """One request under way: how it is given up, and when it began."""

    future: Future[Speech]
    closed: threading.Event
    submitted_s: float = field(default_factory=time.perf_counter)

    def check(self) -> None:
        """Raises SpeechError `cancelled` where nobody wants the result any more."""
        if self.closed.is_set() or self.future.cancelled():
            raise SpeechError("cancelled", "the request was cancelled")

    def fulfil(self, work: Callable[[_Job], Speech]) -> None:
        """Do the work and settle the future, unless it is cancelled by then."""
        try:
            self.check()
            result = work(self)
        except BaseException as error:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
        else:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(result)


class _Clock:
    """Seconds by stage, from the moment the request came in."""

    def __init__(self, submitted_s: float) -> None:
        self._submitted_s = self._lap_s = submitted_s
        self._stages: dict[str, float] = {}
        self.lap("queue")

    def lap(self, stage: str) -> None:
        now_s = time.perf_counter()
        self._stages[stage] = now_s - self._lap_s
        self._lap_s = now_s

    def timings(self) -> Mapping[str, float]:
        return self._stages | {"total": self._lap_s - self._submitted_s}


@dataclass(frozen=True, eq=False)
class _Part:
    """A chunk's audio with the silence around it; where in it the speech lies, in samples."""

    text: str
    num_samples: int
    waveform: FloatArray
    start: int
    end: int
    flags: tuple[str, ...]

    @classmethod
    def of(cls, chunk: PlannedChunk, spoken: FloatArray) -> _Part:
        before, after = _silence(chunk.pause_before_s), _silence(chunk.pause_after_s)
        flags = () if spoken.any() or not chunk.speakable else (SILENT,)
        waveform = np.concatenate([before, spoken, after])
        return cls(chunk.text, waveform.size, waveform, before.size, before.size + spoken.size, flags)

    def without_audio(self) -> _Part:
        """What is left to tell of a part whose audio has been given out."""
        return dataclasses.replace(self, waveform=np.zeros(0, np.float32))


@dataclass(frozen=True)
class _Utterance:
    """A request, checked and planned: each chunk with its language and its tone."""

    chunks: list[tuple[PlannedChunk, str, _Tone]]
    lexicon: Lexicon
    seed: int
    warnings: tuple[str, ...]

    def speech(self, parts: Sequence[_Part], waveform: FloatArray) -> Speech:
        """The result, not yet marked.

        Raises:
            SpeechError: generation_failed when nothing can be heard.
        """
        if not any(part.end > part.start and not part.flags for part in parts):
            raise SpeechError("generation_failed", "eSpeak NG makes no sound of this text in its language")
        offsets = np.cumsum([0, *(part.num_samples for part in parts)]) / SAMPLE_RATE
        chunks = tuple(
            Chunk(
                index=index,
                text=part.text,
                start_s=float(offsets[index] + part.start / SAMPLE_RATE),
                end_s=float(offsets[index] + part.end / SAMPLE_RATE),
                flags=part.flags,
            )
            for index, part in enumerate(parts)
        )
        return Speech(waveform, SAMPLE_RATE, chunks, self.seed, DRAFT, False, warnings=self.warnings)


def _silence(seconds: float) -> FloatArray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def _conditionals(prompt: VoicePrompt, key: str) -> Conditionals:
    return Conditionals(
        key=key,
        model_key=MODEL_KEY,
        speaker_embedding=np.array([median_f0(prompt.audio, prompt.sample_rate) or 0.0], np.float32),
        t3_prompt_tokens=np.zeros(0, np.int32),
        s3_prompt_tokens=np.zeros(0, np.int32),
        s3_prompt_mel=np.zeros((0, 80), np.float32),
        s3_embedding=np.zeros(0, np.float32),
    )


def _shift_pitch(waveform: FloatArray, ratio: float) -> FloatArray:
    """Multiply the pitch by `ratio`, keeping the length; quieter where peaks would exceed full scale."""
    from librosa.effects import pitch_shift  # takes a second to import

    shifted = pitch_shift(waveform, sr=SAMPLE_RATE, n_steps=12 * float(np.log2(ratio)), n_fft=_SHIFT_WINDOW)
    return np.asarray(shifted / max(1.0, float(np.abs(shifted).max())), np.float32)
