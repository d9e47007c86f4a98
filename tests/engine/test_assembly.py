"""Chunks are joined whole, in order, evenly and without a click, however they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audio.assembly import (
    CHUNKS_AHEAD,
    FRAME_SAMPLES,
    JOIN_S,
    KEPT_AFTER_FRAMES,
    KEPT_BEFORE_FRAMES,
    Clip,
    Joiner,
)
from engine.types import SAMPLE_RATE
from tests.engine.synthetic_voices import sung_vowel

KEPT_S = (KEPT_BEFORE_FRAMES + KEPT_AFTER_FRAMES) / 100


def vowel(seconds: float, *, level: float = 0.1, before_s: float = 0.0, after_s: float = 0.0) -> torch.Tensor:
    """A sung vowel with silence around it, as a model gives it: not digital silence."""
    sung = sung_vowel(120.0)
    sound = level * np.resize(sung / np.abs(sung).max(), round(seconds * SAMPLE_RATE))
    hum = (
        np.random.default_rng(1).normal(0, 1e-4, round(before_s * SAMPLE_RATE)),
        np.zeros(round(after_s * SAMPLE_RATE)),
    )
    return torch.from_numpy(np.concatenate((hum[0], sound, hum[1])).astype(np.float32))


def hum(seconds: float) -> torch.Tensor:
    """So smooth that a click in it stands out; breaks off wherever it is."""
    return 0.1 * torch.cos(torch.arange(round(seconds * SAMPLE_RATE)) * (2 * np.pi * 120.0 / SAMPLE_RATE))


def joined(joiner: Joiner, chunks: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([joiner.push(chunk, is_end=True) for chunk in chunks]).numpy()


def largest_jump(audio: np.ndarray) -> float:
    return float(np.abs(np.diff(audio)).max())


def rms_db(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(audio.astype(np.float64) ** 2)))


def test_a_chunk_alone_is_as_it_was_but_for_its_very_edges() -> None:
    chunk = vowel(1.0, before_s=0.5, after_s=0.7)
    out = joined(Joiner([Clip()], even_levels=True), [chunk])
    edge = round(0.005 * SAMPLE_RATE)
    assert np.array_equal(out[edge:-edge], chunk.numpy()[edge:-edge])
    assert out[0] == out[-1] == 0.0


@pytest.mark.parametrize("pause_s", [0.0, 0.1, 0.6])
def test_silence_that_the_model_added_is_cut_where_chunks_meet_and_the_pause_is_as_asked(pause_s: float) -> None:
    chunks = [vowel(1.0, after_s=0.9), vowel(1.0, before_s=0.8, after_s=0.4)]
    joiner = Joiner([Clip(pause_after_s=pause_s), Clip()])
    out = joined(joiner, chunks)
    (_, end), (start, whole) = joiner.spans_s
    overlap_s = 0.0 if pause_s else JOIN_S
    assert start - end == pytest.approx(pause_s - overlap_s, abs=1e-4)
    assert len(out) / SAMPLE_RATE == pytest.approx(
        2.0 + KEPT_S + pause_s - overlap_s + 0.4, abs=2 * FRAME_SAMPLES / SAMPLE_RATE
    )
    assert whole == len(out) / SAMPLE_RATE
    if pause_s:
        assert not out[round(end * SAMPLE_RATE) : round(start * SAMPLE_RATE)].any()


@pytest.mark.parametrize("pause_s", [0.0, 0.25])
def test_no_join_clicks_even_where_chunks_break_off_in_full_voice(pause_s: float) -> None:
    chunks = [hum(0.503), hum(0.771), hum(0.377)]
    out = joined(Joiner([Clip(pause_after_s=pause_s), Clip(pause_after_s=pause_s), Clip()]), chunks)
    most = 1.45 * largest_jump(hum(1.0).numpy())  # two in phase add up by no more
    assert largest_jump(np.concatenate(([0.0], out, [0.0]))) < most
    assert largest_jump(torch.cat([chunks[0], torch.zeros(round(pause_s * SAMPLE_RATE)), chunks[1]]).numpy()) > most


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(0, 40_000), max_size=6), min_size=3, max_size=3),
    pauses=st.lists(st.sampled_from([0.0, 0.1]), min_size=3, max_size=3),
    silences=st.lists(st.sampled_from([0.0, 0.03, 0.4]), min_size=6, max_size=6),
)
def test_chunks_in_pieces_give_the_samples_of_whole_ones(
    cuts: list[list[int]], pauses: list[float], silences: list[float]
) -> None:
    clips = [Clip(pause_after_s=pause, pause_before_s=0.1) for pause in pauses]
    chunks = [vowel(0.3 + 0.2 * i, before_s=silences[i], after_s=silences[i + 3]) for i in range(3)]
    chunks[1][3000:3400] = 0.0  # a pause inside
    whole, pieces = Joiner(clips), Joiner(clips)
    expected = joined(whole, chunks)
    out = []
    for chunk, at in zip(chunks, cuts, strict=True):
        parts = torch.tensor_split(chunk, sorted(min(cut, len(chunk)) for cut in at))
        out += [pieces.push(part, is_end=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert np.array_equal(torch.cat(out).numpy(), expected)
    assert pieces.spans_s == whole.spans_s


def test_pieces_are_given_out_long_before_their_chunk_ends() -> None:
    joiner = Joiner([Clip(), Clip()])
    given_out = sum(len(joiner.push(piece, is_end=False)) for piece in vowel(2.0).split(4800))
    assert given_out > 1.9 * SAMPLE_RATE


def test_levels_of_one_voice_are_brought_together_and_others_left() -> None:
    """Also where the first chunk is the one that is unlike the rest."""
    voices, levels = ("anna", "anna", "bob", "anna", "anna"), [0.06, 0.1, 0.4, 0.11, 0.1]
    joiner = Joiner([Clip(0.0, 0.1, voice) for voice in voices], even_levels=True)
    out = joined(joiner, [vowel(1.0, level=level) for level in levels])
    spoken = [out[round(start * SAMPLE_RATE) + 2400 : round(end * SAMPLE_RATE) - 2400] for start, end in joiner.spans_s]
    anna = [rms_db(spoken[i]) for i in (0, 1, 3, 4)]
    assert max(anna) - min(anna) < 0.2
    assert rms_db(spoken[2]) == pytest.approx(rms_db(vowel(1.0, level=0.4).numpy()), abs=0.05)


def test_levels_are_those_of_the_chunks_nearby_however_many_there_are() -> None:
    chunks = [vowel(0.5, level=0.1 if i % 2 else 0.08) for i in range(40)]
    joiner = Joiner([Clip(0.0, 0.1)] * 40, even_levels=True)
    early = [len(joiner.push(chunk, is_end=True)) for chunk in chunks]
    assert early[CHUNKS_AHEAD] > 0 == early[CHUNKS_AHEAD - 1], "few chunks wait"
    assert joiner.num_joined == 40


def test_no_chunk_is_raised_above_full_scale_or_moved_by_more_than_the_bound() -> None:
    quiet = vowel(1.0, level=0.05)
    quiet[12_000] = 0.8
    joiner = Joiner([Clip(0.0, 0.1)] * 3, even_levels=True)
    out = joined(joiner, [vowel(1.0, level=0.9), vowel(1.0, level=0.9), quiet])
    last = out[round(joiner.spans_s[2][0] * SAMPLE_RATE) :]
    assert 0.8 < np.abs(last).max() <= 0.99
    assert 0.0 < rms_db(last[2400:11_000]) - rms_db(quiet[2400:11_000].numpy()) <= 6.01


def test_a_chunk_of_silence_alone_keeps_its_length() -> None:
    joiner = Joiner([Clip(pause_after_s=0.1), Clip(pause_after_s=0.1), Clip()])
    out = joined(joiner, [vowel(0.5), torch.zeros(9600), vowel(0.5)])
    assert joiner.spans_s[1][1] - joiner.spans_s[1][0] == pytest.approx(0.4)
    assert len(out) == pytest.approx((0.5 + 0.1 + 0.4 + 0.1 + 0.5) * SAMPLE_RATE, abs=FRAME_SAMPLES * 2)
