"""What the tests of named voices share: a draft voice that counts, recordings, and jobs to save them."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any

import soundfile

from engine.draft import DraftEngine
from engine.types import Conditionals, EngineConfig, VoicePrompt
from jobs.worker import BrokenWorker, Worker
from tests.voice_library.recordings import speech

MakeWorker = Callable[..., Worker]


class Draft(DraftEngine):
    """The draft voice, unmarked; knows how many recordings it had to listen to."""

    num_embedded = 0

    @classmethod
    def make(cls) -> Draft:
        engine = cls.load(EngineConfig(model="draft", watermark=False))
        assert isinstance(engine, Draft)
        return engine

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        self.num_embedded += 1
        return super().embed(prompt)


def run(worker: Worker | BrokenWorker, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "1", "input": fields}))


def recorded(pitch_hz: float = 130.0, duration_s: float = 6.0) -> str:
    """A recording of a voice as base64."""
    buffer = io.BytesIO()
    soundfile.write(buffer, speech(duration_s, pitch_hz=pitch_hz), 24_000, format="WAV", subtype="FLOAT")
    return base64.b64encode(buffer.getvalue()).decode()


def save(worker: Worker, name: str, pitch_hz: float = 130.0, **fields: Any) -> dict[str, Any]:
    clone = {"operation": "voice_clone", "reference_audio": recorded(pitch_hz), "voice_name": name}
    return run(worker, **{**clone, "save_to_library": True, "text": "Saved.", **fields})


def engine_of(worker: Worker) -> Any:
    return worker._engine


def counts(worker: Worker) -> dict[str, int]:
    assert worker._voices is not None
    conditionals: dict[str, int] = worker._voices.stats()["conditionals"]
    return conditionals
