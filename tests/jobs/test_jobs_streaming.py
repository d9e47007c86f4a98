"""Streams: what is given while it is spoken is the whole, in order, in time and never too large."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.errors import SpeechError
from engine.stream import SpeechStream
from engine.types import EngineConfig, FloatArray, SpeechRequest
from jobs.schema import AudioFormat
from jobs.settings import Settings
from jobs.streaming import MAX_PIECE_BYTES, Feed, join
from jobs.worker import BrokenWorker, Worker
from tests.jobs.voice_support import Draft, recorded
from tests.jobs.voice_support import run as run_plain

SENTENCES = (
    "The first sentence has been said. [pause 0.3s] ",
    "A second one follows it and is a good deal longer than the first was, so that it makes a chunk. [pause 0.3s] ",
    "Then the third, which says that the text is nearly at its end, but not yet quite there. [pause 0.3s] ",
    "And the fourth is the last.",
)
TEXT = "".join(SENTENCES)
FORMATS: tuple[AudioFormat, ...] = ("wav", "flac", "mp3", "opus", "pcm")


class Held(Draft):
    """A draft voice that says its first chunk and waits, or fails, before the second."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.streams: list[SpeechStream] = []
        self.error: BaseException | None = None
        self.may_go_on = threading.Event()
        self._num_spoken_chunks = 0

    def stream(self, request: SpeechRequest, **options: Any) -> SpeechStream:
        self.streams.append(super().stream(request, **options))
        return self.streams[-1]

    def _speak_chunk(self, *arguments: Any) -> Any:
        self._num_spoken_chunks += 1
        if self._num_spoken_chunks > 1:
            if self.error is not None:
                raise self.error
            assert self.may_go_on.wait(20)
        return super()._speak_chunk(*arguments)

    def close(self) -> None:
        self.may_go_on.set()
        super().close()

    def is_free(self) -> bool:
        return all(stream._future.cancelled() for stream in self.streams)


@pytest.fixture
def streams(settings: Settings) -> Settings:
    return settings.model_copy(update={"model": "draft", "streaming": True})


@pytest.fixture
def draft() -> Iterator[Draft]:
    with contextlib.closing(Draft.make()) as engine:
        yield engine


@pytest.fixture
def held() -> Iterator[Held]:
    with contextlib.closing(Held.make()) as engine:
        assert isinstance(engine, Held)
        yield engine


@pytest.fixture
def worker(draft: Draft, streams: Settings) -> Worker:
    return Worker(draft, streams)


class Unseekable(soundfile.SoundFile):
    """soundfile looks for the end where it can seek, and a streamed flac does not say where that is."""

    def seekable(self) -> bool:
        return False


async def taken(worker: Worker | BrokenWorker, **fields: Any) -> list[dict[str, Any]]:
    return [piece async for piece in worker.stream({"id": "1", "input": fields})]


def stream(worker: Worker | BrokenWorker, **fields: Any) -> list[dict[str, Any]]:
    """All pieces of a job, as they come out of JSON."""
    pieces: list[dict[str, Any]] = json.loads(json.dumps(asyncio.run(taken(worker, **fields))))
    return pieces


