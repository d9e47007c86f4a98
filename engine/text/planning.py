"""Plans the chunks that a text is spoken in.

A chunk is decoded in one go, so it must be short enough for the model to stay on course, and long
enough to sound like a sentence: models babble on a word or two. Chunks are whole sentences as far as
that goes. The plan depends on nothing but the text and the settings: the same text gives the same
chunks anywhere, which seeds, checkpoints of long jobs and caches rely on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import SpeechError
from engine.text.markup import extract_pauses, refuse_unknown
from engine.text.normalize import is_speakable, repair_surrogates
from engine.text.splitting import Break, Piece, halve, split_text
from engine.types import Segment

DEFAULT_MAX_CHARS = 280
"""About 20 s of English, well inside the 25 to 30 s where Turbo starts to drift."""

SHORT_CHUNK_CHARS = 40
"""Chunks under this are joined with a neighbour, or take a sentence from it, where that is possible."""

PAUSE_S: Mapping[Break, float] = {
    Break.CHARACTER: 0.0,
    Break.WORD: 0.0,
    Break.CLAUSE: 0.1,
    Break.SENTENCE: 0.25,
    Break.PARAGRAPH: 0.6,
}
"""Silence behind a chunk by the break that it ends with, seconds."""

SEGMENT_PAUSE_S = 0.5
"""Silence between segments that do not say; behind the last there is none."""

_CHARS_PER_SYMBOL: Mapping[str, float] = {"zh": 3.0, "ja": 2.0, "ko": 2.0}
"""How many letters of an alphabet one symbol of a script takes the time of: max_chars counts letters.
It also keeps Chinese (up to seven tokens per character in Cangjie) within the model's text positions."""


@dataclass(frozen=True)
class PlannedChunk:
    """A stretch of text to be decoded in one go.

    Args:
        index: position in the plan, from 0.
        text: as the caller wrote it, without pause markup and without white space around it.
        segment_index: which segment it is from; a chunk is never from two.
        language: as asked for.
        pause_after_s: silence behind it, seconds.
        pause_before_s: silence before it, seconds; only ever on the first, for a text that begins
            with a pause.
        speakable: False for a run of symbols (a line of 300 dashes) too long to join a neighbour.
            There is nothing to decode in it: only its pause is heard.
    """

    index: int
    text: str
    segment_index: int
    language: str
    pause_after_s: float
    pause_before_s: float = 0.0
    speakable: bool = True


def plan(
    segments: Sequence[Segment],
    *,
    language: str,
    max_chars: int = DEFAULT_MAX_CHARS,
    tags: Collection[str] = (),
) -> list[PlannedChunk]:
    """Cut segments into chunks.

    The chunks' texts in order are the segments' texts, apart from white space at the joins, pause
    markup and lone surrogates (which become U+FFFD). A segment without anything to speak gives no
    chunk; its pauses are kept.

    Args:
        segments: what to say.
        language: of the segments that name none.
        max_chars: most characters of a chunk; Chinese, Japanese and Korean, whose characters take
            longer to say, get a third or a half of it.
        tags: tags that the model knows. Others of `KNOWN_TAGS` count as silent.

    Raises:
        SpeechError: text_empty, or invalid_request for a pause that cannot be and for what has the
            form of markup and is none.
    """
    assert max_chars >= 1, max_chars
    for index, segment in enumerate(segments):
        refuse_unknown(segment.text, f" of segment {index}" if len(segments) > 1 else "")
    builder = _PlanBuilder(tags)
    for index, segment in enumerate(segments):
        pause_s = SEGMENT_PAUSE_S if index + 1 < len(segments) else 0.0
        builder.add_segment(index, segment, segment.language or language, max_chars, pause_s)
    return builder.finish()


@dataclass
class _Stretch:
    """What lies between two marked pauses: `text[start:end]`, then `pause_s`, if any."""

    start: int
    end: int
    pause_s: float | None


class _PlanBuilder:
    """Collects the chunks of one plan; what a pause belongs to may come before or after it."""

    def __init__(self, tags: Collection[str]) -> None:
        self._tags = tags
        self._chunks: list[PlannedChunk] = []
        self._pause_before_s = 0.0

    def add_segment(self, index: int, segment: Segment, language: str, max_chars: int, pause_s: float) -> None:
        """Add a segment's chunks; `pause_s` is behind it unless it or its text says otherwise."""
        marked = extract_pauses(repair_surrogates(segment.text))
        limit = max(1, int(max_chars / _CHARS_PER_SYMBOL.get(language[:2].lower(), 1.0)))
        lead_s, stretches = _speakable_stretches(marked.text, marked.pauses, self._is_speakable)
        self._add_pause(lead_s)
        for stretch in stretches:
            self._add_stretch(index, marked.text, stretch, language, limit)
        self._end_segment(segment, stretches, pause_s)

    def _end_segment(self, segment: Segment, stretches: list[_Stretch], pause_s: float) -> None:
        if not stretches:
            self._add_pause(segment.pause_after_s or 0.0)
            return
        marked_s = stretches[-1].pause_s
        if segment.pause_after_s is not None:
            self._set_pause((marked_s or 0.0) + segment.pause_after_s)
        elif marked_s is None:
            self._set_pause(pause_s)

    def _add_stretch(self, index: int, text: str, stretch: _Stretch, language: str, max_chars: int) -> None:
        pieces = list(split_text(text, stretch.start, stretch.end, language, max_chars))
        voiced = [self._is_speakable(text[piece.start : piece.end]) for piece in pieces]
        packer = _Packer(pieces, voiced, max_chars)
        for span in _lengthen(text, packer.spans(), packer.short_chars, max_chars, self._is_speakable):
            spoken = text[span.start : span.end]
            chunk = PlannedChunk(
                index=len(self._chunks),
                text=spoken,
                segment_index=index,
                language=language,
                pause_after_s=PAUSE_S[span.behind],
                speakable=self._is_speakable(spoken),
            )
            self._chunks.append(chunk)
        if stretch.pause_s is not None:
            self._set_pause(stretch.pause_s)

    def finish(self) -> list[PlannedChunk]:
        if not any(chunk.speakable for chunk in self._chunks):
            raise SpeechError("text_empty", "the text holds nothing that can be spoken", "text")
        self._chunks[0] = dataclasses.replace(self._chunks[0], pause_before_s=self._pause_before_s)
        return self._chunks

    def _is_speakable(self, text: str) -> bool:
        return is_speakable(text, self._tags)

    def _set_pause(self, seconds: float) -> None:
        self._chunks[-1] = dataclasses.replace(self._chunks[-1], pause_after_s=seconds)

    def _add_pause(self, seconds: float) -> None:
        if self._chunks:
            self._set_pause(self._chunks[-1].pause_after_s + seconds)
        else:
            self._pause_before_s += seconds


