"""What the worker says while it runs: lines on standard error, one JSON object each, or plain ones for people.

What clients send stays out of them. Our own lines are written without it, and what others wrote is not trusted: of
exceptions only types and places are told, of libraries' lines only the template, since either may quote a text. With
LOG_CONTENT the words come back, and with them the text of each job and of its error. Queries of URLs (which sign
downloads) and the worker's own secrets are left out even then.

Lines that are written for a job carry its id: a context variable holds it, which tasks, `asyncio.to_thread` and
`in_context` hand on. The engine's threads serve many jobs at once and know none of them, so their lines carry no id;
what went wrong there is the outcome of the job's own line, which follows.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import functools
import itertools
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, ParamSpec, TextIO, TypeVar

from pydantic import BaseModel, SecretStr

from jobs.errors import printable
from jobs.schema import INPUT_MODELS, LongFormSegment
from jobs.settings import Settings

ROOMS = ("handler", "jobs", "engine", "voice_library")
"""Our loggers, and all below them; everybody else's begin at WARNING."""

MAX_LINE_BYTES = 16_000
"""Of a line of JSON. Container runtimes cut what is longer than 16 KiB into several."""

_LIMITS = (3_000, 700, 150, 30)
"""Most characters of a field, tried in this order until the line is short enough."""

_EXCEPTION_SHARE = 3
"""An exception may be so many times longer than any other field."""

_MAX_RAW_CHARS = 50_000
"""Of a text that is looked through for secrets before it is cut."""

_MAX_CHAIN = 8
"""Exceptions told of those that caused each other."""

_MIN_SECRET_CHARS = 4
"""What is shorter protects nothing, and would be found in every other word."""

