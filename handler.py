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
import os
import re
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jobs import logs, loop
from jobs.audio_file import AUDIO_FIELDS
from jobs.errors import JobError, error_result
from jobs.schema import parse_job
from jobs.settings import Settings, SettingsError, read_settings
from jobs.streaming import join
from jobs.worker import Worker

DEFAULT_JOB = Path(__file__).resolve().parent / "test_input.json"
OUT_DIR = Path("out")
_PLATFORM_VARIABLES = ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_REALTIME_PORT")


def main(arguments: Sequence[str]) -> int:
    """Run a worker or one local job; returns the process's exit status."""
    options, rest = _parse_arguments(arguments)
    try:
        settings = read_settings()
    except SettingsError as error:
        return _refused(error)
    on_platform = any(os.environ.get(name) for name in _PLATFORM_VARIABLES)
    if not on_platform:
        settings = _local_settings(settings)
    logs.configure(settings)
    if options.test_input is not None:
        return run_local(options.test_input, settings)
    if not (on_platform or "--rp_serve_api" in rest):
        return run_local(f"@{DEFAULT_JOB}", settings)
    try:
        loop.serve(settings)
    except SettingsError as error:
        return _refused(error)
    return 0


def _refused(error: SettingsError) -> int:
    print(f"error: the environment holds settings that cannot be used: {error}", file=sys.stderr)
    return 2


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
        with logs.before_jobs():
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


def _file_stem(job: Mapping[str, Any]) -> str:
    """A safe file name from the job's id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", str(job.get("id") or "speech")).strip("-")[:60] or "speech"


def _audio_to_files(result: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The result with its audio written to out/ and replaced by the file's path."""
    fields = [field for field in AUDIO_FIELDS if field in result]
    if not fields:
        return dict(result)
    path = OUT_DIR / f"{stem}.{result['format']}"
    with _replacing(path) as file:
        file.write(base64.b64decode(result[fields[0]]))
    return {**result, **dict.fromkeys(fields, str(path))}


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
