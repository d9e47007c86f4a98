"""Speaks a text: through the speakers while it is spoken, into a file, or on to another program.

    python scripts/speak.py "Hello there."                        the speakers (with sounddevice installed)
    python scripts/speak.py --file chapter.txt --output ch.mp3    a file, of the kind that its name says
    echo "From a pipe." | python scripts/speak.py -o - | ffplay -nodisp -autoexit -
    tail -f events.log | python scripts/speak.py --lines          each line as it comes

This machine speaks, with the model that MODEL names (draft unless it is set); with --endpoint (or
RUNPOD_ENDPOINT_ID) a deployed worker does, with the key in RUNPOD_API_KEY. The audio alone is on standard
output, all else on standard error. What goes wrong is one line, and exit code 1. Ctrl-C leaves no file, but with
--lines one of the lines that were spoken whole, and cancels an endpoint's job; exit code 130. So do SIGTERM (143) and a
terminal that is closed (129). Ctrl-C again ends at once.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Run as a file, Python looks for packages beside it; they are in the folder above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from scripts.speaker import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes seconds to import

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import logs
from jobs.errors import JobError
from jobs.schema import parse_job
from jobs.settings import Settings, SettingsError, read_settings
from jobs.worker import Worker
from scripts.batch.client import Client
from scripts.batch.errors import EndpointError
from scripts.batch.rates import LIMITS
from scripts.console import complain
from scripts.speaker.reading import read_all, read_lines
from scripts.speaker.sinks import OneWav, Sink, SinkError, Speakers, file_sink, standard_output, write
from scripts.speaker.sources import Here, Source, SpeakingError, There

API_URL = "https://api.runpod.ai/v2"
FORMATS = ("wav", "flac", "mp3", "opus")
JOINABLE = ("wav", "mp3")
"""Kinds of which several, one after another, can be made one."""

_SUFFIXES = {**{f".{name}": name for name in FORMATS}, ".ogg": "opus"}
_ELSEWHERE = {"text": "the text itself, or --file", "output_format": "--format"}
_MAX_TTS_CHARS = 5_000

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None)


class UsageError(Exception):
    """What was asked for cannot be; the message says what was expected."""


@dataclass(frozen=True)
class Asked:
    """What to say, and how.

    Args:
        text: to say; None for standard input.
        lines: whether each line is spoken as it comes.
        fields: of the jobs, beside the text.
        output: a file, "-" for standard output, None for the speakers.
        endpoint: who speaks: an endpoint's URL, None for this machine.
    """

    text: str | None
    lines: bool
    fields: dict[str, Any]
    output: str | None
    endpoint: str | None


@app.command()
def main(
    text: Annotated[str | None, typer.Argument(help="What to say; - or none for standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with the text.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="A file, or - for standard output.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Speak each line as it comes.")] = False,
    voice: Annotated[str | None, typer.Option("--voice", "-v", help="Name or id of a voice in the library.")] = None,
    reference: Annotated[Path | None, typer.Option("--reference", "-r", help="A recording of the voice.")] = None,
    language: Annotated[str | None, typer.Option("--language", "-l", help="Such as en.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same audio.")] = None,
    audio_format: Annotated[str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another field of the job.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="A deployed endpoint's id.", envvar="RUNPOD_ENDPOINT_ID")] = None,
    api_url: Annotated[str, typer.Option(help="Where endpoints are.")] = API_URL,
) -> None:
    """Speak a text."""
    try:
        fields = {"voice_name": voice, "language": language, "seed": seed, **_fields(more or [])}
        if reference is not None:
            fields["reference_audio"] = _recording(reference)
        fields["output_format"] = _format(audio_format, output)
        given = {name: value for name, value in fields.items() if value is not None}
        url = None if endpoint is None else f"{api_url.rstrip('/')}/{endpoint}"
        asked = Asked(_text(text, file), lines, given, output, url)
        _check(asked)
        interrupts.run(_speak(asked))
    except (UsageError, SettingsError, SinkError, SpeakingError, EndpointError, JobError) as error:
        code = f" ({error.code})" if isinstance(error, JobError) else ""
        complain(f"error: {error}{code}")
        raise typer.Exit(1) from error
    except BrokenPipeError:  # whoever listened has heard enough
        _drop_output()
        raise typer.Exit(1) from None
    except OSError as error:
        complain(f"error: {error}")
        raise typer.Exit(1) from error
    except interrupts.Interrupted as interrupted:
        _drop_output()
        raise typer.Exit(interrupted.exit_code) from None


def _drop_output() -> None:
    """What standard output still holds goes nowhere: at its end Python would complain that nobody takes it."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------ what was asked for


def _text(text: str | None, file: Path | None) -> str | None:
    if file is not None:
        if text is not None:
            raise UsageError("expected a text or --file, got both")
        return _decoded(file.read_bytes(), str(file))
    if text not in (None, "-"):
        return text
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("expected a text, --file, or text on standard input")
    return None


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} is no UTF-8 text") from error


