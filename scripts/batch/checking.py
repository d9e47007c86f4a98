"""From a file's rows to jobs that a worker takes, or to what is wrong with them, before anything is sent."""

from __future__ import annotations

import collections
import difflib
import fnmatch
import functools
import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel

from engine.errors import SpeechError
from engine.text.markup import refuse_unknown
from engine.text.normalize import clean_text
from jobs.compat import FIELD_ALIASES, IGNORED_FIELDS, OPERATION_ALIASES
from jobs.errors import JobError
from jobs.s3_config import FIELD as S3_CONFIG
from jobs.schema import INPUT_MODELS, AudioInput, LongForm, SpeechInput, parse_job
from scripts.batch.books import parts_of
from scripts.batch.epub import Chapter
from scripts.batch.errors import BatchError
from scripts.batch.recordings import Recordings
from scripts.batch.rows import Problem, RawRow, Source

KEY_COLUMNS = ("key", "id")
MAX_KEY_CHARS = 500
MAX_TTS_CHARS = 5_000
"""A worker's own default (MAX_TEXT_CHARS): what is longer goes as `long_form`."""

_MOST_MS = 1e12
_TIMES_OF_POLICY = ("executionTimeout", "ttl")

_BOOK_FORMAT = "opus"
"""Of long texts, unless the batch says: an hour is some 30 MB, of wav six minutes are too much to be returned."""

_IDEMPOTENCY_KEY = "idempotency_key"
_KEY_DIGITS = 12

_SAYING = frozenset({"text", "segments", "input_audio", "operation"})
"""Of these fields a row has one."""

_KNOWN = {*FIELD_ALIASES, *IGNORED_FIELDS, *(name for model in INPUT_MODELS.values() for name in model.model_fields)}


@dataclass(frozen=True)
class Part:
    """What one job does.

    Args:
        fields: of its input.
        num_chars: of its text.
        language: of it.
        title: of the chapter that begins with it; None where it goes on with one.
        beside: what is to stand beside its input.
    """

    fields: Mapping[str, Any]
    num_chars: int
    language: str
    title: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Of all that is spoken. Where it is told and put is no part of that."""
        return _digest(self.fields)


@dataclass(frozen=True)
class Row:
    """A row of the batch.

    Args:
        key: unique in it.
        source: where it stands.
        position: its number in the input.
        parts: one, or those of a text that is to be joined again.
        name: of its file, where that is not the key.
        book: what a book says of itself; empty for what is none.
        warnings: what a worker would ignore in it.
    """

    key: str
    source: Source
    position: int
    parts: tuple[Part, ...]
    name: str | None = None
    book: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def is_book(self) -> bool:
        return len(self.parts) > 1


@dataclass(frozen=True)
class Reading:
    """How rows are to be read.

    Args:
        columns: field → the column or key that holds it.
        defaults: fields of all rows that do not say otherwise, as text.
        key: the column of the rows' keys; None for `key` or `id`, and without those a hash.
        ignored: patterns of columns that are no fields.
        part_chars: what is longer goes in parts.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    ignored: Sequence[str] = ()
    part_chars: int = 100_000

    def __post_init__(self) -> None:
        for option, names in (("--map", self.columns), ("--set", self.defaults)):
            for name in names:
                if name not in _KNOWN and name != S3_CONFIG:
                    raise BatchError(f"{option} {name}=…: unknown field {name!r}{_hint(name, _KNOWN)}")
        if _IDEMPOTENCY_KEY in self.defaults:
            raise BatchError(f"--set {_IDEMPOTENCY_KEY}=…: each job has to have its own; without one it gets one")


