"""The CPU kernels: exact against torch in float64, for both kinds of registers, and the same in any batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import DecodeAttention, HalfMatrix, Vectors, attend, attend_fully, can_compile, product, snake
from engine.kernels.compiler import AVX2, AVX512, host_vectors

pytestmark = pytest.mark.skipif(not can_compile(), reason="the kernels need Linux on x86 with AVX2, and libgomp")

# The narrower kind runs on a CPU that has the wider.
VECTORS = [
    pytest.param(AVX2, id="avx2"),
    pytest.param(
        AVX512,
        id="avx512",
        marks=pytest.mark.skipif(not can_compile() or host_vectors() != AVX512, reason="this CPU has no AVX-512"),
    ),
]
SHAPES = [(96, 64), (100, 33), (31, 7), (1, 1), (640, 512)]


TorchThreads = Callable[[int], None]


@pytest.fixture
def torch_threads() -> Iterator[TorchThreads]:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_rounded_weights(vectors: Vectors, shape: tuple[int, int]) -> None:
    weight, bias, x = random(*shape), random(shape[0], seed=1), random(3, 11, shape[1], seed=2)
    expected = F.linear(x.double(), weight.half().double(), bias.double())
    result = product(x, HalfMatrix.pack(weight, bias, vectors))
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_product_is_the_same_bit_for_bit_whatever_its_neighbours(
    vectors: Vectors, shape: tuple[int, int]
) -> None:
    matrix, x = HalfMatrix.pack(random(*shape), None, vectors), random(61, shape[1], seed=1)
    together = product(x, matrix)
    for num_rows in (*range(1, 27), 47, 48, 60):
        assert torch.equal(product(x[:num_rows], matrix), together[:num_rows]), num_rows
        assert torch.equal(product(x[-num_rows:], matrix), together[-num_rows:]), num_rows


def test_a_transposed_weight_packs_to_the_same_tiles() -> None:
    weight = random(100, 33)
    plain, transposed = (HalfMatrix.pack(w, None) for w in (weight, weight.T.contiguous().T))
    assert torch.equal(plain.tiles, transposed.tiles)


def attention_step(rows: int, heads: int, length: int, positions: list[int]) -> DecodeAttention:
    query, key, value = random(rows, 1, 3, heads, 64).permute(2, 0, 3, 1, 4)
    cache = random(2, rows + 1, heads, length, 64, seed=1).half()
    return DecodeAttention(query, key, value, cache[0], cache[1], torch.tensor(positions))


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize(
    ("rows", "heads", "length", "positions"),
    [
        (1, 4, 9, [8]),
        (3, 16, 700, [0, 350, 699]),
        (5, 2, 64, [0, 1, 2, 3, 4]),
        (2, 16, 1, [0, 0]),
        (2, 3, 40, [15, 16]),
    ],
)
def test_attention_is_that_of_the_positions_a_row_sees_and_writes_the_new_one(
    vectors: Vectors, rows: int, heads: int, length: int, positions: list[int]
) -> None:
    step = attention_step(rows, heads, length, positions)
    keys, values = step.keys.clone(), step.values.clone()
    result = attend(step, length, vectors)
    for row, position in enumerate(positions):
        keys[row, :, position], values[row, :, position] = step.key[row, :, 0].half(), step.value[row, :, 0].half()
        seen_keys, seen_values = (cache[row, :, : position + 1].double() for cache in (keys, values))
        expected = F.scaled_dot_product_attention(step.query[row].double(), seen_keys, seen_values)
        torch.testing.assert_close(result[row].double(), expected.flatten(), atol=2e-6, rtol=1e-5)
    assert torch.equal(step.keys, keys) and torch.equal(step.values, values)


@pytest.mark.parametrize("vectors", VECTORS)
def test_attention_far_apart_scores_do_not_overflow(vectors: Vectors) -> None:
    step = attention_step(1, 1, 40, [39])
    step.keys[:] = 0.0
    step.keys[0, 0, 7] = step.query[0, 0, 0].half() * 300  # one position takes all the weight
    step.values[0, 0, 7] = 5.0
    torch.testing.assert_close(attend(step, 40, vectors), torch.full((1, 64), 5.0))


@pytest.mark.parametrize("what", ["query", "keys", "values"])
def test_a_nan_in_one_row_shows_there_and_nowhere_else(what: str) -> None:
    step = attention_step(3, 2, 20, [4, 9, 19])
    clean = attend(step, 20)
    getattr(step, what)[1, :, 0] = torch.nan
    result = attend(step, 20)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


def test_what_lies_beyond_a_rows_position_is_not_read() -> None:
    step = attention_step(2, 2, 20, [4, 9])
    clean = attend(step, 20)
    for row, position in enumerate(step.positions.tolist()):
        step.keys[row, :, position + 1 :] = step.values[row, :, position + 1 :] = torch.nan
    assert torch.equal(attend(step, 20), clean)


def frames(rows: int, heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = random(rows, length, 3, heads, 64).permute(2, 0, 3, 1, 4)
    return query, key, value


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize(
    ("heads", "length", "lengths"),
    [(8, 200, [200]), (2, 65, [65, 30, 1]), (1, 6, [6, 5]), (1, 64, [64]), (3, 129, [7, 129])],
)
def test_full_attention_is_torchs_over_the_frames_that_are_real(
    vectors: Vectors, num_threads: int, heads: int, length: int, lengths: list[int], torch_threads: TorchThreads
) -> None:
    torch_threads(num_threads)
    query, key, value = frames(len(lengths), heads, length)
    result = attend_fully(query, key, value, torch.tensor(lengths), vectors)
    for row, real in enumerate(lengths):
        seen_keys, seen_values = (tensor[row, :, :real].double() for tensor in (key, value))
        expected = F.scaled_dot_product_attention(query[row].double(), seen_keys, seen_values)
        expected = expected.transpose(0, 1).flatten(1)
        torch.testing.assert_close(result[row].double(), expected, atol=3e-6, rtol=1e-5)


def test_a_rows_full_attention_is_the_same_bit_for_bit_whatever_its_neighbours() -> None:
    query, key, value = frames(4, 2, 150)
    together = attend_fully(query, key, value, torch.tensor([150, 149, 70, 1]))
    for row, real in enumerate((150, 149, 70, 1)):
        alone = attend_fully(query[[row]], key[[row]], value[[row]], torch.tensor([real]))
        assert torch.equal(alone[0], together[row])


def test_padding_reaches_no_real_frame() -> None:
    query, key, value = frames(1, 2, 150)
    clean = attend_fully(query, key, value, torch.tensor([90]))
    for tensor in (query, key, value):
        tensor[:, :, 90:] = torch.nan
    assert torch.equal(attend_fully(query, key, value, torch.tensor([90]))[:, :90], clean[:, :90])


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("length", [1, 7, 8, 16, 33, 1000])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_activation_is_what_its_formula_says_for_any_length(vectors: Vectors, length: int, in_place: bool) -> None:
    x, alpha = random(2, 5, length) * 20, torch.tensor([0.05, 0.5, 1.0, 3.0, -2.0])
    wide = alpha.double()[:, None]
    expected = x.double() + (x.double() * wide).sin().square() / (wide + 1e-9)
    before = x.clone()
    result = snake(x, alpha, in_place=in_place, vectors=vectors)
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=1e-6)
    assert (result.data_ptr() == x.data_ptr()) is in_place
    assert in_place or torch.equal(x, before)


def test_the_activation_of_a_row_is_the_same_bit_for_bit_whatever_its_neighbours() -> None:
    x, alpha = random(6, 3, 77) * 5, torch.tensor([0.3, 1.0, 2.0])
    together = snake(x, alpha)
    for row in range(6):
        assert torch.equal(snake(x[row : row + 1].contiguous(), alpha)[0], together[row])


def test_the_activation_of_what_is_no_number_is_no_number_and_nothing_else_is_touched() -> None:
    x = random(1, 2, 40)
    x[0, 0, 3], x[0, 1, 39] = float("nan"), float("inf")
    result = snake(x, torch.ones(2))
    assert not torch.isfinite(result[0, 0, 3]) and not torch.isfinite(result[0, 1, 39])
    assert int(torch.isfinite(result).sum()) == 78


def test_kernels_run_from_several_threads_at_once() -> None:
    matrix, x = HalfMatrix.pack(random(640, 512), None), random(5, 512, seed=1)
    expected, results = product(x, matrix), list[torch.Tensor]()
    threads = [threading.Thread(target=lambda: results.extend(product(x, matrix) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200 and all(torch.equal(result, expected) for result in results)
