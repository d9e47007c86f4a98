"""Where a text may be cut: paragraphs, sentences, clauses, words and, last of all, characters.

Every function gives spans of offsets into the one text, never copies, so that a plan can only cover
the text: what is not a span is white space at a cut. All run in time linear in the text's length.
"""

from __future__ import annotations

import enum
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import regex  # type: ignore[import-untyped, unused-ignore]
import sentencex


class Break(enum.IntEnum):
    """How good a place to stop the end of a piece is."""

    CHARACTER = 0
    WORD = 1
    CLAUSE = 2
    SENTENCE = 3
    PARAGRAPH = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch `text[start:end]` without white space around it, and the break behind it."""

    start: int
    end: int
    behind: Break

    @property
    def length(self) -> int:
        return self.end - self.start


Splitter = Callable[[str, int, int, int], Iterator[int]]
"""(text, start, end, max_chars) -> the offsets between start and end where it may be cut."""

_WINDOW = 4096
"""sentencex's time grows with the square of some texts' length (a quotation that is opened again and
again): it is given this many characters at a time."""

_PARAGRAPH = re.compile(r"\n\s*\n|\u2029")
_CLAUSE = re.compile(
    # A mark before a space: not inside 3,5 or 10:30. Each run is tried once, from its start.
    r"""(?<![,;:.!?…])[,;:.!?…]++["'”’»)\]]*+(?=\s)"""
    # Scripts that put no space behind their marks.
    r"""|[、，；：。！？｡､।॥،؛؟՝]+[”’」』）】》]*"""
    r"""|[—…]+|(?<=\s)[-–](?=\s)|\n"""
)
_SHORT_END = re.compile(r"(?<!\w)(?:(?P<title>Dr|Mrs?|Ms|Prof|Mme|Mlle|Sra?)|[^\W\d_]|\d{1,3})\.\s*$")
_WORD = re.compile(r"\[[A-Za-z ]{2,32}\][^\s\[]*\s*|\S+?(?=\[[A-Za-z ]{2,32}\])|\S+\s*")
_GRAPHEME = regex.compile(r"\X")
_JOINERS = "\u200c\u200d"


def split_text(text: str, start: int, end: int, language: str, max_chars: int) -> Iterator[Piece]:
    """Cut `text[start:end]` into whole sentences, and those that are longer than max_chars into the
    largest parts that are not: clauses, else words, else runs of grapheme clusters.

    A cluster longer than max_chars (hundreds of combining marks on one letter) is the one thing that
    is cut inside.
    """
    for first, last, behind in _sentences(text, start, end, language):
        yield from _fit(text, first, last, behind, max_chars, _SPLITTERS)


def halve(text: str, piece: Piece, min_chars: int, max_chars: int) -> tuple[Piece, ...]:
    """Cut a piece in two at a clause, else between words, and there most evenly; nothing where no cut gives
    two of min_chars to max_chars."""
    for between, splitter in _SPLITTERS[:2]:
        cuts = splitter(text, piece.start, piece.end, max_chars)
        pairs = [
            (Piece(*_trim(text, piece.start, cut), between), Piece(*_trim(text, cut, piece.end), piece.behind))
            for cut in cuts
        ]
        fit = [pair for pair in pairs if all(min_chars <= part.length <= max_chars for part in pair)]
        if fit:
            return min(fit, key=lambda pair: abs(pair[0].length - pair[1].length))
    return ()


def _sentences(text: str, start: int, end: int, language: str) -> Iterator[tuple[int, int, Break]]:
    for first, last in _paragraphs(text, start, end):
        for cut in _sentence_cuts(text, first, last, language):
            if _is_safe_cut(text, cut) and not _is_abbreviation(text, first, cut):
                yield first, cut, Break.SENTENCE
                first = cut
        yield first, last, Break.PARAGRAPH


def _is_abbreviation(text: str, start: int, cut: int) -> bool:
    """Whether what sentencex takes for the sentence `text[start:cut]` ends in a shortened word or is the
    number of an item: a title, "2." or "M." alone, or a single letter's stop before a small one ("i. e. so")."""
    near = max(start, cut - 8)
    match = _SHORT_END.search(text, near, cut)
    if match is None:
        return False
    is_alone = near == start and not text[start : match.start()].strip()
    is_before_small = match[0][0].isalpha() and text[cut : cut + 1].islower()
    return match["title"] is not None or is_alone or is_before_small


def _paragraphs(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _PARAGRAPH.finditer(text, start, end):
        yield start, match.start()
        start = match.end()
    yield start, end


def _sentence_cuts(text: str, start: int, end: int, language: str) -> Iterator[int]:
    """Offsets between sentences, from sentencex, which treats a language that it has no rules for
    as its nearest relative or as English. A window's last sentence is looked at again with what
    follows it."""
    while end - start > _WINDOW:
        ends = _window_cuts(text[start : start + _WINDOW], language)
        yield from (start + cut for cut in ends)
        start += ends[-1] if ends and ends[-1] > _WINDOW // 2 else _WINDOW
    yield from (start + cut for cut in _window_cuts(text[start:end], language))


def _window_cuts(window: str, language: str) -> list[int]:
    boundaries = sentencex.get_sentence_boundaries(language, window)
    ends = {int(boundary["end_index"]) for boundary in boundaries}
    return sorted(cut for cut in ends if 0 < cut < len(window))


def _is_safe_cut(text: str, cut: int) -> bool:
    """Whether the character behind the cut does not belong to the one before it."""
    if cut >= len(text):
        return True
    return (
        not unicodedata.category(text[cut]).startswith("M") and text[cut] not in _JOINERS and text[cut - 1] != "\u200d"
    )


def _fit(
    text: str, start: int, end: int, behind: Break, max_chars: int, splitters: tuple[tuple[Break, Splitter], ...]
) -> Iterator[Piece]:
    start, end = _trim(text, start, end)
    if start == end:
        return
    if end - start <= max_chars:
        yield Piece(start, end, behind)
        return
    between, splitter = splitters[0]
    for first, last in itertools.pairwise([start, *splitter(text, start, end, max_chars), end]):
        yield from _fit(text, first, last, behind if last == end else between, max_chars, splitters[1:])


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _clause_cuts(text: str, start: int, end: int, _max_chars: int) -> Iterator[int]:
    for match in _CLAUSE.finditer(text, start, end):
        cut = match.end()
        is_wrapped = match[0] == "\n" and text[cut : cut + 1].islower()  # a line of prose that was too long
        if cut < end and _is_safe_cut(text, cut) and not is_wrapped:
            yield cut


def _word_cuts(text: str, start: int, end: int, _max_chars: int) -> Iterator[int]:
    cuts = (match.end() for match in _WORD.finditer(text, start, end))
    return (cut for cut in cuts if cut < end and _is_safe_cut(text, cut))


def _character_cuts(text: str, start: int, end: int, max_chars: int) -> Iterator[int]:
    """Cuts at grapheme clusters, the parts about equally long."""
    num_parts = -(-(end - start) // max_chars)
    target = -(-(end - start) // num_parts)
    part_start = previous = start
    for match in _GRAPHEME.finditer(text, start, end):
        if match.end() - part_start > target and previous > part_start:
            yield previous
            part_start = previous
        while match.end() - part_start > max_chars:
            part_start += max_chars
            yield part_start
        previous = match.end()


_SPLITTERS: tuple[tuple[Break, Splitter], ...] = (
    (Break.CLAUSE, _clause_cuts),
    (Break.WORD, _word_cuts),
    (Break.CHARACTER, _character_cuts),
)
