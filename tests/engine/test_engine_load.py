"""The engine under load and in want: nothing leaks, nothing is lost, memory that runs out costs rows, not jobs."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import Engine, EngineConfig, Speech, SpeechError, SpeechRequest, VoicePrompt
from engine.core import Core
from engine.engine import Engine as LoadedEngine
from engine.random_checkpoint import PlantedSpeech
from engine.s3gen.renderer import Pass, Renderer
from engine.t3.decoder import Decoder
from tests.engine.conftest import Checkpoint, PlantedCheckpoint

PLAN = PlantedSpeech(tokens=tuple(range(200, 222)))
SENTENCES = ("The fox ran.", "It was a bright cold day in April.", "Nobody knew what to say, so nobody said anything.")


def load(folder: Path, **changes: Any) -> LoadedEngine:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_rows": 4,
        "watermark": False,
    }
    return Engine.load(EngineConfig(model="turbo", model_dir=folder, **(settings | changes)))


def prompt(seed: int) -> VoicePrompt:
    return VoicePrompt(np.random.default_rng(seed).normal(0, 0.1, 130_000).astype(np.float32), 24_000)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_idle(engine: LoadedEngine) -> bool:
    core = engine.stats()["core"]
    return not any(core[name] for name in ("num_utterances", "num_waiting_chunks", "num_decoding_chunks"))


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_two_hundred_mixed_requests_with_a_third_cancelled_leave_no_trace(
    planted_checkpoint: PlantedCheckpoint,
) -> None:
    chance = random.Random(11)
    voices = [prompt(seed) for seed in range(3)]

    def request() -> SpeechRequest:
        text = " ".join(chance.choices(SENTENCES, k=chance.randint(1, 2)))
        return SpeechRequest(
            text=text,
            voice=chance.choice([None, *voices]),
            seed=chance.randrange(2**40),
            temperature=chance.uniform(0.3, 1.5),
        )

    with load(planted_checkpoint("turbo", PLAN)) as engine:
        for _ in range(10):  # what is allocated once is there before memory is compared
            engine.speak(request())
        before_mb = resident_mb()
        futures: list[tuple[SpeechRequest, Future[Speech]]] = []
        cancelled: set[int] = set()
        for index in range(200):
            wanted = request()
            futures.append((wanted, engine.submit(wanted)))
            if chance.random() < 0.3:
                victim = chance.randrange(max(0, index - 5), index + 1)
                if futures[victim][1].cancel():
                    cancelled.add(victim)
            time.sleep(chance.random() * 0.02)
        for index, (wanted, future) in enumerate(futures):
            if index in cancelled:
                with pytest.raises(CancelledError):
                    future.result()
                continue
            speech = future.result(timeout=300)
            assert " ".join(chunk.text for chunk in speech.chunks) == wanted.text
            assert all(chunk.end_s - chunk.start_s == pytest.approx(25 / 25) for chunk in speech.chunks)
        wait_until(lambda: is_idle(engine))
        assert len(cancelled) > 20
        assert resident_mb() - before_mb < 100


def test_running_out_of_memory_costs_rows_and_no_job(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Decoder.step

    def step_of_a_small_machine(decoder: Decoder, count: int = 1) -> None:
        if decoder.num_rows > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        step(decoder, count)

    requests = [SpeechRequest(text=f"Text {i}.", seed=i, top_k=1, max_new_tokens=8) for i in range(6)]
    with load(tiny_checkpoint("turbo"), max_rows=8) as engine:
        expected = [engine.speak(request).waveform for request in requests]
        monkeypatch.setattr(Decoder, "step", step_of_a_small_machine)
        futures = [engine.submit(request) for request in requests]
        for future, waveform in zip(futures, expected, strict=True):
            np.testing.assert_allclose(future.result().waveform, waveform, atol=1e-3)


def test_a_request_that_does_not_fit_alone_is_out_of_memory_and_the_next_is_served(
    planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(planted_checkpoint("turbo", PLAN), max_rows=2) as engine:
        with monkeypatch.context() as patched:

            def no_memory(*_: object) -> None:
                raise torch.OutOfMemoryError("tried to allocate 1 TiB")

            patched.setattr(Decoder, "step", no_memory)
            with pytest.raises(SpeechError) as caught:
                engine.speak(SpeechRequest(text="Hello."))
        assert caught.value.code == "out_of_memory"
        assert engine.speak(SpeechRequest(text="Hello.")).duration_s >= 1


def test_a_fault_while_decoding_fails_what_was_decoded_and_not_the_engine(
    planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(planted_checkpoint("turbo", PLAN)) as engine:
        with monkeypatch.context() as patched:

            def fault(*_: object) -> None:
                raise RuntimeError("device-side assert")

            patched.setattr(Decoder, "step", fault)
            futures = [engine.submit(SpeechRequest(text="One sentence. " * 30)) for _ in range(3)]
            for future in futures:
                with pytest.raises(SpeechError) as caught:
                    future.result()
                assert caught.value.code == "generation_failed"
        assert engine.speak(SpeechRequest(text="Hello.")).duration_s >= 1
        assert is_idle(engine)


def test_more_requests_than_may_wait_are_refused_and_the_others_are_served(
    planted_checkpoint: PlantedCheckpoint,
) -> None:
    with load(planted_checkpoint("turbo", PLAN), max_queued=3) as engine:
        futures = [engine.submit(SpeechRequest(text="Hello.")) for _ in range(3)]
        with pytest.raises(SpeechError, match="wait already"):
            engine.submit(SpeechRequest(text="Hello."))
        assert all(future.result().duration_s >= 1 for future in futures)
        wait_until(lambda: is_idle(engine))
        assert engine.speak(SpeechRequest(text="Hello.")).duration_s >= 1


def test_a_long_job_and_a_crowd_of_short_ones_both_get_on(planted_checkpoint: PlantedCheckpoint) -> None:
    with load(planted_checkpoint("turbo", PLAN), max_rows=2) as engine:
        long = engine.submit(SpeechRequest(text="This is one sentence of a very long chapter that goes on. " * 50))
        short = [engine.submit(SpeechRequest(text=f"Number {i}.")) for i in range(8)]
        for future in short:
            future.result()
        assert not long.done()
        assert len(long.result().chunks) > 8


@pytest.mark.parametrize("beside", [False, True])
def test_a_renderer_that_misbehaves_fails_its_requests_and_not_the_engine(
    beside: bool, planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = functools.partial(Core, render_beside=beside)
    monkeypatch.setattr("engine.engine.Core", lambda *args, render_beside: core(*args))
    with load(planted_checkpoint("turbo", PLAN)) as engine:
        for wrong in ([], [None], RuntimeError("a kernel failed")):

            def render(self: Renderer, passes: list[Pass], wrong: Any = wrong) -> Any:
                if isinstance(wrong, Exception):
                    raise wrong
                return wrong

            with monkeypatch.context() as patched:
                patched.setattr(Renderer, "render", render)
                with pytest.raises(SpeechError) as caught:
                    engine.submit(SpeechRequest(text="Hello.")).result(timeout=60)
            assert caught.value.code == "generation_failed"
        assert engine.submit(SpeechRequest(text="Hello.")).result(timeout=60).duration_s >= 1
