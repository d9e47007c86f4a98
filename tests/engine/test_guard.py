"""The guard finds what is wrong with a chunk's tokens, and leaves good ones alone."""

from __future__ import annotations

import numpy as np
import pytest

from engine import guard
from engine.models import SILENCE_TOKEN, SPEECH_TOKEN_RATE
from engine.types import IntArray

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody is surprised."


def varied(count: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(0, 4000, count).astype(np.int32)


def usual(text: str = SENTENCE, language: str = "en") -> guard.Expectation:
    return guard.expect(text, language)


def test_speech_at_a_usual_pace_has_no_flags() -> None:
    tokens = varied(usual().likely_tokens)
    assert guard.judge(tokens, usual(), has_stopped=True) == ()


def test_speech_without_an_end_is_flagged() -> None:
    assert guard.judge(varied(usual().max_tokens), usual(), has_stopped=False) == (guard.FLAG_NO_END,)


def test_far_too_short_speech_is_flagged() -> None:
    assert guard.judge(varied(usual().min_tokens - 1), usual(), has_stopped=True) == (guard.FLAG_TOO_SHORT,)


def test_no_speech_at_all_is_flagged_as_empty() -> None:
    assert guard.judge(varied(0), usual(), has_stopped=True) == (guard.FLAG_EMPTY,)


@pytest.mark.parametrize("period", [1, 2, 7, 25])
def test_a_repeating_tail_is_found_whatever_its_period(period: int) -> None:
    tokens = np.concatenate((varied(60), np.tile(varied(period, seed=1), 100)[:90])).astype(np.int32)
    assert guard.find_loop(tokens) == guard.FLAG_REPETITION


def test_a_silent_tail_is_told_from_other_loops() -> None:
    tokens = np.concatenate((varied(60), np.full(90, SILENCE_TOKEN))).astype(np.int32)
    assert guard.find_loop(tokens) == guard.FLAG_SILENCE


def test_a_loop_that_recovered_is_not_flagged() -> None:
    tokens = np.concatenate((np.full(90, 7), varied(80))).astype(np.int32)
    assert guard.find_loop(tokens) is None


def test_a_pause_of_a_second_is_not_a_loop() -> None:
    tokens = np.concatenate((varied(100), np.full(SPEECH_TOKEN_RATE, SILENCE_TOKEN))).astype(np.int32)
    assert guard.find_loop(tokens) is None


def test_the_kept_part_of_a_loop_ends_within_a_second_of_it() -> None:
    tokens = np.concatenate((varied(60), np.full(75, 7))).astype(np.int32)
    kept = guard.trim_loop(tokens, (guard.FLAG_REPETITION,))
    assert len(kept) == 60 + SPEECH_TOKEN_RATE
    assert np.array_equal(guard.trim_loop(tokens, ()), tokens)


@pytest.mark.parametrize("text", ["Hi.", "No!", "7", "一"])
def test_a_very_short_text_may_take_seconds_but_not_many(text: str) -> None:
    expectation = guard.expect(text, "en")
    assert 2 * SPEECH_TOKEN_RATE <= expectation.max_tokens <= 6 * SPEECH_TOKEN_RATE
    assert expectation.min_tokens <= SPEECH_TOKEN_RATE // 2


def test_budgets_grow_with_the_text_and_slower_scripts_get_more() -> None:
    assert guard.expect(SENTENCE * 2, "en").max_tokens > usual().max_tokens
    assert guard.expect("你好世界", "zh").max_tokens > guard.expect("abcd", "en").max_tokens
    assert guard.expect("1984", "en").max_tokens > guard.expect("abcd", "en").max_tokens


def test_the_better_attempt_is_the_one_with_fewer_flags_and_any_beats_silence() -> None:
    empty, short, worse = (guard.FLAG_EMPTY,), (guard.FLAG_TOO_SHORT,), (guard.FLAG_REPETITION, guard.FLAG_NO_END)
    assert guard.is_better((), short)
    assert guard.is_better(short, worse)
    assert guard.is_better(worse, empty)
    assert not guard.is_better(short, short)
