"""RunPod entry point, and one job at a time on a person's own machine.

    python handler.py                             run test_input.json
    python handler.py --test_input '{"input": …}'  run this job; @job.json reads a file, - standard input
    python handler.py --rp_serve_api              serve the platform's API on this machine

Where the platform started this process, it takes jobs until it is told to stop. Elsewhere it runs one
job through the same code, without a key or a network: the audio goes to out/, the result to standard
output with the audio's path in place of its base64, and a summary to standard error. (The SDK's own
local run is not used: it prints the whole base64, reads neither files nor standard input, and never
runs a generator.)

With STREAMING on, jobs are answered in pieces (`jobs.streaming`) instead of with one result; a local
run writes them to the file as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jobs.errors import JobError, error_result
from jobs.schema import parse_job
from jobs.settings import Settings, SettingsError, read_settings
from jobs.streaming import join
from jobs.worker import BrokenWorker, Worker

DEFAULT_JOB = Path(__file__).resolve().parent / "test_input.json"
OUT_DIR = Path("out")
_AUDIO_FIELDS = ("audio", "sample_audio")
_PLATFORM_VARIABLES = ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_REALTIME_PORT")
_PROGRESS_EVERY_S = 5.0
_ROOMS = ("handler", "jobs", "engine", "voice_library")

_log = logging.getLogger("handler")


def main(arguments: Sequence[str]) -> int:
    """Run a worker or one local job; returns the process's exit status."""
    options, rest = _parse_arguments(arguments)
    try:
        settings = read_settings()
    except SettingsError as error:
        print(f"error: the environment holds settings that cannot be used: {error}", file=sys.stderr)
        return 2
    on_platform = any(os.environ.get(name) for name in _PLATFORM_VARIABLES)
    if not on_platform:
        settings = _local_settings(settings)
    _configure_logging(settings.log_level)
    if options.test_input is not None:
        return run_local(options.test_input, settings)
    if not (on_platform or "--rp_serve_api" in rest):
        return run_local(f"@{DEFAULT_JOB}", settings)
    serve(settings)
    return 0


