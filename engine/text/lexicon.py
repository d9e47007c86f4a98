"""How a caller wants words to be said: `{"SQL": "sequel"}`, applied to a text before it is planned.

Text and keys are cut into the same units: words, single symbols, white space, and, in scripts that put
no space between words, single syllables. A key matches where its units follow each other, so it can
only match whole words, and every unit of the text costs a look into one dictionary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import regex  # type: ignore[import-untyped, unused-ignore]

from engine.errors import SpeechError
from engine.text.markup import MARKUP
from engine.text.scripts import SPACELESS, SYLLABLE

MAX_ENTRIES = 1_000
MAX_KEY_CHARS = 100
MAX_VALUE_CHARS = 200

_WORD = rf"[[\p{{L}}\p{{N}}\p{{M}}_]--{SPACELESS}]"
_JOINERS = r"\u00ad\u200c\u200d\u2060"
_UNIT = regex.compile(
    rf"\s+|{_WORD}[{_WORD}{_JOINERS}]*+|{SYLLABLE}|.\p{{M}}*+",
    regex.DOTALL | regex.VERSION1,
)
_STARTS_WORD = regex.compile(_WORD, regex.VERSION1)
_STARTS_SYMBOL = regex.compile(rf"(?!{_WORD}|{SPACELESS})\S", regex.VERSION1)

_CASE = str.maketrans({"İ": "i", "ς": "σ"})
_ROUND = str.maketrans("[]<>", "()()")


@dataclass(slots=True)
class _Node:
    """What may follow the units so far, by unit, and what is said if nothing does."""

    children: dict[str, _Node] = field(default_factory=dict)
    value: str | None = None


class Lexicon:
    """Words and how to say them. Immutable after making, safe to share across threads.

    A key is found where no letter, digit, mark or underscore of its own word stands beside it. Han, kana,
    Thai, Lao, Khmer and Myanmar have no spaces between words: there a key is found anywhere between two
    syllables, and such a syllable beside a word of another script ends that word. Of the keys that begin at
    one place the longest is taken; what has been replaced is not looked at again. A key in lower case is
    found in any case, one with capitals as it is written; composed and decomposed characters are the same,
    and so is any white space between the words of a key. Markup is left alone.

    Args:
        pronunciations: what to say instead, by word or words; "" leaves them out.

    Raises:
        SpeechError: invalid_request (field "pronunciations").
    """

    def __init__(self, pronunciations: Mapping[str, str]) -> None:
        if not isinstance(pronunciations, Mapping):
            raise _invalid(f"expected words and how to say them, got {type(pronunciations).__name__}")
        if len(pronunciations) > MAX_ENTRIES:
            raise _invalid(f"expected at most {MAX_ENTRIES:,} words, got {len(pronunciations):,}")
        self._exact, self._any_case = _Node(), _Node()
        for key, value in pronunciations.items():
            _check(key, value)
            self._add(key, value)

    def apply(self, text: str) -> str:
        """The text with every word of the lexicon replaced."""
        if not self._exact.children and not self._any_case.children:
            return text
        parts: list[str] = []
        position = 0
        for match in MARKUP.finditer(text) if "[" in text or "<" in text else ():
            parts += [self._apply(text[position : match.start()]), match[0]]
            position = match.end()
        return "".join([*parts, self._apply(text[position:])])

    def _apply(self, text: str) -> str:
        """`apply`, on a text without markup."""
        said = "".join(self._replaced(_UNIT.findall(text)))
        if text == said or ("[" not in said and "<" not in said):
            return said
        return MARKUP.sub(lambda match: match[0].translate(_ROUND), said)  # "[HA]" must not become "[laugh]"

    def _replaced(self, units: list[str]) -> list[str]:
        spellings = {unit: _spelling(unit) for unit in set(units)}
        exact = [spellings[unit] for unit in units]
        lower = [_lower(unit) for unit in exact]
        parts: list[str] = []
        done = 0
        for start, (unit, small) in enumerate(zip(exact, lower, strict=True)):
            if start < done or (unit not in self._exact.children and small not in self._any_case.children):
                continue
            found = _longest(self._exact, exact, start), _longest(self._any_case, lower, start)
            end, value = max(found, key=lambda match: (match[0], match[1] is not None))  # the first of equals
            if value is not None:
                parts += [*units[done:start], value]
                done = end
        return parts + units[done:]

    def _add(self, key: str, value: str) -> None:
        units = [_spelling(unit) for unit in _UNIT.findall(key.strip())]
        is_lower = units == [unit.lower() for unit in units]
        node = self._any_case if is_lower else self._exact
        for unit in units:
            node = node.children.setdefault(_lower(unit) if is_lower else unit, _Node())
        if node.value not in (None, value):
            raise _invalid(f"{_clip(key)} is in it twice, to be said in two ways")
        node.value = value


def _spelling(unit: str) -> str:
    """A unit, however its characters are composed."""
    if unit.isspace():
        return " "
    return unit if unit.isascii() else unicodedata.normalize("NFC", unit)


def _lower(spelling: str) -> str:
    return spelling.lower() if spelling.isascii() else spelling.translate(_CASE).lower().translate(_CASE)


def _longest(root: _Node, units: Sequence[str], start: int) -> tuple[int, str | None]:
    """Where the longest key that begins at a unit ends, and what is said for it; else that unit's end, and None."""
    found: tuple[int, str | None] = (start + 1, None)
    node = root.children.get(units[start])
    if node is None or (start and _is_inside(units[start - 1], units[start])):
        return found
    for end in range(start + 1, len(units) + 1):
        if node.value is not None and (end == len(units) or not _is_inside(units[end], units[end - 1])):
            found = end, node.value
        node = node.children.get(units[end]) if end < len(units) else None
        if node is None:
            break
    return found


def _is_inside(beside: str, edge: str) -> bool:
    """Whether a key that ends in a symbol ("C++") has a word right beside that; other units end by themselves."""
    return bool(_STARTS_SYMBOL.match(edge) and _STARTS_WORD.match(beside))


def _check(key: object, value: object) -> None:
    if not isinstance(key, str) or not isinstance(value, str):
        raise _invalid(f"expected text for text, got {type(value).__name__} for {_clip(str(key))}")
    if not 1 <= len(key) <= MAX_KEY_CHARS or not any(map(str.isalnum, key)):
        raise _invalid(f"expected a word of 1 to {MAX_KEY_CHARS} characters with a letter or digit, got {_clip(key)}")
    if len(value) > MAX_VALUE_CHARS:
        raise _invalid(f"{_clip(key)}: expected at most {MAX_VALUE_CHARS} characters, got {len(value):,}")
    for text in (key, value):
        markup = MARKUP.search(text)
        if markup is not None:
            raise _invalid(f"{_clip(key)}: expected words, got the markup {_clip(markup[0])}")


def _clip(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def _invalid(message: str) -> SpeechError:
    return SpeechError("invalid_request", f"pronunciations: {message}", "pronunciations")
