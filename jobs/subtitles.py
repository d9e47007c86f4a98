"""Subtitles of spoken chunks, as SubRip (.srt) or WebVTT (.vtt).

A chunk is up to twenty seconds of text with two times; a reader needs a line or two at a time. So a
chunk is cut into cues where a reader would pause, and its time is shared out among them by how long each
takes to say. A cue never leaves its chunk: what is shown is what is heard.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import regex  # type: ignore[import-untyped, unused-ignore]

from engine.guard import CHARS_PER_SECOND, DEFAULT_CHARS_PER_SECOND
from engine.text import base_language
from engine.text.markup import TAG
from engine.text.normalize import clean_text
from engine.text.scripts import SPACELESS, SYLLABLE
from engine.text.splitting import Break, split_text
from engine.types import Chunk

MAX_LINE_COLUMNS = 42
"""A line's width where most characters take one column and full-width ones take two."""
MAX_WIDE_LINE_COLUMNS = 32
"""Of Chinese, Japanese and Korean: 16 full-width characters."""
MAX_CUE_MS = 7_000
MIN_CUE_MS = 800
MAX_COLUMNS_PER_SECOND = 20
"""Reading speed that cues keep to where the voice leaves time for it."""

_WIDE_LANGUAGES = ("zh", "ja", "ko")
_ORPHAN_COLUMNS = 10  # a line of less looks lost above or below a full one
_DIGIT_LETTERS = 4  # as in engine.guard: "7" is "seven"
_PAUSE_LETTERS = {Break.CLAUSE: 3, Break.SENTENCE: 6}  # a voice's pause, in letters that it could have said

_DANGLING_COLUMNS = 3  # words as short as "the" belong to what follows
_DANGLING_COST = 8  # columns: so far from the middle may a cut be to keep them together

_CUE_COST = 1.0
_BREAK_COST = {Break.CHARACTER: 6.0, Break.WORD: 4.0, Break.CLAUSE: 1.5, Break.SENTENCE: 0.0, Break.PARAGRAPH: 0.0}
_SPLIT_WORD_COST = 1.2
_SHORT_COST = 3.0
"""What a cut into cues costs: each cue, the break behind it, lines that part a word, and being too short to be
read. A sentence that is cut at a clause costs more than one more cue, and one cut between words more than that."""

_TAGS = re.compile(rf"(?:\s{{0,8}}(?:{TAG.pattern}))++(?P<before_mark>(?=\s{{0,8}}[,.;:!?…]))?", re.IGNORECASE)
_OPENING = r"[\p{Ps}\p{Pi}]"
_ATOM = regex.compile(
    # A syllable of a script without spaces, and the marks that no line may begin or end without;
    # else whatever comes before the next such syllable.
    rf"{_OPENING}*+{SYLLABLE}[\p{{P}}--{_OPENING}]*+|(?:(?!{_OPENING}{{0,4}}{SPACELESS})\S)++",
    regex.VERSION1,
)
_CLAUSE_END = re.compile(r"""(?:[,;:!?…،؛؟、，；：！？—–]|^-)["'”’»)\]」』）】》]*$""")
_BOTH_SPACELESS = regex.compile(rf"(?:{SPACELESS}|[\p{{M}}\p{{Lm}}]){{2}}", regex.VERSION1)
_AFTER_HIRAGANA = regex.compile(r"\p{Hiragana}\P{Hiragana}")


@dataclass(frozen=True, slots=True)
class _Cue:
    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def write_subtitles(chunks: Sequence[Chunk], format: Literal["srt", "vtt"], language: str = "en") -> str:
    """The chunks' texts as subtitles.

    A cue has at most two lines of at most 42 columns (32 for Chinese, Japanese and Korean, whose characters
    take two); only a word longer than that has a longer line. It lasts at most 7 s, and at least 0.8 s and a
    twentieth of a second per column where its chunk is long enough. Tags are not shown, and a chunk without a
    letter, digit or symbol gives no cue.

    Args:
        chunks: in the order of their times.
        format: SubRip or WebVTT.
        language: as asked for; decides the width of lines, and where sentences end.
    """
    assert format in ("srt", "vtt"), format
    cues: list[_Cue] = []
    for chunk in chunks:
        cues += _cues_of(chunk, base_language(language), cues[-1].end_ms if cues else 0)
    return _srt(cues) if format == "srt" else _vtt(cues)


