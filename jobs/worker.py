"""The worker: one engine, loaded once, and the jobs that run on it.

The event loop only waits. Speaking happens in the engine's own threads (a future per job), reading
references and encoding in a thread pool. A job's failure, of whatever kind, ends in its own result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

from engine.errors import SpeechError
from engine.hub import download_bar
from engine.models import DRAFT
from engine.types import EngineConfig
from jobs import delete_voice, delivery, get_voice, info, list_voices, long_form, tts, voice_clone, voice_conversion
from jobs.context import JobContext, Progress, SpeechEngine
from jobs.errors import JobError, error_result
from jobs.schema import parse_job
from jobs.settings import Settings
from jobs.streaming import Feed, error_piece
from jobs.voices import Voices, open_library
from jobs.work import Work, open_work

OPERATIONS: Mapping[str, Callable[[Any, JobContext], Awaitable[dict[str, Any]]]] = {
    "tts": tts.run,
    "long_form": long_form.run,
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
        work: what long jobs keep; closed by `close`.
        local_files: whether audio fields may be `file:PATH`; for a person's own machine only.
    """

    def __init__(
        self,
        engine: SpeechEngine,
        settings: Settings,
        *,
        voices: Voices | None = None,
        work: Work | None = None,
        local_files: bool = False,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._voices = voices
        self._work = work
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
            work = open_work(settings)
            if work is not None:
                undo.callback(work.close)
            engine = load_engine(settings, show_download=local)
            undo.pop_all()
        voices = None
        if library is not None:
            voices = Voices(library, engine, max_cache_bytes=settings.voices_cache_bytes // 2)
            voices.preload(settings.preloaded)
        return cls(engine, settings, voices=voices, work=work, local_files=local)

    async def run(
        self, job: Mapping[str, Any], report: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> dict[str, Any]:
        """Run one platform job.

        Args:
            job: as the platform gives it.
            report: is told now and then how far a long job is; returns at once.

        Returns:
            The result, or `{"error", "error_code", "field"}`. Nothing is raised but the cancellation of
            the calling task, which frees what the job held.
        """
        return await self._told(job, report=report)

    async def stream(self, job: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Run one platform job and give its answer in pieces, see `jobs.streaming`.

        The work stops at once when this generator is closed, and when the task that takes the pieces ends. The SDK
        cancels that task where a job is stopped: if it is sending a piece just then, nothing is raised here, and the
        generator is not closed before another job ends.
        """
        feed = Feed()
        answering = asyncio.create_task(self._told(job, feed=feed))
        answering.add_done_callback(lambda _: feed.end())
        taker = asyncio.current_task()
        assert taker is not None

        def give_up(_: object) -> None:
            answering.cancel()

        taker.add_done_callback(give_up)
        try:
            async for piece in feed:
                yield piece
            for piece in await asyncio.to_thread(feed.closing, await answering):
                yield piece
        finally:
            taker.remove_done_callback(give_up)
            answering.cancel()
            await asyncio.wait([answering])

    async def _told(self, job: Mapping[str, Any], **surroundings: Any) -> dict[str, Any]:
        """What became of a job, told to the log too."""
        started_s = time.perf_counter()
        outcome = "stopped"
        try:
            result = await self._answer(job, **surroundings)
            outcome = result.get("error_code") or "done"
        finally:
            _log.info("job %s: %s in %.2f s", job.get("id"), outcome, time.perf_counter() - started_s)
        return result

    async def _answer(self, job: Mapping[str, Any], **surroundings: Any) -> dict[str, Any]:
        context = JobContext(
            self._engine, self._settings, self._voices, self._local_files, work=self._work, **surroundings
        )
        try:
            async with self._deadline(context.progress):
                return await self._run(job, context)
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            return error_result(JobError("cancelled", "the engine gave this job up"))
        except Exception as error:
            return error_result(error)

    async def _run(self, job: Mapping[str, Any], context: JobContext) -> dict[str, Any]:
        parsed = parse_job(job)
        context = context.with_warnings(parsed.warnings)
        result = await OPERATIONS[parsed.request.operation](parsed.request, context)
        await asyncio.to_thread(delivery.check_result, result, context.max_result_bytes)
        return result

    @asynccontextmanager
    async def _deadline(self, progress: Progress) -> AsyncIterator[None]:
        """Stop shortly before the platform would, so that the client learns why."""
        limit = self._settings.job_timeout_s
        try:
            async with asyncio.timeout(limit * (1 - _TIMEOUT_MARGIN) if limit else None) as deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            how_far = progress.describe()
            message = f"the job was not done within JOB_TIMEOUT_S ({limit:g} s)"
            raise JobError("timed_out", f"{message}: {how_far}" if how_far else message) from None

    def close(self) -> None:
        """Finish what is being stored of voices, and free the engine."""
        if self._voices is not None:
            self._voices.close()
        self._engine.close()
        if self._work is not None:
            self._work.close()


class BrokenWorker:
    """A worker whose engine or voice library did not load: it answers every job with the reason.

    A container that dies at its start leaves jobs in the queue with nobody to say why. This one tells
    the client, and asks the platform for a fresh worker (`refresh_worker`), which tries again.
    """

    def __init__(self, error: BaseException) -> None:
        self._answer = error_result(error)
        _log.error("the worker could not start; every job is answered with: %s", self._answer["error"])

    async def run(
        self, job: Mapping[str, Any], report: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> dict[str, Any]:
        """The reason, for any job."""
        return {**self._answer, "refresh_worker": True}

    async def stream(self, job: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The reason, for any job. A piece cannot ask for a fresh worker: whoever serves the stream has to."""
        yield error_piece(self._answer)

    def close(self) -> None:
        """Nothing is held."""


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
