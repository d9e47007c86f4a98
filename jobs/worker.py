"""The worker: one engine, loaded once, and the jobs that run on it.

The event loop only waits. Speaking happens in the engine's own threads (a future per job), reading
references and encoding in a thread pool. A job's failure, of whatever kind, ends in its own result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from engine.errors import SpeechError
from engine.hub import download_bar
from engine.models import DRAFT
from engine.types import EngineConfig
from jobs import (
    delete_voice,
    delivery,
    fitness,
    get_voice,
    info,
    list_voices,
    long_form,
    tts,
    voice_clone,
    voice_conversion,
)
from jobs.bucket import Bucket, open_bucket
from jobs.context import TIMEOUT_MARGIN, JobContext, Progress, SpeechEngine
from jobs.errors import JobError, error_result
from jobs.fetch import Fetcher
from jobs.fitness import Check
from jobs.intake import prepared
from jobs.logs import about_job, job_content, known_field
from jobs.metrics import Metrics
from jobs.results import Results, once, open_results
from jobs.schema import operation_of, parse_job
from jobs.settings import Settings
from jobs.streaming import Feed, error_piece
from jobs.voices import Voices, open_library
from jobs.work import Work, open_work

if TYPE_CHECKING:
    from jobs.exporter import Exporter

OnLost = Callable[[bool], None]

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
        bucket: where audio may be delivered to; closed by `close`.
        results: what is kept of jobs with a key; closed by `close`.
        fetch: gets recordings from their addresses; by default as the settings say; closed by `close`.
        exporter: shows the figures of the jobs and the engine; closed by `close`.
        local_files: whether audio fields may be `file:PATH`; for a person's own machine only.
        on_lost: called on the event loop as each job ends once the device has failed for good, and told whether it
            was the last one running: this process can only finish what it has, and must be replaced.

    Attributes:
        metrics: the figures of all jobs until now.
    """

    def __init__(
        self,
        engine: SpeechEngine,
        settings: Settings,
        *,
        voices: Voices | None = None,
        work: Work | None = None,
        bucket: Bucket | None = None,
        results: Results | None = None,
        fetch: Fetcher | None = None,
        exporter: Exporter | None = None,
        local_files: bool = False,
        on_lost: OnLost = lambda _is_last: None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._voices = voices
        self._work = work
        self._bucket, self._results = bucket, results
        self._fetch = fetch or Fetcher(settings)
        self._local_files = local_files
        self._on_lost = on_lost
        self._num_running = 0
        self.metrics = Metrics()
        self._exporter = exporter
        if exporter is not None:
            exporter.show(self.metrics, engine.stats)

    @classmethod
    def load(cls, settings: Settings, *, local: bool = False, on_lost: OnLost = lambda _is_last: None) -> Worker:
        """Open the voice library and load the engine that the settings name.

        Args:
            settings: the deployment's settings.
            local: whether a person runs this on their own machine: audio fields may be `file:PATH`, and
                a download shows its progress.
            on_lost: see `Worker`.

        Raises:
            LibraryError: storage_failed, invalid_request.
            JobError: invalid_request, where METRICS_PORT cannot be had.
            SpeechError: see `load_engine`.
        """
        with ExitStack() as undo:
            library = open_library(settings)  # first: what is wrong with it is told before a model is loaded
            if library is not None:
                undo.callback(library.close)
            work = open_work(settings)
            if work is not None:
                undo.callback(work.close)
            bucket = open_bucket(settings)
            if bucket is not None:
                undo.callback(bucket.close)
            results = open_results(settings)
            if results is not None:
                undo.callback(results.close)
            exporter = None if settings.metrics_port is None else _open_exporter(settings.metrics_port)
            if exporter is not None:
                undo.callback(exporter.close)
            engine = load_engine(settings, show_download=local)
            undo.pop_all()
        voices = None
        if library is not None:
            voices = Voices(library, engine, max_cache_bytes=settings.voices_cache_bytes // 2)
            voices.preload(settings.preloaded)
        return cls(
            engine,
            settings,
            voices=voices,
            work=work,
            bucket=bucket,
            results=results,
            exporter=exporter,
            local_files=local,
            on_lost=on_lost,
        )

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
        return await self._attended(job, report=report)

    async def stream(self, job: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Run one platform job and give its answer in pieces, see `jobs.streaming`.

        The work stops at once when this generator is closed, and when the task that takes the pieces ends. The SDK
        cancels that task where a job is stopped: if it is sending a piece just then, nothing is raised here, and the
        generator is not closed before another job ends.
        """
        feed = Feed()
        answering = asyncio.create_task(self._attended(job, feed=feed))
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

    async def _attended(self, job: Mapping[str, Any], **surroundings: Any) -> dict[str, Any]:
        """What became of a job; then a look at the device that made it."""
        self._num_running += 1
        try:
            return await self._told(job, **surroundings)
        finally:
            self._num_running -= 1
            if self._engine.is_lost:
                self._on_lost(self._num_running == 0)

    def fitness_checks(self) -> Sequence[Check]:
        """What must hold before the first job is taken, see `jobs.fitness`."""
        return fitness.checks(self._engine, self._voices, self._settings)

    async def _told(self, job: Mapping[str, Any], **surroundings: Any) -> dict[str, Any]:
        """What became of a job, counted and told to the log too."""
        figures = self.metrics.begin()
        result: dict[str, Any] = {}
        with about_job(job.get("id")):
            try:
                result = await self._answer(job, figures=figures, **surroundings)
                figures.take(result)
            finally:
                self.metrics.end(figures)
                about = {**figures.for_log(), "field": known_field(result.get("field"))}
                more = {"figures": about, "content": job_content(job, result)}
                name = job.get("id") or "without id"
                _log.info("job %s: %s in %.2f s", name, figures.outcome, figures.seconds, extra=more)
        return result

    async def _answer(self, job: Mapping[str, Any], **surroundings: Any) -> dict[str, Any]:
        context = JobContext(
            self._engine,
            self._settings,
            self._voices,
            self._local_files,
            work=self._work,
            job_id=_id_of(job),
            bucket=self._bucket,
            fetch=self._fetch,
            metrics=self.metrics,
            **surroundings,
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
        context.figures.operation = operation_of(job)
        parsed = parse_job(job)
        with prepared(parsed, context) as (request, surroundings):

            async def make() -> dict[str, Any]:
                result = await OPERATIONS[request.operation](request, surroundings)
                await asyncio.to_thread(delivery.check_result, result, surroundings.max_result_bytes)
                return result

            result = await once(request, surroundings, self._results, make)
            if result.get("repeated"):  # perhaps made under another limit
                await asyncio.to_thread(delivery.check_result, result, surroundings.max_result_bytes)
            return result

    @asynccontextmanager
    async def _deadline(self, progress: Progress) -> AsyncIterator[None]:
        """Stop shortly before the platform would, so that the client learns why."""
        limit = self._settings.job_timeout_s
        try:
            async with asyncio.timeout(limit * (1 - TIMEOUT_MARGIN) if limit else None) as deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            how_far = progress.describe()
            message = f"the job was not done within JOB_TIMEOUT_S ({limit:g} s)"
            raise JobError("timed_out", f"{message}: {how_far}" if how_far else message) from None

    def close(self) -> None:
        """Finish what is being stored, free the engine, and let go of all that `load` opened."""
        self._fetch.close()
        if self._voices is not None:
            self._voices.close()
        self._engine.close()
        for held in (self._work, self._bucket, self._results):
            if held is not None:
                held.close()
        if self._exporter is not None:
            self._exporter.close()


def _open_exporter(port: int) -> Exporter:
    from jobs.exporter import Exporter  # and prometheus_client, where it is asked for

    return Exporter(port)


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

    def fitness_checks(self) -> Sequence[Check]:
        """None: it is here to say what is wrong."""
        return ()

    def close(self) -> None:
        """Nothing is held."""


def _id_of(job: Mapping[str, Any]) -> str | None:
    """The platform's id of a job."""
    job_id = job.get("id")
    return str(job_id) if job_id else None


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
