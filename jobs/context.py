"""What an operation gets besides its request: the engine, the settings, and when the job began."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engine.types import Conditionals, ConversionRequest, Speech, SpeechRequest, VoicePrompt
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.voices import Voices


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

    def submit_conversion(self, request: ConversionRequest) -> Future[Speech]:
        """Start saying a recording again in another voice; a future as `submit`'s."""

    def stats(self) -> dict[str, Any]:
        """Figures for `info`."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True)
class JobContext:
    """One job's surroundings; made anew for each job, shared with none.

    Args:
        engine: who speaks.
        settings: the deployment's settings.
        voices: the voice library, or None where none is configured.
        local_files: whether an audio field may be `file:PATH` (a person's own machine only).
        warnings: what reading the input already had to say.
        started_s: `time.perf_counter()` when the job arrived.
    """

    engine: SpeechEngine
    settings: Settings
    voices: Voices | None = None
    local_files: bool = False
    warnings: tuple[str, ...] = ()
    started_s: float = field(default_factory=time.perf_counter)

    def with_warnings(self, warnings: tuple[str, ...]) -> JobContext:
        """The same job, with what reading its input had to say."""
        return dataclasses.replace(self, warnings=warnings)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s
