"""Rows join and leave without touching their neighbours, end when they should, and leave nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.kernels import DecodeAttention, attend, can_compile
from engine.models import STOP_SPEECH_TOKEN, get_model
from engine.random_checkpoint import PlantedSpeech
from engine.t3.decoder import Decoder, DecodeRequest
from engine.t3.model import T3, load_t3
from tests.engine.conftest import Checkpoint, LoadT3
from tests.engine.support import (
    GREEDY,
    NO_TOP_K,
    decode,
    defaults,
    finish,
    make_decoder,
    random_prefix,
    text_tokens,
)

PLAN = PlantedSpeech(tokens=tuple(range(100, 130)))
FAMILIES = pytest.mark.parametrize("model", ["turbo", "original"])


def varied_requests(decoder: Decoder, model: str) -> list[DecodeRequest]:
    """Chunks unlike each other in voice, text, settings, seed, length and (with guidance) number of rows."""
    greedy = GREEDY[decoder.model.shape.kind]
    wild = defaults(model, temperature=1.3, top_p=0.9, repetition_penalty=2.0)
    settings = [greedy, defaults(model), wild, dataclasses.replace(greedy, cfg_weight=0.0, repetition_penalty=1.5)]
    shapes = [(30, 3, 14), (80, 60, 6), (11, 20, 20), (55, 9, 10)]  # prompt, text, new tokens
    return [
        DecodeRequest(
            random_prefix(decoder, num_prompt, seed=index),
            text_tokens(decoder.model, num_text, seed=index),
            settings[index],
            seed=1000 + index,
            max_new_tokens=max_new_tokens,
        )
        for index, (num_prompt, num_text, max_new_tokens) in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def alone(tiny_t3: LoadT3) -> Callable[[str], list[list[int]]]:
    """model name → what each of `varied_requests` gives in a decoder of its own, a bound of 30 tokens all."""

    @functools.cache
    def decode_each(model: str) -> list[list[int]]:
        t3 = tiny_t3(model)
        requests = varied_requests(make_decoder(t3), model)
        return [tokens_alone(t3, dataclasses.replace(request, max_new_tokens=30)) for request in requests]

    return decode_each


Alone = Callable[[str], list[list[int]]]


def one_request(decoder: Decoder, model: str, num_text: int = 8, max_new_tokens: int = 12) -> DecodeRequest:
    text = text_tokens(decoder.model, num_text)
    return DecodeRequest(random_prefix(decoder), text, defaults(model), 7, max_new_tokens)


def tokens_alone(t3: T3, request: DecodeRequest) -> list[int]:
    """What a chunk gives in a decoder of its own."""
    (row,) = decode(make_decoder(t3, num_rows=2), request)
    return row.tokens.tolist()


def admit(decoder: Decoder, request: DecodeRequest) -> int:
    handle = decoder.admit(request)
    assert handle is not None
    return handle


# ------------------------------------------------------------------------------------------- neighbours


@FAMILIES
def test_a_row_gives_the_same_tokens_alone_and_beside_any_others(model: str, tiny_t3: LoadT3, alone: Alone) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=8)
    requests = varied_requests(decoder, model)
    expected = [tokens[: r.max_new_tokens] for tokens, r in zip(alone(model), requests, strict=True)]
    assert [len(tokens) for tokens in expected] == [14, 6, 20, 10], "random weights do not stop"
    together = [row.tokens.tolist() for row in decode(decoder, *requests)]
    reversed_ = [row.tokens.tolist() for row in decode(decoder, *requests[::-1])][::-1]
    assert together == expected
    assert reversed_ == expected


@FAMILIES
def test_chunks_that_join_and_leave_half_way_change_nothing_for_the_others(
    model: str, tiny_t3: LoadT3, alone: Alone
) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=8)
    first, second, third, fourth = varied_requests(decoder, model)
    kept = [admit(decoder, first), admit(decoder, third)]
    decoder.step(3)
    cancelled = admit(decoder, second)
    decoder.step(4)
    decoder.release(cancelled)
    kept.append(admit(decoder, fourth))
    rows = finish(decoder, *kept)
    expected = alone(model)
    assert [row.tokens.tolist() for row in rows] == [expected[0][:14], expected[2][:20], expected[3][:10]]
    assert decoder.is_idle


@FAMILIES
@pytest.mark.skipif(not can_compile(), reason="needs the CPU kernels")
def test_in_float16_too_a_row_gives_the_same_tokens_alone_beside_others_and_joining_half_way(
    model: str, tiny_checkpoint: Checkpoint
) -> None:
    t3 = load_t3(tiny_checkpoint(model) / get_model(model).t3_file, torch.device("cpu"), torch.float16)

    def new_decoder() -> Decoder:
        return Decoder(t3, num_rows=8, length=640, max_new_tokens=64, cache_dtype=torch.float16)

    decoder = new_decoder()
    requests = varied_requests(decoder, model)
    expected = [decode(new_decoder(), request)[0].tokens.tolist() for request in requests]
    assert [row.tokens.tolist() for row in decode(decoder, *requests)] == expected
    first, second, third, fourth = requests
    gone, kept = admit(decoder, second), [admit(decoder, first)]
    decoder.step(3)
    kept.append(admit(decoder, third))
    decoder.step(2)
    decoder.release(gone)
    decoder.step(2)  # the third moves down
    kept.append(admit(decoder, fourth))
    assert [row.tokens.tolist() for row in finish(decoder, *kept)] == [expected[0], expected[2], expected[3]]


@FAMILIES
@pytest.mark.skipif(not can_compile(), reason="needs the CPU kernels")
def test_the_kernels_have_room_for_a_row_whose_long_text_waits_below_those_that_run(
    model: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    t3 = load_t3(tiny_checkpoint(model) / get_model(model).t3_file, torch.device("cpu"), torch.float16)
    decoder = Decoder(t3, num_rows=4, length=900, max_new_tokens=64, cache_dtype=torch.float16, prefill_budget=8)
    short = one_request(decoder, model)
    long = dataclasses.replace(short, text_tokens=text_tokens(t3, 600))
    short_most = decoder.length_needed(short)
    beyond: list[bool] = []

    def watched(step: DecodeAttention, length: int) -> torch.Tensor:
        assert int(step.positions.max()) < length, (step.positions, length)  # else it writes over other memory
        beyond.append(int(step.positions.max()) > short_most)
        return attend(step, length)

    monkeypatch.setattr("engine.t3.backbone.attend", watched)
    gone, kept = admit(decoder, short), admit(decoder, short)
    decoder.step(2)
    decoder.release(gone)
    admit(decoder, long)  # below the one that runs, and beside it its text is read piece by piece
    decoder.step(2)
    assert len(finish(decoder, kept)[0].tokens) > 0
    assert any(beyond)


@FAMILIES
@pytest.mark.parametrize("budget", [5, 64])
def test_a_text_prefilled_in_pieces_beside_running_rows_gives_the_same_tokens(
    model: str, budget: int, tiny_t3: LoadT3, alone: Alone
) -> None:
    decoder = Decoder(tiny_t3(model), num_rows=8, length=640, max_new_tokens=64, prefill_budget=budget)
    first, second, third, fourth = varied_requests(decoder, model)
    first = dataclasses.replace(first, max_new_tokens=30)
    gone = admit(decoder, first)
    handles = [admit(decoder, first)]
    decoder.step()
    decoder.release(gone)  # so that chunks join below a running row, not only above
    handles += [admit(decoder, request) for request in (second, third, fourth)]
    rows = finish(decoder, *handles, stride=1)
    bounds = (30, 6, 20, 10)
    assert [row.tokens.tolist() for row in rows] == [
        tokens[:bound] for tokens, bound in zip(alone(model), bounds, strict=True)
    ]


@FAMILIES
def test_a_chunk_that_waits_for_its_text_counts_no_token_as_said(model: str, tiny_t3: LoadT3) -> None:
    """At this temperature and penalty a planted token is certain while it is new, and lost once it counts as said."""
    decoder = Decoder(tiny_t3(model, PLAN), num_rows=4, length=640, max_new_tokens=64, prefill_budget=3)
    settings = defaults(model, temperature=5.0, repetition_penalty=5.0, top_p=1.0, min_p=0.0, top_k=NO_TOP_K)
    request = dataclasses.replace(one_request(decoder, model, max_new_tokens=10), settings=settings)
    gone, running = admit(decoder, request), admit(decoder, dataclasses.replace(request, max_new_tokens=60))
    decoder.step()
    decoder.release(gone)
    waiting = admit(decoder, request)
    rows = finish(decoder, running, waiting, stride=1)
    assert rows[1].tokens.tolist() == list(PLAN.tokens[:10])


@FAMILIES
def test_rows_that_move_up_when_others_leave_give_the_same_tokens(model: str, tiny_t3: LoadT3, alone: Alone) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=8)
    requests = [dataclasses.replace(request, max_new_tokens=30) for request in varied_requests(decoder, model)]
    handles = [admit(decoder, request) for request in requests]
    decoder.step(5)
    for handle in handles[:2]:
        decoder.release(handle)
        decoder.step(5)
    rows = finish(decoder, *handles[2:])
    assert [row.tokens.tolist() for row in rows] == alone(model)[2:]


@FAMILIES
def test_a_row_is_free_again_and_nothing_of_its_last_chunk_is_left(model: str, tiny_t3: LoadT3, alone: Alone) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=2)
    requests = varied_requests(decoder, model)
    for index in (1, 2, 0, 3):
        (row,) = decode(decoder, requests[index])
        assert row.tokens.tolist() == alone(model)[index][: requests[index].max_new_tokens]


@FAMILIES
def test_a_cancelled_chunk_frees_its_rows_at_any_time(model: str, tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=2)
    request = one_request(decoder, model)
    for num_steps in (0, 1, 5):
        handle = admit(decoder, request)
        decoder.step(num_steps)
        decoder.release(handle)
        decoder.step(2)  # an idle decoder has nothing to do
        assert decoder.is_idle
        assert decoder.read() == {}
        assert decoder.num_adjacent_free_rows == 2


@FAMILIES
def test_a_voice_serves_many_chunks_and_stays_as_it_was(model: str, tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3(model))
    request = one_request(decoder, model)
    keys, values = request.prefix.keys.clone(), request.prefix.values.clone()
    first, second = decode(decoder, request, request)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert torch.equal(request.prefix.keys, keys)
    assert torch.equal(request.prefix.values, values)


@FAMILIES
def test_the_seed_decides_the_tokens_and_gives_them_again(model: str, tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=6)
    request = one_request(decoder, model)
    row, again, other = decode(decoder, request, request, dataclasses.replace(request, seed=8))
    assert again.tokens.tolist() == row.tokens.tolist()
    assert other.tokens.tolist() != row.tokens.tolist()


# ------------------------------------------------------------------------------------------- endings


@FAMILIES
@pytest.mark.parametrize("stride", [3, 40])
def test_rows_that_have_ended_stand_still_while_others_go_on(model: str, stride: int, tiny_t3: LoadT3) -> None:
    t3 = tiny_t3(model)
    decoder = make_decoder(t3)
    short = one_request(decoder, model, max_new_tokens=5)
    long = dataclasses.replace(short, max_new_tokens=24)
    handles = [admit(decoder, short), admit(decoder, long)]
    for _ in range(0, 36, stride):
        decoder.step(stride)
    rows = decoder.read()
    assert all(rows[handle].has_ended and not rows[handle].has_stopped for handle in handles)
    assert len(rows[handles[0]].tokens) == 5
    assert len(rows[handles[1]].tokens) == 24
    assert rows[handles[0]].tokens.tolist() == rows[handles[1]].tokens[:5].tolist()


@pytest.mark.parametrize("model", ["turbo", "original", "multilingual"])
@pytest.mark.parametrize("is_greedy", [True, False])
def test_planted_speech_is_said_to_its_stop(model: str, is_greedy: bool, tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3(model, PLAN))
    settings = GREEDY[decoder.model.shape.kind] if is_greedy else defaults(model)
    request = dataclasses.replace(one_request(decoder, model, max_new_tokens=60), settings=settings)
    (row,) = decode(decoder, request)
    assert row.tokens.tolist() == list(PLAN.tokens)
    assert (row.has_ended, row.has_stopped, row.is_broken) == (True, True, False)
    assert row.tokens.dtype == np.int32


@FAMILIES
@pytest.mark.parametrize(("bound", "has_stopped"), [(1, False), (29, False), (30, False), (31, True), (64, True)])
def test_a_row_gives_no_more_than_its_bound_and_says_whether_it_stopped(
    model: str, bound: int, has_stopped: bool, tiny_t3: LoadT3
) -> None:
    decoder = make_decoder(tiny_t3(model, PLAN))
    (row,) = decode(decoder, one_request(decoder, model, max_new_tokens=bound))
    assert row.tokens.tolist() == list(PLAN.tokens[:bound])
    assert row.has_stopped == has_stopped
    assert STOP_SPEECH_TOKEN not in row.tokens


@FAMILIES
def test_a_chunk_that_needs_the_whole_cache_is_decoded_and_stands_still_at_its_end(model: str, tiny_t3: LoadT3) -> None:
    t3 = tiny_t3(model)
    wide = make_decoder(t3)
    request = one_request(wide, model, num_text=30, max_new_tokens=12)
    exact = make_decoder(t3, num_rows=2, length=wide.length_needed(request), max_new_tokens=12)
    handle = admit(exact, request)
    exact.step(40)
    assert exact.read()[handle].tokens.tolist() == tokens_alone(t3, request)


def test_a_chunk_too_long_for_the_cache_or_the_rows_is_refused(tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3("turbo"), length=64, max_new_tokens=20)
    request = one_request(decoder, "turbo", max_new_tokens=20)
    with pytest.raises(AssertionError):
        decoder.admit(dataclasses.replace(request, max_new_tokens=21))
    with pytest.raises(AssertionError):
        decoder.admit(dataclasses.replace(request, text_tokens=np.ones(40, np.int32)))
    assert decoder.is_idle


@FAMILIES
def test_steps_at_once_are_steps_one_by_one(model: str, tiny_t3: LoadT3) -> None:
    t3 = tiny_t3(model)
    decoder = make_decoder(t3)
    request = one_request(decoder, model)
    handle = admit(decoder, request)
    lengths = []
    for _ in range(6):
        decoder.step()
        lengths.append(len(decoder.read()[handle].tokens))
    assert lengths == [1, 2, 3, 4, 5, 6]
    (row,) = finish(decoder, handle)
    assert row.tokens.tolist() == tokens_alone(t3, request)


# ------------------------------------------------------------------------------------------- broken rows


@FAMILIES
def test_conditionals_that_are_not_finite_break_their_own_row_only(model: str, tiny_t3: LoadT3, alone: Alone) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=8)
    good, also_good, *_ = varied_requests(decoder, model)
    bad = dataclasses.replace(
        good, prefix=dataclasses.replace(good.prefix, keys=torch.full_like(good.prefix.keys, torch.nan))
    )
    rows = decode(decoder, good, bad, also_good)
    assert [row.is_broken for row in rows] == [False, True, False]
    assert rows[1].has_ended
    assert rows[0].tokens.tolist() == alone(model)[0][:14]
    assert rows[2].tokens.tolist() == alone(model)[1][:6]


@FAMILIES
def test_weights_that_are_not_finite_break_only_the_rows_that_use_them(model: str, tiny_t3: LoadT3) -> None:
    healthy = tiny_t3(model)
    damaged = copy.copy(healthy)  # oneDNN's layouts cannot be copied: all but the text embedding is shared
    damaged._modules = dict(healthy._modules)
    damaged.text_embedding = torch.nn.Embedding.from_pretrained(healthy.text_embedding.weight.clone())
    damaged.text_embedding.weight.data[300] = torch.nan
    decoder = make_decoder(damaged, num_rows=8)
    good = one_request(decoder, model)
    assert 300 not in good.text_tokens
    bad = dataclasses.replace(good, text_tokens=np.insert(good.text_tokens, 2, 300))
    rows = decode(decoder, bad, good)
    assert [row.is_broken for row in rows] == [True, False]
    assert rows[1].tokens.tolist() == tokens_alone(healthy, good)


@FAMILIES
def test_a_row_that_broke_serves_the_next_chunk_as_if_nothing_had_been(model: str, tiny_t3: LoadT3) -> None:
    t3 = tiny_t3(model)
    decoder = make_decoder(t3, num_rows=2)
    good = one_request(decoder, model)
    long = one_request(decoder, model, num_text=50)
    prefix = dataclasses.replace(long.prefix, values=torch.full_like(long.prefix.values, torch.nan))
    (broken,) = decode(decoder, dataclasses.replace(long, prefix=prefix))
    (row,) = decode(decoder, good)
    assert broken.is_broken
    assert not row.is_broken
    assert row.tokens.tolist() == tokens_alone(t3, good)


# ------------------------------------------------------------------------------------------- room


def test_pairs_and_single_rows_fill_all_rows_and_no_more(tiny_t3: LoadT3) -> None:
    decoder = make_decoder(tiny_t3("original"), num_rows=6)
    pair = one_request(decoder, "original")
    single = dataclasses.replace(pair, settings=defaults("original", cfg_weight=0.0))
    assert (decoder.rows_for(pair.settings), decoder.rows_for(single.settings)) == (2, 1)
    for request, free_after in [(single, 2), (pair, 2), (single, 2), (single, 1)]:
        admit(decoder, request)
        assert decoder.num_adjacent_free_rows == free_after
    assert decoder.admit(pair) is None
    admit(decoder, single)
    assert decoder.num_adjacent_free_rows == 0
    assert decoder.admit(single) is None
    assert len(decoder.read()) == 5


@FAMILIES
def test_no_row_is_lost_and_none_is_given_twice_in_200_random_admissions(model: str, tiny_t3: LoadT3) -> None:
    t3, num_rows, chance = tiny_t3(model), 6, random.Random(5)
    decoder = make_decoder(t3, num_rows=num_rows, length=256)
    request = one_request(decoder, model, num_text=2, max_new_tokens=3)
    variants = [request, dataclasses.replace(request, settings=dataclasses.replace(request.settings, cfg_weight=0.0))]
    held: dict[int, DecodeRequest] = {}
    num_admitted = 0
    while num_admitted < 200:
        wanted = chance.choice(variants)
        handle = decoder.admit(wanted)
        if handle is not None:
            assert handle not in held
            held[handle] = wanted
            num_admitted += 1
        assert sum(decoder.rows_for(r.settings) for r in held.values()) <= num_rows
        if chance.random() < 0.2:
            decoder.step(chance.randrange(3))
        assert decoder.read().keys() == held.keys()
        for gone in chance.sample(sorted(held), chance.randrange(3) if len(held) > 2 else 0):
            decoder.release(gone)
            del held[gone]
    for handle in held:
        decoder.release(handle)
    assert decoder.is_idle
    assert decoder.read() == {}
    one_row_each = [decoder.admit(variants[1]) for _ in range(num_rows + 1)]
    assert [handle is None for handle in one_row_each] == [False] * num_rows + [True]


@FAMILIES
def test_a_decoder_that_shrinks_forgets_its_chunks_and_goes_on_with_half_the_rows(
    model: str, tiny_t3: LoadT3, alone: Alone
) -> None:
    decoder = make_decoder(tiny_t3(model), num_rows=8)
    first, second, *_ = varied_requests(decoder, model)
    admit(decoder, first)
    decoder.step(2)
    sizes = [decoder.num_rows]
    while decoder.shrink():
        assert decoder.is_idle
        sizes.append(decoder.num_rows)
    assert sizes == [8, 4, 2, 1][: 4 - decoder.model.uses_guidance]
    (row,) = decode(decoder, second)
    assert row.tokens.tolist() == alone(model)[1][:6]
