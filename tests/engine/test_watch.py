"""A device that fails for good takes every request with it at once, and refuses the next; any other fault does not."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, Speech, SpeechError, SpeechRequest
from engine.engine import Engine as LoadedEngine
from engine.random_checkpoint import PlantedSpeech
from engine.s3gen.renderer import Renderer
from engine.t3.decoder import Decoder
from engine.watch import DeviceWatch
from tests.engine.conftest import PlantedCheckpoint
from tests.engine.synthetic_voices import prompt_of

PLAN = PlantedSpeech(tokens=tuple(range(100, 140)))
LONG = "One sentence of a text that is long enough to be under way. " * 10


class Device:
    """A device that can be broken, behind the watch of an engine on a CPU."""

    def __init__(self) -> None:
        self.is_broken = False
        self.num_tries = 0

    def try_it(self) -> None:
        self.num_tries += 1
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(DeviceWatch, "of", classmethod(lambda cls, _: cls(device.try_it)))
    return device


def load(folder: Path) -> LoadedEngine:
    return Engine.load(
        EngineConfig(model="turbo", model_dir=folder, device="cpu", dtype="float32", max_rows=4, watermark=False)
    )


def outcome(future: Future[Speech]) -> str:
    try:
        future.result(timeout=60)
    except SpeechError as error:
        return error.message
    return "spoken"


@pytest.mark.parametrize(
    ("owner", "method"), [(Decoder, "step"), (Decoder, "admit"), (Renderer, "render"), (torch.Tensor, "cpu")]
)
def test_a_lost_device_ends_all_requests_and_refuses_the_next(
    owner: Any, method: str, device: Device, planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(planted_checkpoint("turbo", PLAN)) as engine:
        release = threading.Event()

        def fail(*_: Any, **__: Any) -> Any:
            release.wait(10)
            device.is_broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        with monkeypatch.context() as patched:
            patched.setattr(owner, method, fail)
            futures = [engine.submit(SpeechRequest(text=LONG)) for _ in range(3)]
            release.set()
            messages = [outcome(future) for future in futures]
            assert engine.is_lost
        assert all("failed" in message for message in messages), messages
        with pytest.raises(SpeechError, match="must be replaced") as caught:
            engine.speak(SpeechRequest(text="Hello."))
        assert caught.value.code == "generation_failed"


def test_a_fault_that_the_device_survives_fails_only_what_it_met(
    device: Device, planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(planted_checkpoint("turbo", PLAN)) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("a bad shape")))
            assert "failed" in outcome(engine.submit(SpeechRequest(text="Hello.")))
        assert device.num_tries > 0 and not engine.is_lost
        assert outcome(engine.submit(SpeechRequest(text="Hello."))) == "spoken"


def test_what_comes_when_the_device_is_lost_is_told_so_while_a_voice_is_prepared(
    device: Device, planted_checkpoint: PlantedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(120.0, 6.0)
    with load(planted_checkpoint("turbo", PLAN)) as engine:
        device.is_broken = True

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        with monkeypatch.context() as patched:
            patched.setattr(engine._intake.voices, "get", fail)
            with pytest.raises(RuntimeError):
                engine.embed(prompt)
        assert engine.is_lost
        with pytest.raises(SpeechError, match="must be replaced"):
            engine.embed(prompt)


@pytest.mark.parametrize("error", [SpeechError("text_empty", "no text"), torch.OutOfMemoryError(), MemoryError()])
def test_a_refusal_or_a_lack_of_memory_spoils_no_device(error: Exception) -> None:
    device = Device()
    device.is_broken = True
    assert not DeviceWatch(device.try_it).look(error)
    assert device.num_tries == 0


def test_a_device_with_no_memory_left_for_the_look_is_not_lost() -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("tried to allocate 4 bytes")

    assert not DeviceWatch(no_memory).look(RuntimeError("something"))


def test_on_a_cpu_nothing_is_lost() -> None:
    assert not DeviceWatch.of(torch.device("cpu")).look(RuntimeError("CUDA error"))
