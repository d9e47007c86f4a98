"""The whole engine on tiny checkpoints: what a request gets depends on nothing but the request."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Conditionals, Engine, EngineConfig, Segment, Speech, SpeechError, SpeechRequest, VoicePrompt
from engine.random_checkpoint import PlantedSpeech
from tests.engine.conftest import Checkpoint, PlantedCheckpoint

PLAN = PlantedSpeech(tokens=tuple(range(100, 140)))
TEXT = "The quick brown fox jumps over the lazy dog."
LONG_TEXT = " ".join(
    f"Sentence number {i} says that the fox went over hill and dale to find its breakfast." for i in range(12)
)


def prompt(seed: int, duration_s: float = 6.0, sample_rate: int = 24_000) -> VoicePrompt:
    """Noise in a speech-like band: enough for a voice."""
    noise = np.random.default_rng(seed).normal(0, 0.1, int(duration_s * sample_rate))
    return VoicePrompt(np.convolve(noise, np.hanning(16) / 8, "same").astype(np.float32), sample_rate)


def config(folder: Path, model: str = "turbo", **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_rows": 4,
        "watermark": False,
    }
    return EngineConfig(model=model, model_dir=folder, **(settings | changes))


@pytest.fixture(scope="module")
def turbo(planted_checkpoint: PlantedCheckpoint) -> Iterator[Engine]:
    """Ends on cue after 40 tokens, whatever it is asked."""
    with Engine.load(config(planted_checkpoint("turbo", PLAN))) as engine:
        yield engine


@pytest.fixture(scope="module")
def random_turbo(tiny_checkpoint: Checkpoint) -> Iterator[Engine]:
    """Never says the end: every chunk is cut off by its bound, and its tokens depend on everything."""
    with Engine.load(config(tiny_checkpoint("turbo"))) as engine:
        yield engine


def short(text: str = TEXT, **changes: Any) -> SpeechRequest:
    """A request that a model which never ends still answers quickly."""
    fields: dict[str, Any] = {"text": text, "seed": 7, "max_new_tokens": 12}
    return SpeechRequest(**(fields | changes))


@pytest.mark.parametrize("model", ["original", "multilingual", "multilingual-v3", "turbo", "nano"])
def test_every_family_member_speaks_what_it_was_planted_with(model: str, planted_checkpoint: PlantedCheckpoint) -> None:
    with Engine.load(config(planted_checkpoint(model, PLAN), model)) as engine:
        speech = engine.speak(SpeechRequest(text=TEXT, seed=1))
    closing = {"turbo": 3, "nano": 3, "original": 0}.get(model, -1)  # silences appended, or the last token cut
    assert speech.duration_s == pytest.approx((len(PLAN.tokens) + closing) / 25)
    assert speech.chunks[0].flags == () and speech.chunks[0].attempts == 1
    assert np.isfinite(speech.waveform).all() and np.abs(speech.waveform).max() > 1e-3
    assert speech.model == model


def test_the_same_request_and_seed_give_the_same_audio_whatever_was_asked_in_between(random_turbo: Engine) -> None:
    first = random_turbo.speak(short(voice=prompt(1)))
    random_turbo.speak(short("Something else entirely, with another voice.", voice=prompt(2), seed=8, temperature=1.3))
    again = random_turbo.speak(short(voice=prompt(1)))
    assert np.array_equal(first.waveform, again.waveform)


@pytest.mark.parametrize("change", [{"seed": 8}, {"text": "Another text."}, {"voice": prompt(2)}, {"temperature": 2.0}])
def test_seed_text_voice_and_settings_each_change_the_audio(random_turbo: Engine, change: dict[str, Any]) -> None:
    before = random_turbo.speak(short(voice=prompt(1)))
    after = random_turbo.speak(short(**({"voice": prompt(1)} | change)))
    assert before.waveform.shape != after.waveform.shape or not np.allclose(before.waveform, after.waveform)


def test_a_drawn_seed_is_named_and_gives_the_same_audio_again(random_turbo: Engine) -> None:
    drawn = random_turbo.speak(short(seed=None))
    again = random_turbo.speak(short(seed=drawn.seed))
    assert np.array_equal(drawn.waveform, again.waveform)


def test_long_text_comes_out_whole_in_order_and_with_times(turbo: Engine) -> None:
    speech = turbo.speak(SpeechRequest(text=LONG_TEXT, seed=1))
    assert " ".join(chunk.text for chunk in speech.chunks) == LONG_TEXT
    assert len(speech.chunks) > 2
    times = [t for chunk in speech.chunks for t in (chunk.start_s, chunk.end_s)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(speech.duration_s)
    assert all(chunk.end_s - chunk.start_s == pytest.approx(43 / 25, abs=1e-6) for chunk in speech.chunks)


def test_segments_speak_with_their_own_voices_and_pauses(turbo: Engine) -> None:
    segments = (Segment("One line.", voice=prompt(1), pause_after_s=1.5), Segment("Another line.", voice=prompt(2)))
    speech = turbo.speak(SpeechRequest(segments=segments, seed=1))
    first, second = speech.chunks
    assert second.start_s - first.end_s == pytest.approx(1.5, abs=1e-4)
    gap = speech.waveform[round(first.end_s * 24_000) : round(second.start_s * 24_000)]
    assert not gap.any()


def test_many_requests_at_once_each_get_their_own_greedy_audio(random_turbo: Engine) -> None:
    requests = [short(f"Text number {i} is about {i * 7} foxes.", voice=prompt(i % 3), top_k=1) for i in range(10)]
    alone = [random_turbo.speak(request) for request in requests]
    together = [future.result() for future in [random_turbo.submit(request) for request in requests]]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.waveform, other.waveform, atol=1e-3)


def test_a_voice_used_before_costs_no_conditioning(random_turbo: Engine) -> None:
    random_turbo.speak(short(voice=prompt(5)))
    before = random_turbo.stats()
    random_turbo.speak(short("Again.", voice=prompt(5)))
    after = random_turbo.stats()
    for cache in ("conditionals_cache", "prefix_cache"):
        assert after[cache]["misses"] == before[cache]["misses"]
        assert after[cache]["hits"] > before[cache]["hits"]


def test_ready_conditionals_speak_as_their_prompt_does(random_turbo: Engine) -> None:
    conditionals = random_turbo.embed(prompt(1))
    read_back = Conditionals.from_bytes(conditionals.to_bytes())
    spoken = [random_turbo.speak(short(voice=voice)).waveform for voice in (prompt(1), read_back)]
    assert np.array_equal(spoken[0], spoken[1])


def test_conditionals_of_another_checkpoint_are_refused(random_turbo: Engine, turbo: Engine) -> None:
    with pytest.raises(SpeechError, match="made for") as caught:
        random_turbo.speak(short(voice=turbo.embed(prompt(1))))
    assert caught.value.code == "invalid_request"


def test_one_prompt_asked_for_by_many_at_once_is_embedded_once(planted_checkpoint: PlantedCheckpoint) -> None:
    with Engine.load(config(planted_checkpoint("turbo", PLAN))) as engine:
        futures = [engine.submit(SpeechRequest(text=f"Text {i}.", voice=prompt(1))) for i in range(6)]
        for future in futures:
            future.result()
        assert engine.stats()["conditionals_cache"]["misses"] == 1


def test_a_parameter_that_the_model_lacks_is_a_warning(turbo: Engine) -> None:
    speech = turbo.speak(SpeechRequest(text=TEXT, exaggeration=0.7, cfg_weight=0.3))
    assert any("exaggeration" in warning for warning in speech.warnings)
    assert any("cfg_weight" in warning for warning in speech.warnings)
    assert not turbo.speak(SpeechRequest(text=TEXT, top_p=0.9)).warnings


def test_guidance_can_be_turned_off_and_changes_the_speech(tiny_checkpoint: Checkpoint) -> None:
    with Engine.load(config(tiny_checkpoint("original"), "original")) as engine:
        guided, unguided = (engine.speak(short(cfg_weight=weight, max_new_tokens=6)) for weight in (0.5, 0.0))
    assert not np.allclose(guided.waveform, unguided.waveform)


@pytest.mark.parametrize(
    ("request_fields", "code"),
    [
        ({"text": " "}, "text_empty"),
        ({"text": "🙂🙂"}, "text_empty"),
        ({"text": "\x00\x07"}, "text_empty"),
        ({"text": TEXT, "language": "xx"}, "language_unsupported"),
        ({"text": TEXT, "voice": prompt(1, 0.3)}, "reference_too_short"),
        ({"text": TEXT, "voice": VoicePrompt(np.zeros(200_000, np.float32), 24_000)}, "reference_silent"),
        ({"text": TEXT, "temperature": float("nan")}, "invalid_request"),
        ({"text": TEXT, "top_k": True}, "invalid_request"),
        ({"text": TEXT, "seed": -1}, "invalid_request"),
        ({}, "invalid_request"),
        ({"text": TEXT, "segments": (Segment("x"),)}, "invalid_request"),
    ],
)
def test_a_bad_request_gets_its_code_and_the_next_one_is_served(
    turbo: Engine, request_fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(SpeechError) as caught:
        turbo.speak(SpeechRequest(**request_fields))
    assert caught.value.code == code
    assert turbo.speak(SpeechRequest(text=TEXT)).duration_s > 1


def test_bad_conditionals_fail_their_request_alone(random_turbo: Engine) -> None:
    good = random_turbo.embed(prompt(1))
    broken = Conditionals(
        key="broken",
        model_key=good.model_key,
        speaker_embedding=np.full_like(good.speaker_embedding, np.nan),
        t3_prompt_tokens=good.t3_prompt_tokens,
        s3_prompt_tokens=good.s3_prompt_tokens,
        s3_prompt_mel=good.s3_prompt_mel,
        s3_embedding=good.s3_embedding,
    )
    expected = random_turbo.speak(short(voice=good, top_k=1))
    futures = [random_turbo.submit(short(voice=voice, top_k=1)) for voice in (good, broken, good)]
    with pytest.raises(SpeechError) as caught:
        futures[1].result()
    assert caught.value.code == "generation_failed"
    for future in (futures[0], futures[2]):
        np.testing.assert_allclose(future.result().waveform, expected.waveform, atol=1e-3)


def test_a_model_that_never_ends_is_cut_off_tried_again_and_flagged(random_turbo: Engine) -> None:
    chunk = random_turbo.speak(short()).chunks[0]
    assert chunk.attempts == 3
    assert "no_end" in chunk.flags


def test_a_looping_model_is_stopped_long_before_its_bound(planted_checkpoint: PlantedCheckpoint) -> None:
    plan = PlantedSpeech(tokens=tuple(range(10)), ends=False)
    with Engine.load(config(planted_checkpoint("turbo", plan))) as engine:
        speech = engine.speak(SpeechRequest(text=LONG_TEXT[:250], seed=1))
    assert "repetition" in speech.chunks[0].flags
    assert speech.duration_s < 4


def test_cancelling_at_any_time_frees_the_rows_and_harms_no_other(random_turbo: Engine) -> None:
    chance = random.Random(3)
    expected = random_turbo.speak(short(top_k=1)).waveform
    cancelled: list[Future[Speech]] = []
    kept: list[Future[Speech]] = []
    for i in range(40):
        if chance.random() < 0.3:
            cancelled.append(random_turbo.submit(short(LONG_TEXT, seed=i, max_new_tokens=60)))
            timer = threading.Timer(chance.random() * 0.3, cancelled[-1].cancel)
            timer.start()
        else:
            kept.append(random_turbo.submit(short(top_k=1)))
    for future in kept:
        np.testing.assert_allclose(future.result().waveform, expected, atol=1e-3)
    for future in cancelled:
        with pytest.raises(CancelledError):
            future.result()
    wait_until_idle(random_turbo)


def wait_until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while any(engine.stats()["core"][name] for name in ("num_utterances", "num_waiting_chunks", "num_decoding_chunks")):
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)


def test_two_engines_share_no_state(planted_checkpoint: PlantedCheckpoint, tiny_checkpoint: Checkpoint) -> None:
    with Engine.load(config(tiny_checkpoint("turbo"))) as alone:
        expected = alone.speak(short(voice=prompt(1))).waveform
    with (
        Engine.load(config(planted_checkpoint("turbo", PLAN))) as one,
        Engine.load(config(tiny_checkpoint("turbo"))) as other,
    ):
        first = one.submit(SpeechRequest(text=TEXT, voice=prompt(1)))
        second = other.submit(short(voice=prompt(1)))
        assert first.result().duration_s == pytest.approx(43 / 25)
        assert np.array_equal(second.result().waveform, expected)
        assert one.stats()["core"]["num_retries"] == 0


def test_closing_cancels_what_runs_or_drains_it(planted_checkpoint: PlantedCheckpoint) -> None:
    folder = planted_checkpoint("turbo", PLAN)
    engine = Engine.load(config(folder))
    futures = [engine.submit(SpeechRequest(text=LONG_TEXT)) for _ in range(3)]
    engine.close()
    for future in futures:
        with pytest.raises(SpeechError) as caught:
            future.result()
        assert caught.value.code == "cancelled"
    with pytest.raises(SpeechError):
        engine.submit(SpeechRequest(text=TEXT))
    engine = Engine.load(config(folder))
    futures = [engine.submit(SpeechRequest(text=TEXT)) for _ in range(3)]
    engine.close(drain=True)
    assert all(future.result().duration_s > 1 for future in futures)


def test_delivered_audio_is_marked_and_the_mark_is_found(planted_checkpoint: PlantedCheckpoint) -> None:
    with Engine.load(config(planted_checkpoint("turbo", PLAN), watermark=True)) as engine:
        assert engine.speak(SpeechRequest(text=TEXT)).watermarked


def test_a_checkpoint_without_a_voice_of_its_own_asks_for_one(
    planted_checkpoint: PlantedCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = planted_checkpoint("turbo", PLAN)
    folder = tmp_path_factory.mktemp("voiceless")
    for path in source.iterdir():
        if path.name != "conds.pt":
            (folder / path.name).symlink_to(path)
    with Engine.load(config(folder)) as engine:
        with pytest.raises(SpeechError, match="no built-in voice"):
            engine.speak(SpeechRequest(text=TEXT))
        assert engine.speak(SpeechRequest(text=TEXT, voice=prompt(1))).duration_s > 1
