"""Random numbers are a pure function of seed and place: the same anywhere, and as good as independent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import noise
from engine.types import MAX_SEED

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # of the golden ratio, as in the engine
NUM_DRAWS = 100_000
STREAMS = (noise.STREAM_SAMPLING, noise.STREAM_FLOW, noise.STREAM_SOURCE_PHASE, noise.STREAM_SOURCE_NOISE)

seeds = st.integers(0, MAX_SEED)
counters = st.integers(0, MASK)


def lowbias32(x: int) -> int:
    """The published hash, on Python's own integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def plain_uniform(seed: int, stream: int, counter: int, index: int) -> float:
    """What `noise.uniform` should give for one place, without tensors and without int64's wrap."""
    key = lowbias32(seed & MASK ^ stream * GOLDEN & MASK)
    key = lowbias32(key ^ seed >> 32)
    key = lowbias32(key + counter * GOLDEN & MASK)
    return ((lowbias32(lowbias32(index * GOLDEN & MASK) ^ key) >> 9) + 0.5) / 2**23


def draw(seed: int, stream: int = noise.STREAM_SAMPLING, counter: int = 0, count: int = NUM_DRAWS) -> Tensor:
    """(count,) numbers at indexes 0, 1, …"""
    low, high = (torch.tensor(part) for part in noise.split_seed(seed))
    return noise.uniform(low, high, stream, torch.tensor(counter), torch.arange(count))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])


