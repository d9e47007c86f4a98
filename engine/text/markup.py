"""What may stand in a text beside words: pauses for the planner, tags for the model.

`[pause 0.8s]` is honoured for every model; it never reaches one. A tag such as `[laugh]` is a token
of the models that were trained on it; elsewhere it would be read out, so it is dropped there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.errors import SpeechError

KNOWN_TAGS = (
    "[angry]",
    "[fear]",
    "[surprised]",
    "[whispering]",
    "[advertisement]",
    "[dramatic]",
    "[narration]",
    "[crying]",
    "[happy]",
    "[sarcastic]",
    "[clear throat]",
    "[sigh]",
    "[shush]",
    "[cough]",
    "[groan]",
    "[sniff]",
    "[gasp]",
    "[chuckle]",
    "[laugh]",
)
"""Turbo's tags. Only these are ever dropped: other text in brackets is text."""

TAG = re.compile("|".join(re.escape(tag) for tag in KNOWN_TAGS), re.IGNORECASE)

MAX_PAUSE_S = 60.0
"""Longest single pause, as `Segment.pause_after_s`."""

MAX_TOTAL_PAUSE_S = 3600.0
"""Longest sum of marked pauses in a segment: short markup must not become days of silence."""

_PAUSE = re.compile(r"\[pause\s{1,8}([0-9.,]{1,12})\s{0,8}([a-z]{0,12})\]", re.IGNORECASE)
_UNIT_S = {"": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 0.001}


@dataclass(frozen=True)
class MarkedText:
    """A text without its pause markup.

    Args:
        text: the text, each markup replaced by one space.
        pauses: (offset in `text`, seconds), in order.
    """

    text: str
    pauses: tuple[tuple[int, float], ...]


def extract_pauses(text: str) -> MarkedText:
    """Take `[pause 0.8s]`, `[pause 800ms]` and `[pause 2]` out of a text.

    Raises:
        SpeechError: invalid_request for another unit, or more than MAX_PAUSE_S.
    """
    parts: list[str] = []
    pauses: list[tuple[int, float]] = []
    position = length = 0
    for match in _PAUSE.finditer(text):
        parts += [text[position : match.start()], " "]
        length += match.start() - position
        pauses.append((length, _pause_seconds(match)))
        length += 1
        position = match.end()
    parts.append(text[position:])
    if sum(seconds for _, seconds in pauses) > MAX_TOTAL_PAUSE_S:
        raise SpeechError("invalid_request", f"the pauses add up to more than {MAX_TOTAL_PAUSE_S:g} s", "text")
    return MarkedText("".join(parts), tuple(pauses))


def _pause_seconds(match: re.Match[str]) -> float:
    number, unit = match.group(1).replace(",", "."), match.group(2).lower()
    try:
        seconds = float(number) * _UNIT_S[unit]
    except (KeyError, ValueError):
        seconds = -1.0
    if not 0.0 <= seconds <= MAX_PAUSE_S:
        raise SpeechError(
            "invalid_request", f"expected a pause from 0 to {MAX_PAUSE_S:g} s as [pause 0.8s], got {match[0]!r}", "text"
        )
    return seconds


def drop_unknown_tags(text: str, tags: Collection[str]) -> str:
    """Remove every tag of KNOWN_TAGS that is not in `tags`, the model's own, which are written as the
    tokenizer has them, in lower case."""
    if "[" not in text:
        return text
    return TAG.sub(lambda match: match[0].lower() if match[0].lower() in tags else " ", text)


def unknown_tags(texts: Sequence[str], tags: Collection[str]) -> tuple[str, ...]:
    """The tags that `drop_unknown_tags` would remove, each once, in order of appearance."""
    found = (match[0] for text in texts if "[" in text for match in TAG.finditer(text))
    return tuple(dict.fromkeys(tag for tag in found if tag.lower() not in tags))
