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
from jobs.metrics import JobFigures, Metrics
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.bucket import Bucket
    from jobs.fetch import Fetcher
    from jobs.streaming import Feed
    from jobs.voices import Voices
    from jobs.work import Work


TIMEOUT_MARGIN = 0.05
"""Share of the platform's execution timeout that is kept for answering."""


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

    @property
    def is_lost(self) -> bool:
        """Whether its device failed for good: every request is refused, and only a new process speaks again."""

    def free_bytes(self) -> dict[str, int]:
        """Memory that requests can still have, by place, where that is known."""

    def close(self) -> None:
        """Free the model."""


@dataclass
class Progress:
    """How far a job has come, for a client whose job's time ends.

    Args:
        describe: says it, as the end of a sentence; "" where there is nothing to say.
    """

    describe: Callable[[], str] = str


@dataclass
class Delivered:
    """Audio that lies in a bucket.

    Args:
        name: of the object; None as long as there is none.
        fields: of the result that would have held the audio.
    """

    name: str | None = None
    fields: tuple[str, ...] = ()


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
        fetch: gets recordings from their addresses; None where none may be named.
        feed: takes the audio while it is spoken; None where the result is to hold it.
        job_id: the platform's name of the job; None where it has none.
        bucket: where audio can be delivered to, or None.
        delivered: filled in when that was done.
        figures: what there is to count of the job, added by whoever learns of it.
        metrics: what was counted of all jobs.
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
    fetch: Fetcher | None = None
    feed: Feed | None = None
    job_id: str | None = None
    bucket: Bucket | None = None
    delivered: Delivered = field(default_factory=Delivered)
    figures: JobFigures = field(default_factory=JobFigures)
    metrics: Metrics = field(default_factory=Metrics)
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

    @property
    def time_left_s(self) -> float | None:
        """Seconds until the job is stopped; None for no end."""
        limit_s = self.settings.job_timeout_s
        return max(limit_s * (1 - TIMEOUT_MARGIN) - self.elapsed_s, 0.0) if limit_s else None
