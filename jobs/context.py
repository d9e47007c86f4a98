"""What an operation gets besides its request: the engine, the settings, and when the job began."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engine.stream import SpeechStream
from engine.types import Conditionals, ConversionRequest, Speech, SpeechRequest, VoicePrompt
from engine.work import WorkStore
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.streaming import Feed
    from jobs.voices import Voices
    from jobs.work import Work


class SpeechEngine(Protocol):
    """The part of the engine's interface that jobs use; the real engine and the draft voice both have it."""

    @property
    def model(self) -> str:
        """Name of the model that speaks."""

    @property
    def sample_rate(self) -> int:
        """Hz of the waveforms."""

    @property
    def languages(self) -> Sequence[str]:
        """ISO 639-1 codes that it speaks."""

    @property
    def min_reference_s(self) -> float:
        """A voice prompt must be longer than this, seconds."""

    def voice_key(self, prompt_key: str) -> str:
        """The key that the conditionals of a prompt of this content hash have."""

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """A prompt's conditionals, kept for the next time. Blocks."""

    def submit(self, request: SpeechRequest) -> Future[Speech]:
        """Start speaking; cancelling the future frees what it holds."""

    def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
        """Start speaking in pieces; closing the stream frees what it holds.

        Args:
            request: what to say.
            early: give each piece as soon as that is possible; else in whatever size costs least.
            work: where to find what was spoken before, and to keep what is spoken now.
        """

    def submit_conversion(self, request: ConversionRequest) -> Future[Speech]:
        """Start saying a recording again in another voice; a future as `submit`'s."""

    def stats(self) -> dict[str, Any]:
        """Figures for `info`."""

    def close(self) -> None:
        """Free the model."""


@dataclass
class Progress:
    """How far a job has come, for a client whose job's time ends.

    Args:
        describe: says it, as the end of a sentence; "" where there is nothing to say.
    """

    describe: Callable[[], str] = str


@dataclass(frozen=True)
class JobContext:
    """One job's surroundings; made anew for each job, shared with none.

    Args:
        engine: who speaks.
        settings: the deployment's settings.
        voices: the voice library, or None where none is configured.
        local_files: whether an audio field may be `file:PATH` (a person's own machine only).
        warnings: what reading the input already had to say.
        work: what long jobs keep, or None where that is nowhere.
        report: tells the platform how far the job is, in figures; returns at once.
        progress: filled in by operations that take long.
        feed: takes the audio while it is spoken; None where the result is to hold it.
        started_s: `time.perf_counter()` when the job arrived.
    """

    engine: SpeechEngine
    settings: Settings
    voices: Voices | None = None
    local_files: bool = False
    warnings: tuple[str, ...] = ()
    work: Work | None = None
    report: Callable[[dict[str, Any]], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)
    feed: Feed | None = None
    started_s: float = field(default_factory=time.perf_counter)

    def with_warnings(self, warnings: tuple[str, ...]) -> JobContext:
        """The same job, with what reading its input had to say."""
        return dataclasses.replace(self, warnings=warnings)

    @property
    def max_result_bytes(self) -> int:
        """Most that the result may hold as JSON, 0 for no limit: a stream is limited by the piece, not as a whole."""
        return self.settings.max_result_bytes if self.feed is None else 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s