def audio_of(pieces: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(base64.b64decode(piece["audio"]) for piece in pieces)


def decoded(data: bytes, audio_format: str = "wav", rate: int = 24_000) -> FloatArray:
    """float32 (samples,), read as a player would that does not know how much comes."""
    options = {"format": "RAW", "subtype": "PCM_16", "channels": 1, "samplerate": rate} if audio_format == "pcm" else {}
    with Unseekable(io.BytesIO(data), **options) as file:
        assert file.samplerate == rate
        blocks = [np.zeros(0, np.float32)]
        while (block := file.read(1 << 16, dtype="float32")).size:
            blocks.append(block)
    return np.concatenate(blocks)


def error_of(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The error that a stream ends with."""
    assert all("error" not in piece for piece in pieces[:-1])
    assert set(pieces[-1]) == {"error"}
    error: dict[str, Any] = json.loads(pieces[-1]["error"])
    assert set(error) == {"error", "error_code", "field"}
    return error


def joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for piece in pieces:
        join(result, piece)
    return result


def wire_bytes(piece: dict[str, Any]) -> int:
    """As the SDK posts it."""
    return len(json.dumps({"output": piece}, ensure_ascii=False).encode())


# ---------------------------------------------------------------------------------- what comes


def test_the_pieces_are_numbered_and_the_last_has_the_fields_of_a_plain_workers_result(worker: Worker) -> None:
    pieces = stream(worker, text=TEXT, seed=3)
    assert [piece["seq"] for piece in pieces] == list(range(len(pieces)))
    assert [piece["final"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last, plain = pieces[-1], run_plain(worker, text=TEXT, seed=3)
    assert set(last) == set(plain) | {"seq", "final"}
    same = ("format", "sample_rate", "duration_s", "model", "voice", "seed", "chunks", "warnings", "watermarked")
    assert {name: last[name] for name in same} == {name: plain[name] for name in same}
    assert set(last["timings"]) == set(plain["timings"])
    assert 0 < last["timings"]["first_audio_s"] < last["timings"]["total"]
    assert all(piece["format"] == "wav" and piece["sample_rate"] == 24_000 for piece in pieces)


@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_a_stream_says_exactly_what_a_plain_worker_says(rate: int, worker: Worker) -> None:
    whole = decoded(base64.b64decode(run_plain(worker, text=TEXT, sample_rate=rate)["audio"]), rate=rate)
    streamed = decoded(audio_of(stream(worker, text=TEXT, sample_rate=rate)), rate=rate)
    assert np.abs(streamed - whole).max() <= (rate != 24_000) * 2**-15


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("rate", [None, 48_000])
def test_joined_pieces_are_a_file_in_the_format_and_rate_asked_for(
    worker: Worker, audio_format: str, rate: int | None
) -> None:
    pieces = stream(worker, text=TEXT, output_format=audio_format, sample_rate=rate)
    samples = decoded(audio_of(pieces), audio_format, rate or 24_000)
    assert (pieces[0]["format"], pieces[0]["sample_rate"]) == (audio_format, rate or 24_000)
    assert samples.size / (rate or 24_000) == pytest.approx(pieces[-1]["duration_s"], abs=0.15)
    assert np.abs(samples).max() > 0.05


@pytest.mark.parametrize("audio_format", ["wav", "pcm", "mp3", "opus"])
def test_what_has_come_so_far_can_be_played_and_is_the_beginning_of_the_whole(
    worker: Worker, audio_format: str
) -> None:
    pieces = stream(worker, text=TEXT, output_format=audio_format)
    assert sum(bool(piece["audio"]) for piece in pieces) > 2
    whole = decoded(audio_of(pieces), audio_format)
    lengths = []
    for num_taken in range(1, len(pieces)):
        prefix = decoded(audio_of(pieces[:num_taken]), audio_format)
        lengths.append(prefix.size)
        if audio_format in ("wav", "pcm"):
            assert np.array_equal(prefix, whole[: prefix.size])
    assert 0 < lengths[0] < lengths[-1] <= whole.size
    assert lengths == sorted(lengths)


def test_the_first_piece_is_heard_while_the_second_chunk_is_not_yet_spoken(held: Held, streams: Settings) -> None:
    async def scenario() -> list[dict[str, Any]]:
        pieces = Worker(held, streams).stream({"input": {"text": TEXT}})
        first = await anext(pieces)
        assert not held.may_go_on.is_set()
        held.may_go_on.set()
        return [first, *[piece async for piece in pieces]]

    pieces = asyncio.run(scenario())
    assert decoded(audio_of(pieces[:1])).any()
    assert pieces[0]["chunks_done"] < pieces[0]["chunks_total"] == len(pieces[-1]["chunks"])


def test_streams_side_by_side_do_not_mix(worker: Worker) -> None:
    async def together() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(taken(worker, text=sentence) for sentence in SENTENCES))

    for sentence, pieces in zip(SENTENCES, asyncio.run(together()), strict=True):
        assert audio_of(pieces) == audio_of(stream(worker, text=sentence))


@pytest.mark.parametrize("fields", [{"mode": "basic"}, {"mode": "streaming"}, {"mode": None}])
def test_the_kind_of_worker_decides_and_not_the_mode(worker: Worker, fields: dict[str, Any]) -> None:
    pieces = stream(worker, text=TEXT, **fields)
    assert pieces[0]["audio"] and not pieces[0]["final"]
    assert pieces[-1]["warnings"] == []


def test_what_a_stream_cannot_have_is_a_warning_and_changes_no_sample(worker: Worker) -> None:
    pieces = stream(worker, text=TEXT, audio_normalization="peak", title="A title")
    assert [warning.split(":")[0] for warning in pieces[-1]["warnings"]] == [
        "audio_normalization peak was ignored",
        "title was ignored",
    ]
    assert audio_of(pieces) == audio_of(stream(worker, text=TEXT))
    assert any("loudness" in warning for warning in stream(worker, text="Hi.", loudness_lufs=-20)[-1]["warnings"])


# ---------------------------------------------------------------------------------- every operation


def test_an_operation_without_audio_is_one_final_piece(worker: Worker) -> None:
    (piece,) = stream(worker, operation="info")
    assert (piece["seq"], piece["final"], piece["model"]) == (0, True, "draft")
    assert "audio" not in piece
    assert piece["streaming"] and piece["output_formats"] == list(FORMATS)
    plain = run_plain(worker, operation="info")
    assert not plain["streaming"] and "pcm" not in plain["output_formats"]


def test_audio_that_is_made_whole_comes_in_pieces_that_are_the_whole(worker: Worker) -> None:
    conversion = {"operation": "voice_conversion", "input_audio": recorded(duration_s=8.0), "sample_rate": 48_000}
    pieces = stream(worker, **conversion)
    plain = run_plain(worker, **conversion)
    assert len(pieces) > 2
    assert audio_of(pieces) == base64.b64decode(plain["audio"])
    assert set(pieces[-1]) == set(plain) | {"seq", "final"}
    samples = decoded(audio_of(stream(worker, **conversion, output_format="pcm")), "pcm", 48_000)
    assert np.array_equal(samples, decoded(base64.b64decode(plain["audio"]), rate=48_000))


def test_a_plain_workers_limit_of_a_result_is_none_of_a_stream(draft: Draft, streams: Settings) -> None:
    worker = Worker(draft, streams.model_copy(update={"max_result_bytes": 20_000}))
    assert stream(worker, text=TEXT)[-1]["final"]
    assert stream(worker, operation="voice_conversion", input_audio=recorded())[-1]["final"]


def test_a_long_form_job_streams_with_its_subtitles_at_the_end(worker: Worker) -> None:
    segments = [{"text": sentence, "pause_after_s": 0.2} for sentence in SENTENCES]
    pieces = stream(worker, operation="long_form", segments=segments, subtitles="srt", output_format="mp3")
    assert sum(bool(piece["audio"]) for piece in pieces) > 2
    assert pieces[-1]["subtitles"].startswith("1\n00:00:0")
    assert decoded(audio_of(pieces), "mp3").size / 24_000 == pytest.approx(pieces[-1]["duration_s"], abs=0.15)


def test_a_voice_clone_streams_its_sample_and_saves_its_voice_when_all_was_heard(make_worker: Any) -> None:
    worker = make_worker(streaming=True)
    clone = {"operation": "voice_clone", "reference_audio": recorded(), "voice_name": "Ann"}
    pieces = stream(worker, **clone)
    assert "sample_audio" not in pieces[-1] and pieces[-1]["voice_info"]["name"] == "Ann"
    pieces = stream(worker, **clone, save_to_library=True, text=TEXT)
    assert len(pieces) > 2 and pieces[-1]["voice_info"]["saved"]
    assert [voice["name"] for voice in stream(worker, operation="list_voices")[-1]["voices"]] == ["Ann"]


def test_a_voice_clone_that_is_given_up_while_it_speaks_saves_nothing(make_worker: Any, held: Held) -> None:
    worker = make_worker(held, streaming=True)
    clone = {"operation": "voice_clone", "reference_audio": recorded(), "voice_name": "Ann", "save_to_library": True}

    async def scenario() -> None:
        pieces = worker.stream({"input": {**clone, "text": TEXT}})
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(scenario())
    assert stream(worker, operation="list_voices")[-1]["voices"] == []


# ---------------------------------------------------------------------------------- never too large


def test_no_piece_is_larger_than_the_platform_takes_however_much_comes_at_once(worker: Worker) -> None:
    pieces = stream(worker, text="Before. [pause 30s] After.", sample_rate=48_000)
    assert len(pieces) > 4
    assert max(map(wire_bytes, pieces)) <= MAX_PIECE_BYTES
    samples = decoded(audio_of(pieces), rate=48_000)
    assert samples.size / 48_000 == pytest.approx(pieces[-1]["duration_s"], abs=0.01)


def test_pieces_that_are_taken_slowly_grow_instead_of_becoming_many(worker: Worker) -> None:
    async def scenario() -> list[dict[str, Any]]:
        pieces = []
        async for piece in worker.stream({"input": {"text": TEXT}}):
            pieces.append(piece)
            while any(task.get_coro().__name__ == "_attended" for task in asyncio.all_tasks()):  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        return pieces

    pieces = asyncio.run(scenario())
    assert len(pieces) == 3
    assert audio_of(pieces) == audio_of(stream(worker, text=TEXT))


def test_whoever_makes_audio_waits_while_much_of_it_waits() -> None:
    async def scenario() -> None:
        feed = Feed()
        await feed.put(bytes(10_000_000))
        waiting = asyncio.create_task(feed.put(b"more"))
        await asyncio.sleep(0)
        taken = [await anext(feed)]
        await asyncio.sleep(0)
        assert not waiting.done()
        while not waiting.done():
            taken.append(await anext(feed))
            await asyncio.sleep(0)
        feed.end()
        taken += [piece async for piece in feed]
        assert audio_of(taken) == bytes(10_000_000) + b"more"
        assert max(map(wire_bytes, taken)) <= MAX_PIECE_BYTES

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["a", "\u00e9", "漢", "😀", '"', "\n", "\x01"])
def test_what_a_long_job_has_to_tell_is_spread_over_pieces_and_joins_again(text: str) -> None:
    chunks = [
        {"index": index, "text": text * 250, "start_s": 0.1, "end_s": 0.2, "attempts": 1, "flags": []}
        for index in range(4_000)
    ]
    result = {
        "audio": "",
        "format": "wav",
        "sample_rate": 24_000,
        "seed": 5,
        "chunks": chunks,
        "subtitles": text * 500_000,
        "warnings": ["one"],
    }
    pieces = asyncio.run(_closing(result))
    assert max(map(wire_bytes, pieces)) <= MAX_PIECE_BYTES
    assert [piece["final"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert audio_of(pieces) == b""
    assert joined(pieces) == {name: value for name, value in result.items() if name != "audio"}


async def _closing(result: dict[str, Any]) -> list[dict[str, Any]]:
    return Feed().closing(result)


def test_a_result_that_no_piece_can_hold_is_an_error_and_not_lost() -> None:
    assert error_of(asyncio.run(_closing({"voice_info": "x" * 2_000_000})))["error_code"] == "result_too_large"


# ---------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpeechError("generation_failed", "no end was found", "text"), "generation_failed"),
        (MemoryError(), "out_of_memory"),
        (ZeroDivisionError("a secret"), "internal"),
    ],
)
def test_an_error_in_the_middle_ends_the_stream_behind_what_was_spoken(
    error: BaseException, code: str, held: Held, streams: Settings
) -> None:
    held.error = error
    pieces = stream(Worker(held, streams), text=TEXT)
    assert len(pieces) > 1 and decoded(audio_of(pieces[:-1])).any()
    told = error_of(pieces)
    assert told["error_code"] == code
    assert "secret" not in told["error"]


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "invalid_request", "text"),
        ({"text": "😀"}, "text_empty", "text"),
        ({"text": "a" * 5_001}, "text_too_long", "text"),
        ({"text": "Hello", "colour": 1}, "invalid_request", "colour"),
        ({"text": "Hello", "language": "xx"}, "language_unsupported", "language"),
        ({"text": "Hello", "voice_name": "ann"}, "voice_not_found", "voice_name"),
        ({"text": "Hello", "output_format": "opus", "sample_rate": 44_100}, "invalid_request", "sample_rate"),
        ({"text": "Hello", "output_format": "ogg"}, "invalid_request", "output_format"),
        ({"operation": "long_form", "segments": []}, "invalid_request", "segments"),
    ],
)
def test_bad_input_is_one_piece_with_its_error(worker: Worker, fields: dict[str, Any], code: str, field: str) -> None:
    pieces = stream(worker, **fields)
    assert len(pieces) == 1
    error = error_of(pieces)
    assert (error["error_code"], error["field"]) == (code, field)


def test_samples_alone_are_of_streams_only(worker: Worker) -> None:
    refused = run_plain(worker, text="Hello", output_format="pcm")
    assert (refused["error_code"], refused["field"]) == ("invalid_request", "output_format")


def test_a_closed_stream_frees_the_engine_at_once(held: Held, streams: Settings) -> None:
    async def scenario() -> None:
        pieces = Worker(held, streams).stream({"input": {"text": TEXT}})
        await anext(pieces)
        assert not held.is_free()
        await pieces.aclose()
        assert held.is_free()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


@pytest.mark.parametrize("is_sending", [False, True], ids=["waiting for a piece", "sending a piece"])
def test_a_stream_whose_taker_is_cancelled_frees_the_engine_though_nobody_closes_it(
    is_sending: bool, held: Held, streams: Settings
) -> None:
    kept: list[AsyncIterator[dict[str, Any]]] = []

    async def take(has_piece: asyncio.Event) -> None:
        kept.append(Worker(held, streams).stream({"input": {"text": TEXT}}))
        async for _ in kept[0]:
            has_piece.set()
            if is_sending:
                await asyncio.sleep(60)

    async def scenario() -> None:
        has_piece = asyncio.Event()
        taker = asyncio.create_task(take(has_piece))
        await has_piece.wait()
        assert not held.is_free()
        taker.cancel()
        await asyncio.wait([taker])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert held.is_free()

    asyncio.run(scenario())


def test_a_stream_past_its_time_ends_with_timed_out_and_frees_the_engine(held: Held, streams: Settings) -> None:
    worker = Worker(held, streams.model_copy(update={"job_timeout_s": 0.3}))
    assert error_of(stream(worker, text=TEXT))["error_code"] == "timed_out"
    assert held.is_free()


def test_a_job_whose_time_ends_while_its_pieces_are_not_taken_ends_too(held: Held, streams: Settings) -> None:
    worker = Worker(held, streams.model_copy(update={"job_timeout_s": 0.3}))

    async def scenario() -> list[dict[str, Any]]:
        pieces = worker.stream({"input": {"text": TEXT}})
        first = await anext(pieces)
        while not held.is_free():
            await asyncio.sleep(0.01)
        return [first, *[piece async for piece in pieces]]

    assert error_of(asyncio.run(scenario()))["error_code"] == "timed_out"


def test_a_worker_without_its_model_answers_every_stream_with_the_reason() -> None:
    broken = BrokenWorker(SpeechError("weights_missing", "no t3", "model"))
    assert error_of(stream(broken, text="Hello"))["error_code"] == "weights_missing"


# ---------------------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny turbo that says the same four seconds for every chunk."""
    from engine import Engine
    from engine.random_checkpoint import PlantedSpeech, write_checkpoint

    plan = PlantedSpeech(tokens=tuple(range(100, 200)))
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "turbo", "turbo", plan=plan)
    config = EngineConfig(model="turbo", model_dir=folder, device="cpu", dtype="float32", num_threads=1)
    with Engine.load(config) as engine:
        yield engine


def test_a_models_speech_is_heard_before_its_first_chunk_is_done_and_is_watermarked(
    model: Any, streams: Settings
) -> None:
    worker = Worker(model, streams)
    pieces = stream(worker, text=TEXT, seed=1, sample_rate=48_000)
    assert (pieces[0]["chunks_done"], bool(pieces[0]["audio"])) == (0, True)
    last = pieces[-1]
    assert (last["model"], last["watermarked"]) == ("turbo", True)
    assert decoded(audio_of(pieces), rate=48_000).size / 48_000 == pytest.approx(last["duration_s"], abs=0.001)
    assert last["chunks"][-1]["end_s"] <= last["duration_s"]
    assert last["timings"]["first_audio_s"] < last["timings"]["total"]


def test_a_models_rows_are_free_when_a_stream_is_given_up(model: Any, streams: Settings) -> None:
    async def scenario() -> None:
        pieces = Worker(model, streams).stream({"input": {"text": TEXT * 10}})
        await anext(pieces)
        assert model.stats()["core"]["num_utterances"]
        await pieces.aclose()
        while model.stats()["core"]["num_utterances"]:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 20))