def _fields(given: list[str]) -> dict[str, Any]:
    """Fields of the job, each value as JSON where it is some, else as text."""
    fields: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: expected FIELD=VALUE")
        if name in _ELSEWHERE:
            raise UsageError(f"--set {name} has no place here; say it with {_ELSEWHERE[name]}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def _recording(path: Path) -> str:
    import base64

    return base64.b64encode(path.read_bytes()).decode("ascii")


def _format(named: str | None, output: str | None) -> str:
    suffix = "" if output in (None, "-") else Path(output or "").suffix.lower()
    of_name = _SUFFIXES.get(suffix)
    wanted = named or of_name or suffix.removeprefix(".") or "wav"
    if wanted not in FORMATS:
        raise UsageError(f"expected a file or --format of {', '.join(FORMATS)}, got {wanted!r}")
    if of_name not in (None, wanted):
        raise UsageError(f"--format {wanted} does not go with {output}, whose name says {of_name}")
    if output is None and wanted != "wav":
        raise UsageError(f"the speakers take wav, not {wanted}; --output names a file")
    return wanted


def _check(asked: Asked) -> None:
    """What can be told before a model is loaded."""
    audio_format = asked.fields["output_format"]
    if asked.lines and audio_format not in JOINABLE:
        raise UsageError(f"--lines goes with {' and '.join(JOINABLE)}, which can be made one, not with {audio_format}")
    parse_job({"input": _job(asked.text or "Some text.", asked)})


def _job(text: str, asked: Asked) -> dict[str, Any]:
    is_long = len(text) > _MAX_TTS_CHARS
    return {"text": text, **({"operation": "long_form"} if is_long else {}), **asked.fields}


# ------------------------------------------------------------------------------ doing it


async def _speak(asked: Asked) -> None:
    with _sink(asked) as sink:
        async with contextlib.AsyncExitStack() as stack:
            source = await _source(asked, stack)
            is_said = False
            async for text in _texts(asked):
                await _say(text, asked, source, sink)
                is_said = True
        if not is_said:
            raise UsageError("there is nothing to say: no line has a letter or a digit")


async def _say(text: str, asked: Asked, source: Source, sink: Sink) -> None:
    result: dict[str, Any] = {}
    is_heard = False
    async with contextlib.aclosing(source.speak(_job(text, asked), result)) as pieces:  # type: ignore[type-var]
        async for data in pieces:
            await write(sink, data)
            is_heard |= bool(data)
    if not is_heard:
        raise SpeakingError("the job ended well, but there is no audio in its result")
    sink.end_file()
    warnings = result.get("warnings")
    for warning in warnings if isinstance(warnings, list) else ():
        if not str(warning).startswith("idempotency_key"):  # which is ours, and for a lost answer only
            complain(f"warning: {warning}")


@contextlib.contextmanager
def _sink(asked: Asked) -> Iterator[Sink]:
    is_many_wavs = asked.lines and asked.fields["output_format"] == "wav"
    if asked.output is None:
        speakers = Speakers()
        yield speakers
        speakers.close()
    elif asked.output == "-":
        out = standard_output()
        yield OneWav(out) if is_many_wavs else out
    else:
        with file_sink(Path(asked.output), keeps_whole=asked.lines) as file:
            yield OneWav(file) if is_many_wavs else file


async def _source(asked: Asked, stack: contextlib.AsyncExitStack) -> Source:
    if asked.endpoint is not None:
        key = os.environ.get("RUNPOD_API_KEY")
        if not key:
            raise UsageError("an endpoint needs its key in RUNPOD_API_KEY")
        client = Client(asked.endpoint, key, LIMITS, on_trouble=_tell_trouble)
        return There(await stack.enter_async_context(client), complain)
    worker = await asyncio.to_thread(Worker.load, _settings(), local=True)
    stack.callback(worker.close)
    return Here(worker)


def _settings() -> Settings:
    settings = read_settings()
    local = settings.for_local_test()
    logs.configure(local)
    if "model" not in settings.model_fields_set:
        complain(f"Speaking with the {local.model} voice; set MODEL (MODEL=nano, MODEL=turbo, …) for a real model.")
    return local


def _tell_trouble(operation: str, message: str) -> None:
    complain(f"{operation}: {message}; trying again")


async def _texts(asked: Asked) -> AsyncIterator[str]:
    if not asked.lines:
        yield _decoded(await read_all(), "standard input") if asked.text is None else asked.text
        return
    async for line in read_lines() if asked.text is None else _lines_of(asked.text):
        text = line.decode("utf-8", "replace").strip()
        if any(character.isalnum() for character in text):
            yield text


async def _lines_of(text: str) -> AsyncIterator[bytes]:
    for line in text.encode().splitlines():
        yield line


if __name__ == "__main__":
    app()
