"""What may stand in a text beside words: pauses for the planner, tags for the model.

`[pause 0.8s]` is honoured for every model; it never reaches one. A tag such as `[laugh]` is a token
of the models that were trained on it; elsewhere it would be read out, so it is dropped there. What has
the form of markup and is neither is refused: `[giggle]` or `<break/>` read out would spoil the audio.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
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
"""Turbo's tags. Only these are ever dropped."""

TAG = re.compile("|".join(re.escape(tag) for tag in KNOWN_TAGS), re.IGNORECASE)

MAX_PAUSE_S = 60.0
"""Longest single pause, as `Segment.pause_after_s`."""

MAX_TOTAL_PAUSE_S = 3600.0
"""Longest sum of marked pauses in a segment: short markup must not become days of silence."""

_PAUSE = re.compile(r"\[pause\s{1,8}([0-9.,]{1,12})\s{0,8}([a-z]{0,12})\]", re.IGNORECASE)
_UNIT_S = {"": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 0.001}

_FORM = re.compile(
    # One or two words in lower case, and perhaps a number with a unit. Not markup: a footnote or a letter
    # put in ([a], [s]he), editors' marks, the text of a Markdown link.
    r"\[\s{0,8}(?!(?:sic|ibid)\])/?(?:[a-z]{1,32}[ \t_:=-]{1,8}[a-z]{1,32}|[a-z]{2,32})"
    r"(?:[ \t_:=-]{1,8}[+-]?[0-9]{1,12}(?:[.,][0-9]{1,12})?\s{0,8}[a-z%]{0,12})?\s{0,8}/?\](?!\()"
    # Whatever was to be a pause.
    r"|(?i:\[\s{0,8}/?\s{0,8}pause)[^\[\]\n]{0,40}\]?"
    # Elements of SSML 1.1 and of its dialects: <break>, </voice>, <prosody rate=, <emphasis strong>.
    r"|(?i:</?(?:speak|lexicon|lookup|meta|metadata|token|say-as|phoneme|sub|lang|voice|emphasis|break|prosody|audio"
    r"|desc|mark|media|par|seq|(?:amazon|google|mstts|ssml):[a-z-]{1,32})"
    r"(?:\s{0,8}/?>|\s{1,8}[\w:-]{1,32}\s{0,8}=[^<>]{0,200}>?|\s[^<>]{0,200}>))"
    # Its elements of one letter, which are a variable more often.
    r"|(?i:</?[psw](?:\s{0,8}/?>|\s{1,8}[\w:-]{1,32}\s{0,8}=\s{0,8}[\"'][^<>]{0,200}>?)|<\?xml\b[^<>]{0,200}>?)"
)

MARKUP = re.compile(f"(?P<known>(?i:{TAG.pattern}|{_PAUSE.pattern}))|{_FORM.pattern}")
"""Everything that has the form of markup; the group `known` matches where it also is one."""

_PAUSE_EXAMPLE = "[pause 0.8s]"
_PAUSE_NAMES = frozenset({"break", "wait", "silence", "silent", "delay", "sleep", "stop", "beat"})
_LENGTH = re.compile(r"([0-9]{1,5}(?:\.[0-9]{1,3})?)\s{0,8}(ms|s)(?:ec|econds?)?\b", re.IGNORECASE)
_TAG_BY_SENSE: Mapping[str, str] = {
    "giggle": "[chuckle]",
    "giggles": "[chuckle]",
    "snicker": "[chuckle]",
    "lol": "[laugh]",
    "haha": "[laugh]",
    "sob": "[crying]",
    "sobbing": "[crying]",
    "weeping": "[crying]",
    "breath": "[gasp]",
    "breathe": "[gasp]",
    "inhale": "[gasp]",
    "exhale": "[sigh]",
    "sad": "[crying]",
    "mad": "[angry]",
    "scared": "[fear]",
    "joy": "[happy]",
    "hush": "[shush]",
}
"""Names that people try, by what they mean; what is merely spelled otherwise is found by its letters."""


@dataclass(frozen=True)
class MarkedText:
    """A text without its pause markup.

    Args:
        text: the text, each markup replaced by one space.
        pauses: (offset in `text`, seconds), in order.
    """

    text: str
    pauses: tuple[tuple[int, float], ...]


def refuse_unknown(text: str, where: str = "") -> None:
    """Refuse what has the form of markup but is not known.

    Args:
        text: as the caller wrote it.
        where: which text it is, for the message; "" where there is only one.

    Raises:
        SpeechError: invalid_request with the markup, its offset and the nearest that is known.
    """
    if "[" not in text and "<" not in text:
        return
    for match in MARKUP.finditer(text):
        if match["known"] is None:
            inside = match[0].strip("[]<>/ ")
            raise SpeechError(
                "invalid_request",
                f"text: unknown markup {_clip(match[0])} at character {match.start()}{where}; {_hint(match[0])}; "
                f"to have words read, write them in round brackets: {_clip(f'({inside})')}",
                "text",
            )


def _clip(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _hint(markup: str) -> str:
    """What of the known markup may be meant."""
    words = re.findall("[a-z]+", markup.lower())
    if words[0].startswith("pause") or words[0] in _PAUSE_NAMES:
        length = _LENGTH.search(markup)
        return f"the nearest known is {f'[pause {length[1]}{length[2]}]' if length else _PAUSE_EXAMPLE}"
    by_sense = [_TAG_BY_SENSE[word] for word in words if word in _TAG_BY_SENSE]
    names = [tag.strip("[]") for tag in KNOWN_TAGS]
    by_letters = [f"[{name}]" for name in difflib.get_close_matches(" ".join(words[:2]), names, n=1)]
    for nearest in (*by_sense, *by_letters):
        return f"the nearest known is {nearest}"
    return f"known are {_PAUSE_EXAMPLE} and {', '.join(KNOWN_TAGS)}"


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
