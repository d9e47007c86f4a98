"""A long text in parts that one job each can speak: cut at chapters, and within those between sentences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.text.splitting import Piece, split_text
from scripts.batch.epub import Chapter


@dataclass(frozen=True)
class TextPart:
    """What one job is to say.

    Args:
        text: all of it.
        title: of the chapter that begins with it; None where it goes on with one.
    """

    text: str
    title: str | None


def parts_of(chapters: Sequence[Chapter], language: str, max_chars: int) -> Iterator[TextPart]:
    """All parts of a text, of at most max_chars characters, a chapter's of about the same length.

    A chapter's title is said before it.
    """
    for number, chapter in enumerate(chapters, 1):
        text = "\n\n".join(filter(None, (_as_sentence(chapter.title), chapter.text)))
        if not any(map(str.isalnum, text)):
            continue
        for index, part in enumerate(split_evenly(text, language, max_chars)):
            yield TextPart(part, None if index else chapter.title or f"Part {number}")


def _as_sentence(title: str | None) -> str:
    """So that a voice comes to a stop behind it."""
    return f"{title}." if title and title[-1].isalnum() else title or ""


def split_evenly(text: str, language: str, max_chars: int) -> Iterator[str]:
    """Cut a text between sentences (a sentence that is too long inside) into as few and as equal parts as go."""
    if len(text) <= max_chars:
        yield text
        return
    pieces = list(split_text(text, 0, len(text), language, max_chars))
    num_parts = math.ceil((pieces[-1].end - pieces[0].start) / max_chars)
    bounds = _bounds(pieces, num_parts)
    while len(bounds) < len(pieces) and any(end - start > max_chars for start, end in bounds):
        num_parts += 1 + num_parts // 8
        bounds = _bounds(pieces, num_parts)
    yield from (text[start:end] for start, end in bounds)


def _bounds(pieces: Sequence[Piece], num_parts: int) -> list[tuple[int, int]]:
    """Of about so many parts start and end: each ends with the piece that ends nearest to its share of the text."""
    begin = pieces[0].start
    size = (pieces[-1].end - begin) / num_parts
    bounds: list[tuple[int, int]] = []
    start = begin
    for piece, following in itertools.zip_longest(pieces, pieces[1:]):
        target = begin + size * (len(bounds) + 1)
        if following is None or following.end - target > target - piece.end:
            bounds.append((start, piece.end))
            start = piece.end if following is None else following.start
    return bounds