@dataclass
class Checked:
    """What came of reading.

    Args:
        rows: that a worker would take.
        problems: with the others.
        bad_keys: of those of them that have a key ...
        has_nameless: ... and whether there are others.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)
    has_nameless: bool = False


def check_rows(rows: Iterable[RawRow | Problem], reading: Reading, only: Sequence[str] = ()) -> Checked:
    """Make jobs of rows.

    Args:
        rows: as they were read.
        reading: how.
        only: keys, or patterns of keys, of the rows that are wanted; empty for all.
    """
    checked, recordings = Checked(), Recordings()
    keys, idempotency_keys = _Distinct("key"), _Distinct(_IDEMPOTENCY_KEY)
    num_alike: collections.Counter[str] = collections.Counter()
    columns: tuple[str, ...] | None = None
    for position, raw in enumerate(rows):
        if isinstance(raw, Problem):
            checked.problems.append(raw)
            checked.has_nameless = True
            continue
        if raw.columns is not columns:
            columns = raw.columns
            columns_problem = _problem_of_columns(raw, reading)
            if columns_problem is not None:  # that of every row
                checked.problems.append(columns_problem)
                return checked
        key = None
        try:
            key = named = _key_of(raw, reading)
            if key is None:
                key = _key_of_nameless(_given_of(raw, reading), num_alike)
            if only and not any(key == each or fnmatch.fnmatchcase(key, each) for each in only):
                continue
            keys.take(key, raw.source)
            name = None if named else f"{raw.source.line or 0:05d}-{key}"
            row = _row(key, name, position, raw, reading, recordings)
            idempotency_keys.take(row.parts[0].fields.get(_IDEMPOTENCY_KEY), raw.source)
            checked.rows.append(row)
        except _Wrong as wrong:
            checked.problems.append(Problem(raw.source, str(wrong)))
            checked.bad_keys |= {key} if key is not None else set()
            checked.has_nameless |= key is None
    return checked


class _Wrong(Exception):  # noqa: N818 - becomes a Problem
    """What is wrong with a row."""


class _Distinct:
    """What no two rows may have in common.

    Args:
        what: it is called.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._sources: dict[object, Source] = {}

    def take(self, value: object, source: Source) -> None:
        before = self._sources.setdefault(value, source)
        if before is not source and value is not None:
            raise _Wrong(f"the {self._what} {value!r} is that of {before} too")


# ------------------------------------------------------------------------------------------- key


def _key_of(raw: RawRow, reading: Reading) -> str | None:
    if reading.key is not None and reading.key not in raw.fields:
        raise _Wrong(f"the key column {reading.key!r} is empty or missing{_hint(reading.key, raw.fields)}")
    for column in (reading.key,) if reading.key is not None else KEY_COLUMNS:
        if column in raw.fields and column not in reading.columns.values():
            return _checked_key(raw.fields[column], column)
    if raw.key is not None:
        return _checked_key(raw.key, "its name")
    return None


def _key_of_nameless(given: Mapping[str, Any], num_alike: collections.Counter[str]) -> str:
    """By what the row says, not where: rows that come before it later do not make it another."""
    key = _digest(given)[:_KEY_DIGITS]
    num_alike[key] += 1
    return key if num_alike[key] == 1 else f"{key}-{num_alike[key]}"


def _checked_key(value: object, column: str) -> str:
    key = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise _Wrong(f"{column}: expected a key of 1 to {MAX_KEY_CHARS} printable characters")
    return key


# ------------------------------------------------------------------------------------------- fields


def _row(
    key: str,
    name: str | None,
    position: int,
    raw: RawRow,
    reading: Reading,
    recordings: Recordings,
) -> Row:
    _check_beside(raw.beside)
    try:
        fields = recordings.put_in(_fields_of(raw, reading))
    except JobError as error:
        raise _Wrong(error.message) from error
    operation = fields.get("operation")
    text = fields.get("text")
    is_long = isinstance(text, str) and len(text) > MAX_TTS_CHARS
    if operation is None and (is_long or raw.chapters or "segments" in fields):
        operation = fields["operation"] = "long_form"
    language = fields.get("language", "en")
    language = language if isinstance(language, str) else "en"
    chapters = raw.chapters or ((Chapter(None, text),) if is_long and isinstance(text, str) else ())
    if operation == "long_form" and chapters and "segments" not in fields:
        fields.setdefault("output_format", _BOOK_FORMAT)
        parts, warnings = _parts_of_book(raw, fields, chapters, language, reading.part_chars)
    else:
        part, warnings = _part(fields, None, raw.beside)
        parts = (part,)
    return Row(key, raw.source, position, parts, name, raw.book, warnings)


