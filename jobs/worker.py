"""The worker: one engine, loaded once, and the jobs that run on it.

The event loop only waits. Speaking happens in the engine's own threads (a future per job), reading
references and encoding in a thread pool. A job's failure, of whatever kind, ends in its own result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

from engine.errors import SpeechError
from engine.hub import download_bar
from engine.models import DRAFT
from engine.types import EngineConfig
from jobs import delete_voice, delivery, get_voice, info, list_voices, tts, voice_clone, voice_conversion
from jobs.context import JobContext, SpeechEngine
from jobs.errors import JobError, error_result
from jobs.schema import parse_job
from jobs.settings import Settings
from jobs.voices import Voices, open_library

OPERATIONS: Mapping[str, Callable[[Any, JobContext], Awaitable[dict[str, Any]]]] = {
    "tts": tts.run,
    "voice_clone": voice_clone.run,
    "voice_conversion": voice_conversion.run,
    "list_voices": list_voices.run,
    "get_voice": get_voice.run,
    "delete_voice": delete_voice.run,
    "info": info.run,
}

_TIMEOUT_MARGIN = 0.05
"""Share of the platform's execution timeout that is kept for answering."""

_log = logging.getLogger(__name__)


def load_engine(settings: Settings, *, show_download: bool = False) -> SpeechEngine:
    """Load the engine that MODEL names; what it needs is imported only now.

    Args:
        settings: which model, from where, on what.
        show_download: draw a progress bar on standard error while weights are fetched.

    Raises:
        SpeechError: model_unavailable, weights_missing, watermark_unavailable, out_of_memory.
    """
    config = EngineConfig(
        model=settings.model,
        model_dir=settings.model_dir,
        model_revision=settings.model_revision,
        device=settings.device,
        dtype=settings.dtype,
    )
    try:
        return _load_draft(config) if settings.model == DRAFT else _load_model(config, show_download)
    except ImportError as error:
        raise SpeechError("model_unavailable", f"MODEL={settings.model} cannot be served: {error}", "model") from error


def _load_draft(config: EngineConfig) -> SpeechEngine:
    from engine.draft import DraftEngine

    return DraftEngine.load(config)


def _load_model(config: EngineConfig, show_download: bool) -> SpeechEngine:
    from engine.engine import Engine

    with download_progress(config.model, shown=show_download) as progress:
        return Engine.load(config, progress=progress)


@contextmanager
def download_progress(label: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar that appears with the first bytes: weights that lie here already draw none."""
    if not shown:
        yield None
        return
    with ExitStack() as stack:
        bar: list[Callable[[int, int], None]] = []

        def show(num_done: int, num_total: int) -> None:
            if not bar:
                bar.append(stack.enter_context(download_bar(label)))
            bar[0](num_done, num_total)

        yield show


class Worker:
    """Runs jobs on one engine. Safe to run many at once.

    Args:
        engine: loaded and ready.
        settings: the deployment's settings.
        voices: the voice library as this engine speaks it; closed by `close`.
        local_files: whether audio fields may be `file:PATH`; for a person's own machine only.
    """

    def __init__(
        self, engine: SpeechEngine, settings: Settings, *, voices: Voices | None = None, local_files: bool = False
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._voices = voices
        self._local_files = local_files

    @classmethod
    def load(cls, settings: Settings, *, local: bool = False) -> Worker:
        """Open the voice library and load the engine that the settings name.

        Args:
            settings: the deployment's settings.
            local: whether a person runs this on their own machine: audio fields may be `file:PATH`, and
                a download shows its progress.

        Raises:
            LibraryError: storage_failed, invalid_request.
            SpeechError: see `load_engine`.
        """
        with ExitStack() as undo:
            library = open_library(settings)  # first: what is wrong with it is told before a model is loaded
            if library is not None:
                undo.callback(library.close)
            engine = load_engine(settings, show_download=local)
            undo.pop_all()
        voices = None
        if library is not None:
            voices = Voices(library, engine, max_cache_bytes=settings.voices_cache_bytes // 2)
            voices.preload(settings.preloaded)
        return cls(engine, settings, voices=voices, local_files=local)

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run one platform job.

        Returns:
            The result, or `{"error", "error_code", "field"}`. Nothing is raised but the cancellation of
            the calling task, which frees what the job held.
        """
        started_s = time.perf_counter()
        result = await self._answer(job)
        outcome = result.get("error_code") or "done"
        _log.info("job %s: %s in %.2f s", job.get("id"), outcome, time.perf_counter() - started_s)
        return result

    async def _answer(self, job: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._deadline():
                return await self._run(job)
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            return error_result(JobError("cancelled", "the engine gave this job up"))
        except Exception as error:
            return error_result(error)

    async def _run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        context = JobContext(self._engine, self._settings, self._voices, self._local_files)
        parsed = parse_job(job)
        context = context.with_warnings(parsed.warnings)
        result = await OPERATIONS[parsed.request.operation](parsed.request, context)
        await asyncio.to_thread(delivery.check_result, result, self._settings.max_result_bytes)
        return result

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Stop shortly before the platform would, so that the client learns why."""
        limit = self._settings.job_timeout_s
        try:
            async with asyncio.timeout(limit * (1 - _TIMEOUT_MARGIN) if limit else None) as deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise JobError("timed_out", f"the job was not done within JOB_TIMEOUT_S ({limit:g} s)") from None

    def close(self) -> None:
        """Finish what is being stored of voices, and free the engine."""
        if self._voices is not None:
            self._voices.close()
        self._engine.close()


class BrokenWorker:
    """A worker whose engine or voice library did not load: it answers every job with the reason.

    A container that dies at its start leaves jobs in the queue with nobody to say why. This one tells
    the client, and asks the platform for a fresh worker (`refresh_worker`), which tries again.
    """

    def __init__(self, error: BaseException) -> None:
        self._answer = error_result(error)
        _log.error("the worker could not start; every job is answered with: %s", self._answer["error"])

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The reason, for any job."""
        return {**self._answer, "refresh_worker": True}

    def close(self) -> None:
        """Nothing is held."""


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