def _speakable_stretches(
    text: str, pauses: Sequence[tuple[int, float]], speakable: Callable[[str], bool]
) -> tuple[float, list[_Stretch]]:
    """Cut a text at its marked pauses; a stretch with nothing to speak joins the one before it.

    Returns:
        The seconds of pause before the first stretch, and the stretches.
    """
    lead_s, start = 0.0, 0
    stretches: list[_Stretch] = []
    for end, pause_s in [*pauses, (len(text), None)]:
        if speakable(text[start:end]):
            stretches.append(_Stretch(start if stretches else 0, end, pause_s))
        elif stretches:
            last = stretches[-1]
            last.end = end
            last.pause_s = (last.pause_s or 0.0) + pause_s if pause_s is not None else last.pause_s
        else:
            lead_s += pause_s or 0.0
        start = end
    return lead_s, stretches


def _lengthen(
    text: str, spans: Sequence[Piece], short_chars: int, max_chars: int, speakable: Callable[[str], bool]
) -> list[Piece]:
    """Let a short span that no whole sentence can join take half of the sentence beside it."""
    longer: list[Piece] = []
    for span in spans:
        parts: tuple[Piece, ...] = ()
        if longer and min(longer[-1].length, span.length) < short_chars:
            both = Piece(longer[-1].start, span.end, span.behind)
            parts = (both,) if both.length <= max_chars else halve(text, both, short_chars, max_chars)
        if parts and all(speakable(text[part.start : part.end]) for part in parts):
            longer[-1:] = parts
        else:
            longer.append(span)
    return longer


class _Packer:
    """Packs the pieces of one stretch into groups of at most `max_chars`, first come first served,
    then lets groups that are short or silent join or share with a neighbour."""

    def __init__(self, pieces: list[Piece], voiced: list[bool], max_chars: int) -> None:
        self._pieces = pieces
        self._voiced = voiced
        self._max_chars = max_chars
        self.short_chars = min(SHORT_CHUNK_CHARS, max_chars // 4)

    def spans(self) -> list[Piece]:
        """The groups as pieces that cover the stretch, in order."""
        ends = ((self._pieces[first], self._pieces[last - 1]) for first, last in self._groups())
        return [Piece(first.start, last.end, last.behind) for first, last in ends]

    def _groups(self) -> list[tuple[int, int]]:
        shared: list[tuple[int, int]] = []
        for group in self._packed():
            if shared and (self._is_needy(shared[-1]) or self._is_needy(group)):
                shared[-1:] = self._share(shared[-1][0], group[1])
            else:
                shared.append(group)
        return shared

    def _packed(self) -> list[tuple[int, int]]:
        starts = [0]
        for index in range(1, len(self._pieces)):
            if self._length(starts[-1], index + 1) > self._max_chars or self._ends_well(starts[-1], index):
                starts.append(index)
        return list(zip(starts, [*starts[1:], len(self._pieces)], strict=True)) if self._pieces else []

    def _ends_well(self, first: int, last: int) -> bool:
        """Whether a group may end early: with its paragraph, or before a sentence that is cut anyway."""
        behind = self._pieces[last - 1].behind
        before_cut_sentence = behind is Break.SENTENCE and self._pieces[last].behind < Break.SENTENCE
        return (behind is Break.PARAGRAPH or before_cut_sentence) and self._length(first, last) >= self.short_chars

    def _share(self, first: int, last: int) -> list[tuple[int, int]]:
        """One group where it fits, else two, cut where neither is silent or short, preferably, and
        otherwise at the best break and most evenly."""
        if self._length(first, last) <= self._max_chars:
            return [(first, last)]
        voiced = [index for index in range(first, last) if self._voiced[index]] or [last]
        cuts = [cut for cut in range(first + 1, last) if self._fits(first, cut, last)]
        best = max(cuts, key=lambda cut: (voiced[0] < cut <= voiced[-1], *self._cut_quality(first, cut, last)))
        return [(first, best), (best, last)]

    def _fits(self, first: int, cut: int, last: int) -> bool:
        return max(self._length(first, cut), self._length(cut, last)) <= self._max_chars

    def _cut_quality(self, first: int, cut: int, last: int) -> tuple[bool, Break, int]:
        left, right = self._length(first, cut), self._length(cut, last)
        return min(left, right) >= self.short_chars, self._pieces[cut - 1].behind, -abs(left - right)

    def _is_needy(self, group: tuple[int, int]) -> bool:
        return self._length(*group) < self.short_chars or not any(self._voiced[group[0] : group[1]])

    def _length(self, first: int, last: int) -> int:
        return self._pieces[last - 1].end - self._pieces[first].start