def serve(settings: Settings) -> None:
    """Load the model, then take jobs through the SDK until it returns."""
    worker = _load_worker(settings)
    runpod = _import_runpod(settings.log_level)
    sends_progress = bool(os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT"))

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        updates = ProgressUpdates(lambda figures: runpod.serverless.progress_update(job, figures))
        with updates:
            return await worker.run(job, updates.report if sends_progress else lambda _figures: None)

    served: dict[str, Any] = {"handler": worker.stream} if settings.streaming else {"handler": handler}
    if settings.streaming and isinstance(worker, BrokenWorker):
        served["refresh_worker"] = True  # which no piece of a stream can ask for
    try:
        runpod.serverless.start(served | {"concurrency_modifier": lambda _current: settings.max_concurrency})
    finally:
        worker.close()


class ProgressUpdates:
    """How far a job is, sent now and then while it runs.

    The SDK sends each update in a thread of its own, and one that arrives after the result would make a finished job
    look unfinished: so the first waits too, jobs that are soon done send none, and nothing is sent at the very end.

    Args:
        send: hands figures to the platform.
        clock: gives seconds.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._send, self._clock = send, clock
        self._sent_s = clock()
        self._is_over = False

    def report(self, figures: dict[str, Any]) -> None:
        """Send figures, if it is time to."""
        now_s = self._clock()
        is_done = figures["chunks_done"] >= figures["chunks"]
        if not (self._is_over or is_done) and now_s - self._sent_s >= _PROGRESS_EVERY_S:
            self._sent_s = now_s
            self._send(figures)

    def __enter__(self) -> ProgressUpdates:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True


def run_local(source: str, settings: Settings) -> int:
    """Run one job, write its audio to out/ and report it; 1 when the job failed."""
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result alone
        job, result = asyncio.run(_run_once(source, settings))
    print(json.dumps(result, indent=2, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8"))
    print(_summary(job, result), file=sys.stderr)
    return 1 if "error" in result else 0


async def _run_once(source: str, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        job = read_job(source)
        parse_job(job)  # a mistake is told before a model is loaded
        worker = await asyncio.to_thread(Worker.load, settings, local=True)
    except Exception as error:
        return {}, error_result(error)
    with contextlib.closing(worker):
        try:
            if settings.streaming:
                return job, await _stream_to_file(worker.stream(job), _file_stem(job))
            return job, _audio_to_files(await worker.run(job), _file_stem(job))
        except JobError as error:
            return job, error_result(error)
        except OSError as error:
            message = f"the audio cannot be written to {OUT_DIR}/: {error}"
            return job, error_result(JobError("storage_failed", message))


def read_job(source: str) -> dict[str, Any]:
    """The job in `source`: JSON, `@PATH` of a JSON file, or `-` for standard input.

    Raises:
        JobError: invalid_request.
    """
    try:
        text = _job_text(source)
        job = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(
            "invalid_request",
            f"--test_input: expected a job as JSON, @PATH of a JSON file, or - for standard input: {error}",
            "input",
        ) from error
    if not isinstance(job, dict):
        raise JobError("invalid_request", 'expected a job {"input": {…}}', "input")
    return job


def _job_text(source: str) -> str:
    if source == "-":
        return sys.stdin.read().removeprefix("\ufeff")
    return Path(source[1:]).read_text(encoding="utf-8-sig") if source.startswith("@") else source


def _parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="handler.py",
        description="Run one job on this machine, or a RunPod worker where the platform started it.",
        epilog="The SDK's own options (--rp_serve_api, --rp_api_port, --rp_log_level, …) are handed on to it.",
        allow_abbrev=False,
    )
    parser.add_argument("--test_input", metavar="JOB", help="a job as JSON, @PATH of a file, or - (standard input)")
    options, rest = parser.parse_known_args(arguments)
    if not any(argument.startswith("--rp_") for argument in rest) and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def _local_settings(settings: Settings) -> Settings:
    local = settings.for_local_test()
    if "model" not in settings.model_fields_set:
        print(
            f"Speaking with the {local.model} voice; set MODEL (MODEL=nano, MODEL=turbo, …) for a real model.",
            file=sys.stderr,
        )
    return local


def _load_worker(settings: Settings) -> Worker | BrokenWorker:
    if settings.unused:
        _log.warning("set, and not used by this version: %s", ", ".join(settings.unused))
    try:
        return Worker.load(settings)
    except Exception as error:
        return BrokenWorker(error)


def _configure_logging(level: str) -> None:
    """Our rooms at LOG_LEVEL, libraries from warnings up. First come, first served: the SDK's own
    logging set-up finds a root handler and leaves it alone."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    for room in _ROOMS:
        logging.getLogger(room).setLevel(level)


def _import_runpod(level: str) -> Any:
    """Import the SDK with its logger tamed: at its default level, DEBUG, it prints whole outputs."""
    sdk_levels = {"DEBUG": "INFO", "INFO": "INFO", "WARNING": "WARN"}
    os.environ["RUNPOD_LOG_LEVEL"] = sdk_levels.get(level, "ERROR")
    import runpod

    return runpod


def _file_stem(job: Mapping[str, Any]) -> str:
    """A safe file name from the job's id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", str(job.get("id") or "speech")).strip("-")[:60] or "speech"


def _audio_to_files(result: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The result with its audio written to out/ and replaced by the file's path."""
    path = OUT_DIR / f"{stem}.{result.get('format', 'bin')}"
    replaced = dict(result)
    for field in _AUDIO_FIELDS:
        if field in result:
            _write_atomically(path, base64.b64decode(result[field]))
            replaced[field] = str(path)
    return replaced


async def _stream_to_file(pieces: AsyncGenerator[dict[str, Any], None], stem: str) -> dict[str, Any]:
    """The result that pieces make, with the audio written to out/ as it comes and replaced by the file's path.

    Raises:
        JobError: what the stream ends with.
    """
    result: dict[str, Any] = {}
    file: BinaryIO | None = None
    async with contextlib.aclosing(pieces), contextlib.AsyncExitStack() as files:
        async for piece in pieces:
            if "error" in piece:
                error = json.loads(piece["error"])
                raise JobError(error["error_code"], error["error"], error["field"])
            if piece.get("audio") and file is None:
                path = OUT_DIR / f"{stem}.{piece['format']}"
                file = files.enter_context(_replacing(path))
                result["audio"] = str(path)
            if file is not None:
                file.write(base64.b64decode(piece["audio"]))
            join(result, piece)
    return result


def _write_atomically(path: Path, data: bytes) -> None:
    with _replacing(path) as file:
        file.write(data)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name and its predecessor's place when it is whole; nothing is left of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _summary(job: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """A few lines for a person."""
    if "error" in result:
        return f"error ({result['error_code']}): {result['error']}"
    if "audio" not in result:
        return f"done: {job.get('input', {}).get('operation', 'tts')}"
    text = " ".join(chunk["text"] for chunk in result["chunks"])
    lines = {
        "text": text if len(text) <= 100 else f"{text[:99]}…",
        "voice": f"{result['voice']} ({result['model']})",
        "duration": f"{result['duration_s']:.2f} s",
        "real-time factor": f"{result['timings']['real_time_factor']:.3f}",
        "file": result["audio"],
    }
    warnings = [f"  warning: {warning}" for warning in result["warnings"]]
    return "\n".join([*(f"  {name:<17} {value}" for name, value in lines.items()), *warnings])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
