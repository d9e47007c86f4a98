"""Is this chunk what its text should sound like?

T3 sometimes does not stop, loops, falls silent or says far too little. Upstream watches attention maps
for that, which forces a slow attention and leaves hooks behind. Here only the tokens are looked at: how
many the text can need, whether their tail repeats itself, whether an end was said. A chunk that fails is
decoded again with another seed; the best attempt is kept and says what is wrong with it.

Host-only, on small arrays, a few times per chunk: its cost does not show beside decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.models import SILENCE_TOKEN, SPEECH_TOKEN_RATE
from engine.types import IntArray

MAX_ATTEMPTS = 3
"""A chunk is decoded at most so often."""

CHARS_PER_SECOND: Mapping[str, float] = {"zh": 4.5, "ja": 7.0, "ko": 6.5}
"""Unhurried reading speed where a character is a syllable or a word (Coupé et al. 2019: 5 to 8 syllables
per second); elsewhere `DEFAULT_CHARS_PER_SECOND`."""

DEFAULT_CHARS_PER_SECOND = 14.0
SLOWEST = 2.5
"""Speech may take so many times the expected time (slow voices, pauses, spelled-out numbers)."""
FASTEST = 0.25
"""Speech that takes less than this share of the expected time has lost words."""
HEADROOM_S = 3.0
"""Every chunk may have so much more: leading and trailing silence, numbers, a laugh."""
TAIL_S = 3.0
"""A tail that repeats itself for so long will not recover."""
LONGEST_PERIOD_S = 1.0

FLAG_NO_END = "no_end"
FLAG_REPETITION = "repetition"
FLAG_SILENCE = "long_silence"
FLAG_TOO_SHORT = "too_short"
FLAG_EMPTY = "empty"


@dataclass(frozen=True)
class Expectation:
    """What a text can need.

    Args:
        min_tokens: fewer have lost words.
        likely_tokens: at an unhurried pace.
        max_tokens: more are invented.
    """

    min_tokens: int
    likely_tokens: int
    max_tokens: int


def expect(text: str, language: str) -> Expectation:
    """Bounds for the speech tokens of a text, from its letters and digits.

    A digit counts as four letters ("7" is "seven"), a tag such as [laugh] as its letters.
    """
    num_letters = sum(4 if character.isdigit() else 1 for character in text if character.isalnum() or character == " ")
    seconds = num_letters / CHARS_PER_SECOND.get(language, DEFAULT_CHARS_PER_SECOND)
    return Expectation(
        min_tokens=int(FASTEST * seconds * SPEECH_TOKEN_RATE),
        likely_tokens=int(seconds * SPEECH_TOKEN_RATE),
        max_tokens=int((SLOWEST * seconds + HEADROOM_S) * SPEECH_TOKEN_RATE),
    )


def find_loop(tokens: IntArray) -> str | None:
    """Whether the last three seconds repeat one pattern of at most a second: its flag, or None."""
    tail = tokens[-int(TAIL_S * SPEECH_TOKEN_RATE) :]
    if len(tail) < int(TAIL_S * SPEECH_TOKEN_RATE):
        return None
    longest = int(LONGEST_PERIOD_S * SPEECH_TOKEN_RATE)
    if len(set(tail.tolist())) > longest:  # most speech leaves here: more tokens than a period could hold
        return None
    for period in range(1, longest + 1):
        if np.array_equal(tail[period:], tail[:-period]):
            return FLAG_SILENCE if (tail == SILENCE_TOKEN).all() else FLAG_REPETITION
    return None


def judge(tokens: IntArray, expectation: Expectation, *, has_stopped: bool) -> tuple[str, ...]:
    """What is wrong with a finished attempt; empty when nothing is.

    Args:
        tokens: int32 (N,) valid speech tokens.
        expectation: of its text.
        has_stopped: the model said the end, it was not cut off.
    """
    if not len(tokens):
        return (FLAG_EMPTY,)
    flags = [find_loop(tokens)]
    if not has_stopped:
        flags.append(FLAG_NO_END)
    if len(tokens) < expectation.min_tokens:
        flags.append(FLAG_TOO_SHORT)
    return tuple(flag for flag in flags if flag is not None)


def is_better(flags: tuple[str, ...], than: tuple[str, ...]) -> bool:
    """Whether one attempt's flags beat another's: anything beats silence, then the fewer the better."""

    def badness(names: tuple[str, ...]) -> tuple[bool, int]:
        return FLAG_EMPTY in names, len(names)

    return badness(flags) < badness(than)


def trim_loop(tokens: IntArray, flags: tuple[str, ...]) -> IntArray:
    """Cut a looping tail down to its first second, so that the kept attempt does not drone on."""
    if FLAG_REPETITION not in flags and FLAG_SILENCE not in flags:
        return tokens
    return tokens[: len(tokens) - int((TAIL_S - LONGEST_PERIOD_S) * SPEECH_TOKEN_RATE)]
