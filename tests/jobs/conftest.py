"""A light engine for tests of everything around the engine, and recordings to send it."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.audio.mastering import resample
from engine.stream import SpeechStream
from engine.types import Chunk, Conditionals, ConversionRequest, FloatArray, Speech, SpeechRequest, VoicePrompt
from engine.work import WorkStore
from jobs.settings import Settings
from jobs.voices import Voices, open_library
from jobs.worker import Worker
from tests.jobs.voice_support import Draft, MakeWorker
from tests.voice_library.conftest import bucket as bucket
from tests.voice_library.conftest import s3_options as s3_options

RATE = 24_000


class ToneEngine:
    """Answers each request with a tone at once, or with what `answer` says; remembers the requests."""

    model = "tone"
    sample_rate = RATE
    languages = ("en", "fr")
    min_reference_s = 1.0
    is_lost = False
    converts = True
    """Whether recordings are answered, with themselves; else they are left pending."""

    def __init__(self, answer: Callable[[SpeechRequest, Future[Speech]], None] | None = None) -> None:
        self.requests: list[SpeechRequest] = []
        self.conversions: list[ConversionRequest] = []
        self.futures: list[Future[Speech]] = []
        self.closed = False
        self._answer = answer or self.finish

    def voice_key(self, prompt_key: str) -> str:
        return f"{prompt_key}:tone"

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        none = np.zeros(0, np.int32)
        mel, mean = np.zeros((1, 80), np.float32), np.array([prompt.audio.mean()])
        return Conditionals(self.voice_key(prompt.key), "tone", mean, none, none, mel, mean)

    def submit(self, request: SpeechRequest) -> Future[Speech]:
        future: Future[Speech] = Future()
        self.requests.append(request)
        self.futures.append(future)
        self._answer(request, future)
        return future

    def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
        """What `submit` gives, in one piece."""
        del early, work
        whole, future = self.submit(request), Future[Speech]()
        stream = SpeechStream(future)

        def hand_on(_: Future[Speech]) -> None:
            speech = whole.result()
            stream.put_audio(speech.waveform, RATE, len(speech.chunks), len(speech.chunks))
            future.set_result(dataclasses.replace(speech, waveform=np.zeros(0, np.float32)))

        whole.add_done_callback(hand_on)
        return stream

    def submit_conversion(self, request: ConversionRequest) -> Future[Speech]:
        future: Future[Speech] = Future()
        self.conversions.append(request)
        self.futures.append(future)
        if self.converts:
            waveform = resample(request.audio, request.sample_rate, RATE)
            chunk = Chunk(0, "", 0.0, waveform.size / RATE)
            future.set_result(Speech(waveform, RATE, (chunk,), request.known_seed, "tone", watermarked=True))
        return future

    def finish(self, request: SpeechRequest, future: Future[Speech]) -> None:
        future.set_result(tone_speech(request))

    def stats(self) -> dict[str, Any]:
        return {"device": "cpu", "rows": 1}

    def free_bytes(self) -> dict[str, int]:
        return {"host": 1 << 33}

    def close(self) -> None:
        self.closed = True


def tone(duration_s: float, rate: int = RATE, frequency_hz: float = 150.0) -> FloatArray:
    """A harmonic tone at half scale: float32 (T,)."""
    times = np.arange(int(duration_s * rate)) / rate
    wave = sum(np.sin(2 * np.pi * frequency_hz * harmonic * times) / harmonic for harmonic in range(1, 6))
    return (0.25 * np.asarray(wave)).astype(np.float32)


def tone_speech(request: SpeechRequest) -> Speech:
    text = request.all_segments[0].text
    waveform = tone(0.02 * min(len(text), 200) + 0.2)
    chunk = Chunk(0, text, 0.0, waveform.size / RATE)
    return Speech(
        waveform,
        RATE,
        (chunk,),
        seed=5 if request.seed is None else request.seed,
        model="tone",
        watermarked=True,
        timings={"decode": 0.1},
        warnings=("tone has no such parameter",) if request.exaggeration is not None else (),
    )


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    return Settings()


@pytest.fixture
def engine() -> ToneEngine:
    return ToneEngine()


@pytest.fixture
def make_engine() -> type[ToneEngine]:
    return ToneEngine


@pytest.fixture
def worker(engine: ToneEngine, settings: Settings) -> Worker:
    return Worker(engine, settings)


@pytest.fixture
def local(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"model": "draft", "voices_dir": tmp_path / "voices"})


@pytest.fixture
def make_worker(local: Settings) -> Iterator[MakeWorker]:
    """Makes workers on one library, each with an engine and a library object of its own, as after a restart."""
    opened = []

    def make(engine: Any = None, **changes: Any) -> Worker:
        changed, speaks = local.model_copy(update=changes), engine or Draft.make()
        library = open_library(changed)
        opened.append(Worker(speaks, changed, voices=None if library is None else Voices(library, speaks)))
        return opened[-1]

    yield make
    for worker in opened:
        worker.close()


@pytest.fixture
def recording() -> Callable[..., bytes]:
    """Makes a recording as a file's bytes: format, subtype, rate, channels and length as asked."""

    def make(
        *,
        file_format: str = "WAV",
        subtype: str | None = None,
        rate: int = RATE,
        channels: int = 1,
        duration_s: float = 6,
    ) -> bytes:
        audio = np.stack([tone(duration_s, rate)] * channels, axis=1)
        buffer = io.BytesIO()
        soundfile.write(buffer, audio, rate, format=file_format, subtype=subtype)
        return buffer.getvalue()

    return make


@pytest.fixture
def reference(recording: Callable[..., bytes]) -> str:
    """Six seconds of a voice-like tone as base64."""
    return base64.b64encode(recording()).decode()
