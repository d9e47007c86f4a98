"""A file's rows as they stand there: CSV, JSON lines, a folder of texts, or a book."""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from scripts.batch.epub import Chapter, EpubError, read_epub
from scripts.batch.errors import BatchError

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".epub", *TEXT_SUFFIXES)

MAX_TEXT_BYTES = 64_000_000
"""Of one text; what is larger is no text that anybody wants spoken."""

_OF_NAMES = ("idna", "punycode")  # encodings of names in the net
_MAX_CELL_CHARS = 20_000_000
_DELIMITERS = ",;\t|"
_BESIDE_INPUT = ("webhook", "policy", "s3Config")
_FROM_PLATFORM = frozenset({"input", "id", "key", *_BESIDE_INPUT})


@dataclass(frozen=True)
class Source:
    """Where a row stands.

    Args:
        file: as it was named.
        line: its first; None for a file that is one row.
    """

    file: Path
    line: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row, or with a whole file."""

    source: Source
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


@dataclass(frozen=True)
class RawRow:
    """A row before it is checked.

    Args:
        source: where it stands.
        fields: by column or name.
        columns: of the file, also those that are empty here; None where each row has its own names. Values of columns
            are text that stands for what the schema wants.
        fallback: fields where nothing else says.
        beside: what is to stand beside the job's input.
        key: its name, where that is no field.
        chapters: of a text with more than one.
        book: what a book says of itself: title, author.
    """

    source: Source
    fields: Mapping[str, Any]
    columns: tuple[str, ...] | None = None
    fallback: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    chapters: tuple[Chapter, ...] = ()
    book: Mapping[str, str] = field(default_factory=dict)


def read_rows(path: Path, encoding: str) -> Iterator[RawRow | Problem]:
    """All rows of a file or folder, in order, each as soon as it is read.

    Raises:
        BatchError: when there is nothing that could be rows.
    """
    _check_encoding(encoding)
    if path.is_dir():
        return _folder(path, encoding)
    if not path.is_file():
        raise BatchError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".epub":
        return _book(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, encoding)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, encoding)
    if suffix in TEXT_SUFFIXES:
        return _text(path, path.stem, encoding)
    raise BatchError(f"{path}: expected a folder or one of {', '.join(SUFFIXES)}")


def _check_encoding(encoding: str) -> None:
    try:
        "a".encode(encoding)  # refused of those that are not of text
        is_of_text = codecs.lookup(encoding).name not in _OF_NAMES
    except (LookupError, UnicodeError):
        is_of_text = False
    if not is_of_text:
        raise BatchError(f"--encoding {encoding}: no such encoding of texts")


# ------------------------------------------------------------------------------------------- lines


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str | Problem]]:
    """Each line with its end, from number 1 on."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                yield number, data.decode(encoding if number == 1 else encoding.removesuffix("-sig"))
            except UnicodeDecodeError as error:
                found = f"byte 0x{data[error.start]:02x} at column {error.start + 1} is not {encoding}"
                hint = "; is it UTF-16? say --encoding utf-16, or save it as UTF-8" if b"\0" in data else ""
                yield number, Problem(Source(path, number), f"{found}{hint or '; say --encoding, such as cp1252'}")


def _all_lines(path: Path, encoding: str) -> Iterator[tuple[int, str | Problem]]:
    """As `_lines`; of encodings whose line ends are not one byte, the file as a whole."""
    if "\n".encode(encoding.removesuffix("-sig")) == b"\n":
        yield from _lines(path, encoding)
        return
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        yield 1, Problem(Source(path, 1), f"byte {error.start} is not {encoding}")
        return
    yield from enumerate(io.StringIO(text, newline=""), 1)


def _json_lines(path: Path, encoding: str) -> Iterator[RawRow | Problem]:
    for number, line in _all_lines(path, encoding):
        if isinstance(line, Problem):
            yield line
        elif line.strip():
            yield _json_row(Source(path, number), line)


def _json_row(source: Source, line: str) -> RawRow | Problem:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Problem(source, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Problem(source, "expected a JSON object")
    inside = row.get("input")
    if isinstance(inside, dict):  # a job as the platform takes it
        unknown = sorted(row.keys() - _FROM_PLATFORM)
        if unknown:
            return Problem(source, f"{unknown[0]}: expected nothing but key or id beside input")
        beside = {name: row[name] for name in _BESIDE_INPUT if row.get(name) is not None}
        return RawRow(source, {**{name: row[name] for name in ("key", "id") if name in row}, **inside}, beside=beside)
    return RawRow(source, row)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _csv(path: Path, encoding: str) -> Iterator[RawRow | Problem]:
    bad: list[Problem] = []
    lines = _good_lines(path, encoding, bad)
    first = next(lines, "")
    if not first.strip():
        yield from bad or [Problem(Source(path, 1), "there is no line with the names of the columns")]
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first.count)
    with _large_cells():
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader)]
        except csv.Error as error:
            yield Problem(Source(path, 1), f"not CSV: {error}")
            return
        twice = [name for name, count in collections.Counter(names).items() if name and count > 1]
        if twice:
            yield Problem(Source(path, 1), f"there are two columns {twice[0]!r}")
        elif bad:
            yield from bad
        else:
            yield from _csv_rows(path, reader, names, bad)