def _parts_of_book(
    raw: RawRow, fields: Mapping[str, Any], chapters: Sequence[Chapter], language: str, max_chars: int
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Its parts, and warnings."""
    texts = list(parts_of(chapters, language, max_chars))
    given = fields.get(_IDEMPOTENCY_KEY)
    parts: list[Part] = []
    warnings: list[str] = []
    for number, each in enumerate(texts, 1):
        own = {_IDEMPOTENCY_KEY: f"{given}-{number}"} if isinstance(given, str) and len(texts) > 1 else {}
        part, more = _part({**fields, "text": each.text, **own}, each.title, raw.beside)
        parts.append(part)
        warnings += more
    if not parts:
        raise _Wrong("text: there is nothing in it that could be said")
    return tuple(parts), tuple(dict.fromkeys(warnings))


def _check_beside(beside: Mapping[str, Any]) -> None:
    """Refuse what the platform would not take beside a job's input."""
    policy = beside.get("policy", {})
    if not (isinstance(policy, Mapping) and all(_is_time(policy.get(name, 1)) for name in _TIMES_OF_POLICY)):
        raise _Wrong("policy: expected an object, with numbers of milliseconds")
    try:
        json.dumps(beside, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # and half a character
        raise _Wrong(f"what stands beside input is no JSON: {error}") from error
    if "webhook" in beside and not is_webhook(beside["webhook"]):
        raise _Wrong("webhook: expected an address with https:// or http://")


def _part(fields: Mapping[str, Any], title: str | None, beside: Mapping[str, Any]) -> tuple[Part, tuple[str, ...]]:
    """A job, if a worker would take it."""
    try:
        parsed = parse_job({"input": fields, **beside})
        request = parsed.request
        if not isinstance(request, AudioInput):
            raise _Wrong(f"operation {request.operation} gives no audio")
        texts = _texts_of(request)
        for text in texts:
            if not any(map(str.isalnum, clean_text(text))):
                raise _Wrong("text: there is nothing in it that could be said")
            refuse_unknown(text)
    except (JobError, SpeechError) as error:
        raise _Wrong(error.message) from error
    num_chars = sum(map(len, texts))
    return Part(fields, num_chars, getattr(request, "language", "en"), title, beside), parsed.warnings


def _is_time(value: object) -> bool:
    """Of a policy, milliseconds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST_MS


def is_webhook(value: object) -> bool:
    """Whether the platform takes it as an address to call."""
    try:
        parts = urlsplit(value) if isinstance(value, str) else None
    except ValueError:
        return False
    is_address = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
    return is_address and not any(map(str.isspace, str(value)))


def _texts_of(request: AudioInput) -> list[str]:
    if not isinstance(request, SpeechInput):
        return []
    if isinstance(request, LongForm) and request.segments is not None:
        return [segment.text for segment in request.segments]
    return [] if request.text is None else [request.text]


def _problem_of_columns(raw: RawRow, reading: Reading) -> Problem | None:
    """What is wrong with the columns of a file that has some."""
    if raw.columns is None:
        return None
    columns, mapped = raw.columns, reading.columns
    wanted = [*mapped.items(), *([("key", reading.key)] if reading.key is not None else [])]
    wrongs = [
        f"{name}: there is no column {each!r}{_hint(each, columns)}" for name, each in wanted if each not in columns
    ]
    taken = {*mapped.values(), reading.key, *(() if reading.key else KEY_COLUMNS), *_KNOWN}
    strange = [name for name in columns if name not in taken and not _is_ignored(name, reading)]
    wrongs += [
        f"{name} is given by --map and by a column of its own"
        for name in mapped
        if name in {*columns} - {*mapped.values()} and not _is_ignored(name, reading)
    ]
    if not {*columns, *mapped, *reading.defaults} & _SAYING:
        wrongs.append("no column holds the text: say which with --map text=COLUMN")
    if strange:
        options = " ".join(f"--ignore {name!r}" for name in strange)
        names = ", ".join(f"{name!r}{_hint(name, _KNOWN)}" for name in strange)
        wrongs.append(f"no field is called {names}; leave out what is none with {options}")
    return Problem(Source(raw.source.file, 1), "; ".join(wrongs)) if wrongs else None


def _is_ignored(name: str, reading: Reading) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in reading.ignored)


def _given_of(raw: RawRow, reading: Reading) -> dict[str, Any]:
    """What a row says itself, by field."""
    columns, has_columns = reading.columns, raw.columns is not None
    for name, column in columns.items():
        if not has_columns and column not in raw.fields and name not in reading.defaults:
            raise _Wrong(f"{name}: there is no {column!r} in it{_hint(column, raw.fields)}")
    taken = {*columns.values(), reading.key, *(() if reading.key else KEY_COLUMNS)}
    given = {name: raw.fields[column] for name, column in columns.items() if column in raw.fields}
    for name, value in raw.fields.items():
        if name in taken or _is_ignored(name, reading):
            continue
        if name in given:
            raise _Wrong(f"{name} is given by --map and by a column of its own; leave that out with --ignore {name!r}")
        given[name] = value
    return {name: value for name, value in given.items() if value is not None}


def _fields_of(raw: RawRow, reading: Reading) -> dict[str, Any]:
    """The same with what is said of all rows, of the types that the schema wants."""
    values = _given_of(raw, reading)
    has_columns = raw.columns is not None
    operation = values.get("operation", reading.defaults.get("operation"))
    fields = {name: typed(name, text, operation) for name, text in reading.defaults.items() if name not in values}
    fields |= {name: typed(name, v, operation) if has_columns else v for name, v in values.items()}
    return {**raw.fallback, **fields}


def _hint(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), sorted(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


# ------------------------------------------------------------------------------------------- types


def typed(name: str, text: Any, operation: object = None) -> Any:
    """What a text stands for where the schema wants something else: a number, true or false, JSON.

    What stands for nothing stays a text, which the schema then refuses with what it expected.
    """
    if not isinstance(text, str):
        return text
    kinds = _kinds_of(name, operation)
    if not kinds or str in kinds:
        return text
    if bool in kinds and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _kinds_of(name: str, operation: object) -> set[type]:
    named = OPERATION_ALIASES.get(operation, operation) if isinstance(operation, str) else ""
    models: list[type[BaseModel]] = [INPUT_MODELS[named]] if named in INPUT_MODELS else list(INPUT_MODELS.values())
    ours = FIELD_ALIASES.get(name, name)
    fields = [model.model_fields[ours] for model in models if ours in model.model_fields]
    return set().union(*(_kinds(each.annotation) for each in fields[:1]))


def _kinds(annotation: Any) -> set[type]:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in inside}
    if origin in (Union, types.UnionType):
        return set().union(*map(_kinds, inside))
    if origin is Annotated:
        return _kinds(inside[0])
    return {origin or annotation}


def _digest(fields: Mapping[str, Any]) -> str:
    body = json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(body.encode(), digest_size=20).hexdigest()


# ------------------------------------------------------------------------------------------- voices


def voices_named(row: Row) -> Iterator[tuple[str, str]]:
    """The voices of the library that a row wants: field and name."""
    for part in row.parts[:1]:
        fields = part.fields
        if fields.get("operation") in ("voice_clone", "voice_cloning"):
            return
        for index, place in enumerate([fields, *(fields.get("segments") or ())]):
            for name in ("voice_id", "voice_name"):
                if isinstance(place.get(name), str):
                    yield (f"segments[{index - 1}].{name}" if index else name), place[name]
