"""Sampling draws from what transformers' own filters leave, in each family's order, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import noise
from engine.t3.sampling import SamplingRows, SamplingSettings, candidates_needed, sample
from engine.types import MAX_SEED

VOCAB = 60
NO_TOP_K = 1 << 30
PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, repetition_penalty=1.0, top_k=NO_TOP_K, min_p=0.0, cfg_weight=0.0)

any_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.05, 0.4, 0.8, 1.0, 1.7, 5.0]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.95, 0.999, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 2.0, 5.0]),
    top_k=st.sampled_from([1, 2, 5, 30, VOCAB, 1000, NO_TOP_K]),
    min_p=st.sampled_from([0.0, 0.02, 0.05, 0.5, 1.0]),
    cfg_weight=st.just(0.0),
)
orders = pytest.mark.parametrize("penalty_first", [True, False], ids=["llama", "gpt2"])


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def random_seen(num_rows: int, seed: int = 0) -> Tensor:
    return torch.rand(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed + 1)) < 0.2


def draw(
    logits: Tensor,
    wanted: Sequence[SamplingSettings],
    seeds: Sequence[int],
    seen: Tensor,
    steps: Tensor | None = None,
    *,
    penalty_first: bool,
) -> Tensor:
    """One token per row, with the rows set up as the decoder does it."""
    rows = SamplingRows.allocate(len(wanted), torch.device("cpu"))
    for row, (settings_, seed) in enumerate(zip(wanted, seeds, strict=True)):
        rows.set(row, settings_, seed)
    return sample(
        logits,
        rows,
        seen,
        torch.zeros(len(wanted), dtype=torch.long) if steps is None else steps,
        penalty_first=penalty_first,
        num_candidates=candidates_needed(list(wanted), VOCAB),
    )


def filtered_by_transformers(logits: Tensor, wanted: SamplingSettings, seen: Tensor, *, penalty_first: bool) -> Tensor:
    """(1, vocabulary) logits after the warpers that upstream builds for the family, in its order."""
    penalty = RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty)
    temperature, min_p = TemperatureLogitsWarper(wanted.temperature), MinPLogitsWarper(wanted.min_p)
    top_k, top_p = TopKLogitsWarper(min(wanted.top_k, VOCAB)), TopPLogitsWarper(wanted.top_p)
    order = [penalty, temperature, min_p, top_p] if penalty_first else [temperature, top_k, top_p, penalty]
    if wanted.top_p == 1.0:  # it would drop what has rounded to probability 0
        order.remove(top_p)
    filters: Any = LogitsProcessorList(order)
    return filters(seen.nonzero()[:, 0][None], logits[None].clone())


def in_family(wanted: SamplingSettings, *, penalty_first: bool) -> SamplingSettings:
    """Without the filters that the family does not have."""
    return dataclasses.replace(wanted, top_k=NO_TOP_K) if penalty_first else dataclasses.replace(wanted, min_p=0.0)


@orders
@given(wanted=any_settings, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_tokens_are_those_that_transformers_filters_leave_with_the_same_noise(
    wanted: SamplingSettings, seed: int, *, penalty_first: bool
) -> None:
    wanted = in_family(wanted, penalty_first=penalty_first)
    num_rows = 40
    logits, seen = random_logits(1, seed).expand(num_rows, -1), random_seen(1, seed).expand(num_rows, -1)
    tokens = draw(logits, [wanted] * num_rows, range(num_rows), seen, penalty_first=penalty_first)
    left = filtered_by_transformers(logits[0], wanted, seen[0], penalty_first=penalty_first)
    zero = torch.zeros(num_rows, 1, dtype=torch.long)
    scores = left + noise.gumbel(torch.arange(num_rows)[:, None], zero, zero, torch.arange(VOCAB)[None])
    assert tokens.tolist() == scores.argmax(-1).tolist()


@orders
@given(wanted=any_settings, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_exactly_the_tokens_that_transformers_filters_leave_can_be_drawn(
    wanted: SamplingSettings, seed: int, *, penalty_first: bool
) -> None:
    wanted = in_family(wanted, penalty_first=penalty_first)
    logits, seen = random_logits(1, seed).expand(VOCAB, -1), random_seen(1, seed).expand(VOCAB, -1)

    def push_the_rows_own_token(seed_low: Tensor, _high: Tensor, _step: Tensor, token_ids: Tensor) -> Tensor:
        return (token_ids == seed_low) * 1e6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "gumbel", push_the_rows_own_token)
        tokens = draw(logits, [wanted] * VOCAB, range(VOCAB), seen, penalty_first=penalty_first)
    can_be_drawn = tokens == torch.arange(VOCAB)
    left = filtered_by_transformers(logits[0], wanted, seen[0], penalty_first=penalty_first)
    assert can_be_drawn.tolist() == left[0].isfinite().tolist()


@orders
@given(batch=st.lists(st.tuples(any_settings, st.integers(0, MAX_SEED), st.integers(0, 50)), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_rows_token_does_not_depend_on_its_neighbours_settings(
    batch: list[tuple[SamplingSettings, int, int]], *, penalty_first: bool
) -> None:
    wanted, seeds = [row[0] for row in batch], [row[1] for row in batch]
    steps = torch.tensor([row[2] for row in batch])
    logits, seen = random_logits(len(batch)), random_seen(len(batch))
    together = draw(logits, wanted, seeds, seen, steps, penalty_first=penalty_first)
    for row in range(len(batch)):
        one = slice(row, row + 1)
        alone = draw(logits[one], wanted[one], seeds[one], seen[one], steps[one], penalty_first=penalty_first)
        assert together[row] == alone[0], row


@orders
def test_an_unfiltered_row_keeps_the_whole_vocabulary_beside_a_row_with_a_small_top_k(*, penalty_first: bool) -> None:
    wanted = [dataclasses.replace(PLAIN, top_k=2)] + [PLAIN] * 200
    logits, seen = torch.zeros(1, VOCAB).expand(201, -1), torch.zeros(201, VOCAB, dtype=torch.bool)
    tokens = draw(logits, wanted, range(201), seen, penalty_first=penalty_first)
    assert tokens[1:].unique().numel() > VOCAB / 2


@orders
def test_tokens_are_drawn_as_often_as_their_probability_says(*, penalty_first: bool) -> None:
    num_rows = 20_000
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, :6] = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    tokens = draw(
        logits.expand(num_rows, -1),
        [PLAIN] * num_rows,
        range(num_rows),
        seen.expand(num_rows, -1),
        penalty_first=penalty_first,
    )
    expected = logits[0].softmax(-1)
    sigma = (expected * (1 - expected) / num_rows).sqrt()
    frequencies = tokens.bincount(minlength=VOCAB) / num_rows
    assert ((frequencies - expected).abs() <= 4 * sigma).all()


@orders
def test_seeds_and_steps_each_draw_anew_and_the_same_again(*, penalty_first: bool) -> None:
    flat, seen = torch.zeros(50, VOCAB), torch.zeros(50, VOCAB, dtype=torch.bool)

    def draws(seeds: Sequence[int], steps: Tensor) -> list[int]:
        return draw(flat, [PLAIN] * 50, seeds, seen, steps, penalty_first=penalty_first).tolist()

    by_seed, by_step = draws(range(50), torch.zeros(50).long()), draws([7] * 50, torch.arange(50))
    assert len(set(by_seed)) > 20
    assert len(set(by_step)) > 20
    assert by_seed != by_step
    assert by_seed == draws(range(50), torch.zeros(50).long())
    assert len(set(draws([MAX_SEED] * 50, torch.zeros(50).long()))) == 1


def test_the_families_differ_in_when_they_penalise() -> None:
    """Penalised first, a seen token falls out of top-k or top-p; penalised last, it stays the only choice."""
    logits, seen = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB, dtype=torch.bool)
    logits[0, 3], logits[0, 4], seen[0, 3] = 2.0, 1.9, True
    greedy = dataclasses.replace(PLAIN, top_p=1e-6, repetition_penalty=1.2)
    assert draw(logits, [greedy], [1], seen, penalty_first=True).item() == 4
    assert draw(logits, [greedy], [1], seen, penalty_first=False).item() == 3


def test_settings_of_one_row_leave_the_others_as_they_were() -> None:
    rows = SamplingRows.allocate(3, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in vars(rows).items()}
    rows.set(1, SamplingSettings(0.5, 0.25, 1.5, 7, 0.125, 0.0), MAX_SEED)
    for name, tensor in vars(rows).items():
        assert torch.equal(tensor[[0, 2]], before[name][[0, 2]]), name
        assert tensor[1] != before[name][1], name
    assert all(torch.equal(tensor, getattr(rows, name)[:2]) for name, tensor in vars(rows.first(2)).items())