def _srt(cues: Sequence[_Cue]) -> str:
    """SubRip has no escapes: what would be read as a time is written as an arrow."""
    blocks = (
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n"
        + "".join(line.replace("-->", "→") + "\n" for line in cue.lines)
        for number, cue in enumerate(cues, 1)
    )
    return "".join(f"{block}\n" for block in blocks)


def _vtt(cues: Sequence[_Cue]) -> str:
    """WebVTT (W3C, section 4.2.2): `&`, `<` and `>` are escaped, so no text holds a tag or `-->`."""
    blocks = (
        f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n"
        + "".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") + "\n" for line in cue.lines)
        for cue in cues
    )
    return "WEBVTT\n\n" + "".join(f"{block}\n" for block in blocks)


def _clock(time_ms: int, point: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"


def _cues_of(chunk: Chunk, language: str, not_before_ms: int) -> Iterator[_Cue]:
    text = _shown(chunk.text)
    if not any(unicodedata.category(character)[0] in "LNS" for character in text):
        return
    start_ms = max(not_before_ms, math.ceil(chunk.start_s * 1_000 - 1e-3))  # up, and the end down: within the chunk
    end_ms = max(start_ms + 1, math.floor(chunk.end_s * 1_000 + 1e-3))
    wording = _Wording(text, language, end_ms - start_ms)
    ranges = _ranges(wording)
    times = _times(wording, ranges, start_ms, end_ms)
    for (first, last), (cue_start_ms, next_ms) in zip(ranges, itertools.pairwise(times), strict=True):
        yield _Cue(cue_start_ms, min(next_ms, cue_start_ms + MAX_CUE_MS), wording.lines(first, last))


def _shown(text: str) -> str:
    """A chunk's text without tags and without what cannot be seen, white space made single spaces."""
    seen = _TAGS.sub(lambda tags: " " if tags["before_mark"] is None else "", clean_text(text))
    return " ".join(seen.split())


class _Wording:
    """What a chunk shows, as atoms that no line breaks: words, or syllables of a script without spaces.

    Ranges of atoms are `first` to before `last`.

    Args:
        text: without tags, single spaces between words.
        language: its base code.
        duration_ms: of the chunk.
    """

    def __init__(self, text: str, language: str, duration_ms: int) -> None:
        is_wide = language in _WIDE_LANGUAGES
        self._max_columns = MAX_WIDE_LINE_COLUMNS if is_wide else MAX_LINE_COLUMNS
        self._duration_ms = duration_ms
        spans = [match.span() for match in _ATOM.finditer(text)]
        self._texts = [text[start:end] for start, end in spans]
        self._is_apart = [start > 0 and text[start - 1] == " " for start, _ in spans]
        self.behind = _breaks(text, spans, language)
        self._has_splits = Break.CHARACTER in self.behind
        wide_letters = DEFAULT_CHARS_PER_SECOND / CHARS_PER_SECOND.get(language, CHARS_PER_SECOND["zh"])
        columns = map(_num_columns, self._texts)
        self._columns = [0, *itertools.accumulate(map(sum, zip(columns, self._is_apart, strict=True)))]
        letters = (_num_letters(atom, wide_letters) for atom in self._texts)
        pauses = (_PAUSE_LETTERS.get(between, 0) for between in self.behind)
        self._letters = [0.0, *itertools.accumulate(map(sum, zip(letters, pauses, self._is_apart, strict=True)))]

    def num_columns(self, first: int, last: int) -> int:
        return self._columns[last] - self._columns[first] - self._is_apart[first]

    def duration_ms(self, first: int, last: int) -> float:
        """How long a range takes to say: its share of the chunk's time."""
        return self._duration_ms * (self._letters[last] - self._letters[first]) / self._letters[-1]

    def is_cue(self, first: int, last: int) -> bool:
        """Whether a range fits in two lines and is said in time, or cannot be cut."""
        if last - first == 1:
            return True
        full = bisect.bisect_right(self._columns, self._max_columns + self._columns[first] + self._is_apart[first]) - 1
        middle = min(max(full, first + 1), last)  # as much as goes in the first line
        return (middle == last or self._is_line(middle, last)) and self.duration_ms(first, last) <= MAX_CUE_MS

    def lines(self, first: int, last: int) -> tuple[str, ...]:
        """A cue's lines: one if it fits, else two, cut behind a mark if it can be, and about equally long."""
        if self._is_line(first, last):
            return (self._text(first, last),)
        cut = self._line_end(first, last)
        return self._text(first, cut), self._text(cut, last)

    def splits_word(self, first: int, last: int) -> bool:
        """Whether a cue's two lines meet inside what may be a word."""
        if not self._has_splits or self._is_line(first, last):
            return False
        return self.behind[self._line_end(first, last) - 1] is Break.CHARACTER

    def _line_end(self, first: int, last: int) -> int:
        """Where the first of two lines ends."""
        cuts = (cut for cut in range(first + 1, last) if self._is_line(first, cut) and self._is_line(cut, last))
        return max(cuts, key=lambda cut: self._line_quality(first, cut, last))

    def even_cuts(self, first: int, last: int) -> list[int]:
        """Where to cut a range that is no cue into as few about equally long ones as can be."""
        num_parts = 2
        while num_parts < last - first:
            step = (self._columns[last] - self._columns[first]) / num_parts
            targets = (self._columns[first] + step * part for part in range(1, num_parts))
            cuts = sorted({self._cut_near(target, first, last) for target in targets})
            if all(itertools.starmap(self.is_cue, itertools.pairwise([first, *cuts, last]))):
                return cuts
            num_parts += 1 + num_parts // 8
        return list(range(first + 1, last))

    def _cut_near(self, target: float, first: int, last: int) -> int:
        """The cut nearest to a column, or another near it that is between words and not within one."""
        near = bisect.bisect_left(self._columns, target)
        cuts = range(max(first + 1, near - 4), min(last, near + 5))
        return max(cuts, key=lambda cut: (self.behind[cut - 1], -self._distance(cut, target)))

    def _is_line(self, first: int, last: int) -> bool:
        return last - first == 1 or self.num_columns(first, last) <= self._max_columns

    def _line_quality(self, first: int, cut: int, last: int) -> tuple[bool, Break, float]:
        shorter = min(self.num_columns(first, cut), self.num_columns(cut, last))
        middle = (self._columns[first] + self._columns[last]) / 2
        return shorter >= _ORPHAN_COLUMNS, self.behind[cut - 1], -self._distance(cut, middle)

    def _distance(self, cut: int, column: float) -> float:
        """How far a cut is from a column, in columns; more behind a word that belongs to the next."""
        width = self._columns[cut] - self._columns[cut - 1] - self._is_apart[cut - 1]
        is_dangling = self.behind[cut - 1] is Break.WORD and width <= _DANGLING_COLUMNS
        return abs(self._columns[cut] - column) + is_dangling * _DANGLING_COST

    def _text(self, first: int, last: int) -> str:
        atoms = zip(self._is_apart[first:last], self._texts[first:last], strict=True)
        return "".join(f" {atom}" if is_apart else atom for is_apart, atom in atoms).lstrip(" ")


def _num_columns(text: str) -> int:
    return len(text) if text.isascii() else len(text) + sum(map(_is_wide, text))


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _num_letters(text: str, wide_letters: float) -> float:
    """How long a text takes to say, in letters."""
    return max(
        1.0, sum(_DIGIT_LETTERS if c.isdigit() else wide_letters if _is_wide(c) else 1 for c in text if c.isalnum())
    )


def _breaks(text: str, spans: Sequence[tuple[int, int]], language: str) -> list[Break]:
    """How good a place to stop the end of each atom is."""
    sentence_ends = {piece.end for piece in split_text(text, 0, len(text), language, len(text))}
    breaks = []
    for start, end in spans:
        if end in sentence_ends:
            breaks.append(Break.SENTENCE)
        elif _CLAUSE_END.search(text, start, end):
            breaks.append(Break.CLAUSE)
        else:
            breaks.append(Break.WORD if text[end] == " " or _ends_word(text, end) else Break.CHARACTER)
    return [*breaks[:-1], Break.PARAGRAPH]


def _ends_word(text: str, end: int) -> bool:
    """Whether a word may well end here in a script without spaces: beside another script or a mark, or behind
    hiragana, which ends most Japanese words."""
    is_between_letters = _BOTH_SPACELESS.fullmatch(text, end - 1, end + 1)
    return not is_between_letters or _AFTER_HIRAGANA.fullmatch(text, end - 1, end + 1) is not None


def _ranges(wording: _Wording) -> list[tuple[int, int]]:
    """The cheapest way to cut a chunk into cues, at sentences, clauses or, in long clauses, words."""
    ends = [0, *_clause_ends(wording)]
    costs, starts = [0.0], [0]
    for index in range(1, len(ends)):
        costs.append(math.inf)
        starts.append(index)
        for start in range(index - 1, -1, -1):
            if not wording.is_cue(ends[start], ends[index]):
                break
            cost = costs[start] + _cost(wording, ends[start], ends[index])
            if cost < costs[index]:
                costs[index], starts[index] = cost, start
    ranges = []
    index = len(ends) - 1
    while index:
        ranges.append((ends[starts[index]], ends[index]))
        index = starts[index]
    return ranges[::-1]


def _clause_ends(wording: _Wording) -> Iterator[int]:
    """Ends of clauses, and of the parts of clauses that are too long for a cue."""
    first = 0
    for last, behind in enumerate(wording.behind, 1):
        if behind >= Break.CLAUSE:
            if not wording.is_cue(first, last):
                yield from wording.even_cuts(first, last)
            yield last
            first = last


def _cost(wording: _Wording, first: int, last: int) -> float:
    faults = wording.splits_word(first, last) * _SPLIT_WORD_COST
    faults += (wording.duration_ms(first, last) < MIN_CUE_MS) * _SHORT_COST
    return _CUE_COST + _BREAK_COST[wording.behind[last - 1]] + faults


def _times(wording: _Wording, ranges: Sequence[tuple[int, int]], start_ms: int, end_ms: int) -> list[int]:
    """Where each range begins, and where the last one ends: by how long each takes to say, but no cue shorter
    than it takes to read, if all have room for that, or else than MIN_CUE_MS, if all have room for that."""
    spoken = itertools.accumulate((wording.duration_ms(*range_) for range_ in ranges), initial=float(start_ms))
    times = [round(time_ms) for time_ms in spoken]
    least = _least_ms(wording, ranges, end_ms - start_ms)
    for index, least_ms in enumerate(least, 1):
        times[index] = max(times[index], times[index - 1] + least_ms)
    times[-1] = max(end_ms, start_ms + sum(least))
    for index in range(len(least) - 1, 0, -1):
        times[index] = min(times[index], times[index + 1] - least[index])
    return times


def _least_ms(wording: _Wording, ranges: Sequence[tuple[int, int]], duration_ms: int) -> list[int]:
    read = [wording.num_columns(*range_) * 1_000 // MAX_COLUMNS_PER_SECOND for range_ in ranges]
    for least in ([max(MIN_CUE_MS, time_ms) for time_ms in read], [MIN_CUE_MS] * len(read)):
        if sum(least) <= duration_ms:
            return least
    return [1] * len(read)