_SECRET_VARIABLES = (
    *("RUNPOD_AI_API_KEY", "RUNPOD_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)
"""Of the environment, beside the settings that are secret: what the packages below read by themselves."""

_HIDDEN = "***"
_WITHHELD = "words withheld, LOG_CONTENT=1 shows them"
_FIELD = re.compile(r"(?:segments\[\d+\]\.)?(\w+)")
_BEHIND_SCHEME = re.compile(r"://[^\s\"'<>]*")

_P = ParamSpec("_P")
_T = TypeVar("_T")

_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
_is_before_jobs: ContextVar[bool] = ContextVar("is_before_jobs", default=False)


@contextmanager
def about_job(job_id: object) -> Iterator[None]:
    """Lines written within it, by this task and those it starts, carry the job's id."""
    token = _job_id.set(None if job_id is None else printable(str(job_id)))
    try:
        yield
    finally:
        _job_id.reset(token)


@contextmanager
def before_jobs() -> Iterator[None]:
    """Within it no line can hold anything of a job: exceptions and libraries keep their words."""
    token = _is_before_jobs.set(True)
    try:
        yield
    finally:
        _is_before_jobs.reset(token)


def in_context(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Callable[[], _T]:
    """A call for another thread, whose lines carry the id of the job that asks for it."""
    return functools.partial(contextvars.copy_context().run, functools.partial(function, *args, **kwargs))


def known_field(field: str | None) -> str | None:
    """The field that an error names, if it is one of ours: a client may call a field anything."""
    named = _FIELD.fullmatch(field or "")
    models: list[type[BaseModel]] = [*INPUT_MODELS.values(), LongFormSegment]
    return field if named and any(named[1] in model.model_fields for model in models) else None


def job_content(job: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """What only LOG_CONTENT shows of a job: the beginning of its text, and its error."""
    fields = job.get("input")
    content = {"text": _text(fields) if isinstance(fields, dict) else "", "error": str(result.get("error") or "")}
    return {name: text for name, text in content.items() if text}


def _text(fields: Mapping[str, Any]) -> str:
    segments = fields.get("segments")
    spoken = [segment.get("text") for segment in _first(segments) if isinstance(segment, dict)]
    texts = [text for text in (fields.get("text"), *spoken) if isinstance(text, str)]
    return " ".join(text[: _LIMITS[0]] for text in texts)


def _first(segments: object) -> Iterator[object]:
    return itertools.islice(segments, 100) if isinstance(segments, list) else iter(())


def configure(
    settings: Settings, environment: Mapping[str, str] = os.environ, stream: TextIO | None = None
) -> logging.Handler:
    """Have all loggers of the process write lines as the settings say.

    First come, first served: the SDK's own logging set-up finds a handler at the root and leaves it alone. What it
    prints by itself goes to standard output, in its own form.

    Args:
        settings: LOG_LEVEL, LOG_FORMAT, LOG_CONTENT, and the values that are never shown.
        environment: names the worker, and holds secrets of its own.
        stream: where the lines go; standard error.

    Returns:
        What writes them.
    """
    lines = JsonLines if settings.log_format == "json" else TextLines
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(
        lines(
            worker_id=environment.get("RUNPOD_POD_ID") or None,
            secrets=_secrets(settings, environment),
            shows_content=settings.log_content,
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(settings.log_level)
    return handler


def _secrets(settings: Settings, environment: Mapping[str, str]) -> set[str]:
    held = [getattr(settings, name) for name in type(settings).model_fields]
    ours = {value.get_secret_value() for value in held if isinstance(value, SecretStr)}
    return ours | {environment.get(name, "") for name in _SECRET_VARIABLES}


class _Handler(logging.StreamHandler[TextIO]):
    """Says nothing of a line that cannot be written: Python would print what the line was made of."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing can be done."""


class _Lines(logging.Formatter):
    """What of a record may be told; never raises.

    A record's `extra` may hold `figures`, fields of the line, and `content`, fields that only LOG_CONTENT shows.

    Args:
        worker_id: names the worker on each line.
        secrets: texts that are never shown.
        shows_content: whether what clients sent is.
    """

    def __init__(self, *, worker_id: str | None = None, secrets: Iterable[str] = (), shows_content: bool = False):
        super().__init__()
        self._worker_id, self._shows_content = worker_id, shows_content
        longest_first = sorted((each for each in secrets if len(each) >= _MIN_SECRET_CHARS), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The line's own fields, but for the time."""
        message = self._message(record)
        fields: dict[str, Any] = {"level": record.levelname, "logger": record.name, "message": message}
        if not _is_ours(record):
            fields["place"] = f"{record.filename}:{record.lineno}"
        fields |= {"job_id": _job_id.get(), "worker_id": self._worker_id, **getattr(record, "figures", {})}
        if self._shows_content:
            fields |= getattr(record, "content", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            fields["exception"] = self._exception(error)
        return {name: self._safe(value) for name, value in fields.items() if value is not None}

    @property
    def _shows_words(self) -> bool:
        return self._shows_content or _is_before_jobs.get()

    def _message(self, record: logging.LogRecord) -> str:
        if self._shows_words or _is_ours(record):
            with contextlib.suppress(Exception):  # arguments that do not fit their template
                return record.getMessage()
        return str(record.msg) if record.args else f"({_WITHHELD})"

    def _exception(self, error: BaseException) -> str:
        if self._shows_words:
            return "".join(traceback.format_exception(error))
        return "".join(_places(error, _MAX_CHAIN))

    def _safe(self, value: object) -> object:
        """A value that JSON holds, without what is never shown."""
        if isinstance(value, float):
            return round(value, 6) if math.isfinite(value) else None
        if isinstance(value, int):
            return value
        text = printable(str(value))
        if len(text) > _MAX_RAW_CHARS:
            text = text[: _MAX_RAW_CHARS // 2] + " … " + text[-_MAX_RAW_CHARS // 2 :]
        if self._secrets is not None:
            text = self._secrets.sub(_HIDDEN, text)
        return _BEHIND_SCHEME.sub(_bare_address, text)


class JsonLines(_Lines):
    """An object per line, ASCII whatever is in it, of at most `MAX_LINE_BYTES`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time.replace("+00:00", "Z"), **self._fields(record)}
        line = ""
        for most in _LIMITS:
            line = json.dumps({name: _cut(name, value, most) for name, value in fields.items()})
            if len(line) <= MAX_LINE_BYTES:
                break
        return line


class TextLines(_Lines):
    """For a terminal: no figures, and a traceback in lines of its own."""

    default_msec_format = "%s,%03d"

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: _cut(name, value, _LIMITS[0]) for name, value in self._fields(record).items()}
        message, about = str(fields["message"]), f"job {fields.get('job_id')}: "
        if "job_id" in fields and not message.startswith(about):
            message = about + message
        rest = [f"{name}: {fields[name]}" for name in ("error", "text") if name in fields]
        head = f"{self.formatTime(record)} {fields['level']:<7} {fields['logger']}: {_on_one_line(message)}"
        return "\n".join([head, *map(_on_one_line, rest), *str(fields.get("exception", "")).splitlines()])


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in ROOMS


def _places(error: BaseException, most: int) -> Iterator[str]:
    """A traceback without the words of its exceptions, the first cause first."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and most > 1:
        yield from _places(cause, most - 1)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    yield f"{type(error).__module__}.{type(error).__qualname__} ({', '.join(filter(None, (code, _WITHHELD)))})\n"


def _bare_address(match: re.Match[str]) -> str:
    """The rest of a URL, without who asks and what for."""
    address, mark, _ = re.split(r"([?#])", match[0][3:] + "?", maxsplit=1)
    host, slash, path = address.partition("/")
    is_cut = len(address) + 3 < len(match[0])
    return f"://{host.rpartition('@')[2]}{slash}{path}{mark + '…' if is_cut else ''}"


def _cut(name: str, value: object, most: int) -> object:
    """A value that is not too long; of an exception the end, where it was raised, is kept."""
    if not isinstance(value, str):
        return value
    if name == "exception":
        most *= _EXCEPTION_SHARE
        return value if len(value) <= most else "…" + value[-most:]
    return value if len(value) <= most else value[:most] + "…"


def _on_one_line(text: str) -> str:
    """What a terminal would obey is shown as Python writes it."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