def assert_independent(a: Tensor, b: Tensor) -> None:
    """No correlation, and every cell of a 16 × 16 grid is hit equally often (Pearson's chi-square)."""
    assert not torch.equal(a, b)
    assert abs(correlation(a, b)) < 4 / math.sqrt(NUM_DRAWS)
    cells = (a * 16).long() * 16 + (b * 16).long()
    expected = len(a) / 256
    chi_square = float(((cells.bincount(minlength=256).double() - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


def distance_from(cdf: Tensor) -> float:
    """Kolmogorov and Smirnov's distance of sorted numbers from a distribution, given its values there."""
    ideal = torch.arange(1, len(cdf) + 1, dtype=torch.float64) / len(cdf)
    return float((cdf.double() - ideal).abs().max())


@given(seeds, st.sampled_from(STREAMS), counters, counters)
@settings(deadline=None)
def test_the_hash_is_lowbias32_for_every_seed_and_place(seed: int, stream: int, counter: int, index: int) -> None:
    low, high = (torch.tensor(part) for part in noise.split_seed(seed))
    number = noise.uniform(low, high, stream, torch.tensor(counter), torch.tensor(index))
    assert number.dtype == torch.float32
    assert number.item() == plain_uniform(seed, stream, counter, index)


@given(seeds, counters)
@settings(max_examples=30, deadline=None)
def test_uniform_numbers_lie_strictly_between_zero_and_one(seed: int, counter: int) -> None:
    numbers = draw(seed, counter=counter, count=5_000)
    assert numbers.min() > 0.0
    assert numbers.max() < 1.0


@pytest.mark.parametrize("bits", [0, MASK])
def test_the_outermost_numbers_stay_inside_the_open_interval(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_hash", lambda *_: torch.tensor(bits))
    zero = torch.tensor(0)
    assert 0.0 < noise.uniform(zero, zero, 1, zero, zero).item() < 1.0
    assert torch.isfinite(noise.gumbel(zero, zero, zero, zero))


@pytest.mark.parametrize("seed", [0, 1, 2**32, MAX_SEED])
@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_numbers_are_uniform(seed: int, stream: int) -> None:
    numbers = draw(seed, stream).double()
    assert distance_from(numbers.sort().values) < 1.95 / math.sqrt(NUM_DRAWS)  # p = 0.001
    assert abs(numbers.mean().item() - 1 / 2) < 4 / math.sqrt(12 * NUM_DRAWS)
    assert abs(numbers.var().item() - 1 / 12) < 0.001


Place = tuple[int, int, int]  # seed, stream, counter


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((5, 1, 0), (5, 1, 1)),
        ((5, 1, 0), (6, 1, 0)),
        ((5, 1, 0), (5 + 2**32, 1, 0)),
        ((5, 1, 0), (5, 2, 0)),
        ((5, 3, 0), (5, 4, 0)),
    ],
    ids=["steps", "low seeds", "high seeds", "streams 1 2", "streams 3 4"],
)
def test_numbers_of_neighbouring_places_are_independent(a: Place, b: Place) -> None:
    assert_independent(draw(*a), draw(*b))


def test_numbers_of_neighbouring_indexes_are_independent() -> None:
    numbers = draw(5)
    assert_independent(numbers[:-1], numbers[1:])


def test_first_numbers_of_many_seeds_are_independent_of_the_seeds_order() -> None:
    low = torch.arange(NUM_DRAWS)
    zero = torch.tensor(0)
    numbers = noise.uniform(low, zero, noise.STREAM_SAMPLING, zero, zero)
    assert distance_from(numbers.sort().values) < 1.95 / math.sqrt(NUM_DRAWS)
    assert abs(correlation(numbers[:-1], numbers[1:])) < 4 / math.sqrt(NUM_DRAWS)


@given(st.lists(st.tuples(seeds, st.integers(0, 4000)), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_rows_numbers_depend_neither_on_its_neighbours_nor_on_their_order(rows: list[tuple[int, int]]) -> None:
    def of(batch: list[tuple[int, int]]) -> list[Tensor]:
        parts = torch.tensor([[*noise.split_seed(seed), step] for seed, step in batch])
        return list(noise.gumbel(parts[:, :1], parts[:, 1:2], parts[:, 2:], torch.arange(50).expand(len(batch), -1)))

    alone = [of([row])[0] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    for number, index in zip(of([rows[i] for i in order]), order, strict=True):
        assert torch.equal(number, alone[index])


def test_a_tokens_noise_does_not_depend_on_which_other_tokens_are_candidates() -> None:
    low, high = (torch.tensor([[part]]) for part in noise.split_seed(77))
    step = torch.tensor([[9]])
    everything = noise.gumbel(low, high, step, torch.arange(100)[None])
    some = torch.tensor([[60, 3, 99]])
    assert torch.equal(noise.gumbel(low, high, step, some), everything.gather(1, some))


def test_gumbel_noise_follows_the_gumbel_distribution() -> None:
    zero = torch.tensor(0)
    numbers = noise.gumbel(torch.tensor(3), zero, zero, torch.arange(NUM_DRAWS))
    assert distance_from((-(-numbers.double().sort().values).exp()).exp()) < 1.95 / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("seed", [0, 123, MAX_SEED])
def test_normal_noise_is_standard_normal(seed: int) -> None:
    numbers = noise.normal(seed, noise.STREAM_FLOW, (80, 1250), "cpu").flatten()
    assert numbers.dtype == torch.float32
    assert torch.isfinite(numbers).all()
    assert abs(numbers.mean().item()) < 4 / math.sqrt(NUM_DRAWS)
    assert abs(numbers.var().item() - 1) < 4 * math.sqrt(2 / NUM_DRAWS)
    assert distance_from(torch.special.ndtr(numbers.double().sort().values)) < 1.95 / math.sqrt(NUM_DRAWS)


def test_rows_times_seeds_and_streams_of_normal_noise_are_uncorrelated() -> None:
    size = (2, NUM_DRAWS)
    first = noise.normal(1, noise.STREAM_FLOW, size, "cpu")
    others = [first[1], noise.normal(2, noise.STREAM_FLOW, size, "cpu")[0]]
    others.append(noise.normal(1, noise.STREAM_SOURCE_NOISE, size, "cpu")[0])
    for other in others:
        assert abs(correlation(first[0], other)) < 4 / math.sqrt(NUM_DRAWS)
    assert abs(correlation(first[0, :-1], first[0, 1:])) < 4 / math.sqrt(NUM_DRAWS)


@given(seeds, st.integers(1, 40), st.integers(0, 500), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_later_window_continues_the_same_noise(seed: int, rows: int, offset: int, length: int) -> None:
    whole = noise.normal(seed, noise.STREAM_FLOW, (rows, offset + length), "cpu")
    window = noise.normal(seed, noise.STREAM_FLOW, (rows, length), "cpu", offset=offset)
    torch.testing.assert_close(window, whole[:, offset:], rtol=0, atol=0)


def test_leading_dimensions_count_rows_whatever_their_arrangement() -> None:
    flat = noise.normal(4, noise.STREAM_FLOW, (6, 10), "cpu")
    assert torch.equal(noise.normal(4, noise.STREAM_FLOW, (2, 3, 10), "cpu"), flat.reshape(2, 3, 10))


def test_a_seed_means_the_same_in_every_release() -> None:
    """Numbers that were published: a change of the hash would change everybody's audio."""
    assert noise.derive_seed(42, "Hello there.", 0) == 3_993_374_435_913_943_648
    assert noise.derive_seed(MAX_SEED) == 8_552_178_634_646_398_497
    assert draw(42, count=3).tolist() == [0.033041298389434814, 0.09124499559402466, 0.6720860600471497]
    normal = noise.normal(42, noise.STREAM_FLOW, (3,), "cpu").tolist()
    assert normal == pytest.approx([0.2721472680568695, 0.2969376742839813, 0.772506594657898], abs=1e-6)


@given(seeds, st.lists(st.text() | st.integers(), max_size=3))
@settings(deadline=None)
def test_derived_seeds_are_seeds(seed: int, labels: list[str | int]) -> None:
    assert 0 <= noise.derive_seed(seed, *labels) <= MAX_SEED


def test_derived_seeds_differ_with_seed_text_occurrence_and_where_labels_end() -> None:
    cases = ((1,), (2,), (1, ""), (1, "a"), (1, "b"), (1, "a", 1), (1, "a", 2), (1, "ab", "c"), (1, "a", "bc"))
    assert len({noise.derive_seed(seed, *labels) for seed, *labels in cases}) == len(cases)


def test_the_seeds_two_halves_hold_all_of_it() -> None:
    for seed in (0, 1, MASK, 2**32, MAX_SEED):
        low, high = noise.split_seed(seed)
        assert high << 32 | low == seed
        assert max(low, high) <= MASK
    assert draw(MAX_SEED, count=8).tolist() != draw(MAX_SEED - 2**62, count=8).tolist()