def _good_lines(path: Path, encoding: str, bad: list[Problem]) -> Iterator[str]:
    for _, line in _all_lines(path, encoding):
        if isinstance(line, Problem):
            bad.append(line)
            yield "\n"  # so that lines keep their numbers
        else:
            yield line


def _csv_rows(path: Path, reader: Any, names: list[str], bad: list[Problem]) -> Iterator[RawRow | Problem]:
    """The rows behind the first line.

    Args:
        bad: lines that cannot be read, put there while the reader reads a row: one of that row's.
    """
    columns = tuple(filter(None, names))
    while True:
        source = Source(path, reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            yield from bad
            return
        except csv.Error as error:
            yield from [Problem(source, f"not CSV: {error}"), *bad]
            bad.clear()
            continue
        if bad:
            yield from bad
            bad.clear()
        elif any(cell.strip() for cell, name in zip(cells, names, strict=False) if not name):
            yield Problem(source, "a cell is in a column without a name; is a text with a comma not in quotes?")
        elif len(cells) > len(names):
            more = f"{len(cells)} cells, and {len(names)} columns have names; is a text with a comma not in quotes?"
            yield Problem(source, more)
        elif any(cell.strip() for cell in cells):
            filled = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell.strip()}
            yield RawRow(source, filled, columns)


@contextlib.contextmanager
def _large_cells() -> Iterator[None]:
    """The csv module's limit is for all of the process, and below what a cell with a chapter holds."""
    before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ------------------------------------------------------------------------------------------- texts


def _folder(path: Path, encoding: str) -> Iterator[RawRow | Problem]:
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in TEXT_SUFFIXES and each.is_file())
    if not files:
        raise BatchError(f"{path}: holds no {' or '.join(TEXT_SUFFIXES)} files")
    names = [each.relative_to(path).with_suffix("").as_posix() for each in files]
    counts = collections.Counter(names)
    for file, name in zip(files, names, strict=True):
        yield from _text(file, name if counts[name] == 1 else f"{name}{file.suffix}", encoding)


def _text(path: Path, key: str, encoding: str) -> Iterator[RawRow | Problem]:
    if path.stat().st_size > MAX_TEXT_BYTES:
        yield Problem(Source(path), f"is larger than {MAX_TEXT_BYTES / 1e6:g} MB")
        return
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        yield Problem(Source(path, line), f"byte {error.start} is not {encoding}; say --encoding, such as cp1252")
        return
    if path.suffix.lower() == ".md":
        chapters = markdown_chapters(text)
        text = "\n\n".join(filter(None, itertools.chain(*((each.title, each.text) for each in chapters))))
    else:
        chapters = ()
    yield RawRow(Source(path), {"text": text}, key=key, chapters=chapters if len(chapters) > 1 else ())


def markdown_chapters(text: str) -> tuple[Chapter, ...]:
    """What is to be said of Markdown: its words without marks, a chapter for each heading of the two highest levels.

    Code blocks, HTML and images are left out.
    """
    chapters: list[tuple[str | None, list[str]]] = [(None, [])]
    tag = ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "heading_open":
            tag = token.tag
        elif token.type == "heading_close":
            tag = ""
        elif token.type == "inline":
            said = _said(token)
            if tag in ("h1", "h2"):
                chapters.append((said, []))
            elif said:
                chapters[-1][1].append(said)
    return tuple(Chapter(title, "\n\n".join(blocks)) for title, blocks in chapters if title or blocks)


def _said(token: Token) -> str:
    parts = []
    for child in token.children or ():
        if child.type in ("text", "code_inline"):
            parts.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    return "".join(parts).strip()


def _book(path: Path) -> Iterator[RawRow | Problem]:
    try:
        book = read_epub(path)
    except EpubError as error:
        yield Problem(Source(path), str(error))
        return
    about = {name: value for name, value in (("title", book.title), ("author", book.author)) if value}
    language = {"language": book.language} if book.language else {}
    yield RawRow(Source(path), {}, fallback=language, key=path.stem, chapters=book.chapters, book=about)
