"""A streaming worker as the SDK runs it: its real loop on a stand-in of the platform, its local server, a local run."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import handler
from jobs.loop import ProgressUpdates
from jobs.streaming import MAX_PIECE_BYTES
from tests.platform import Platform, local_server, post, wait_until, without_ours

HANDLER = Path(handler.__file__).resolve()
TEXT = "The first sentence. [pause 0.3s] The second one is a little longer. [pause 0.3s] And this is the last."
LONG = "This is a sentence of a text that is a good deal longer than anybody would like to wait for. " * 50
STREAMS = {"MODEL": "draft", "STREAMING": "1", "MAX_CONCURRENCY": "2"}


@dataclass(frozen=True)
class Served:
    """A worker of the draft voice on a platform, and the file of its log."""

    platform: Platform
    log: Path


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cwd = tmp_path_factory.mktemp("streaming")
    with Platform() as platform, platform.worker(HANDLER, cwd, **STREAMS):
        yield Served(platform, cwd / "log")


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


def samples_of(pieces: Sequence[dict[str, Any]], path: Path) -> Any:
    path.write_bytes(b"".join(base64.b64decode(piece["audio"]) for piece in pieces))
    return soundfile.read(path, dtype="int16")[0]


def test_the_sdks_loop_posts_pieces_in_order_and_then_ends_the_job(streaming: Served, tmp_path: Path) -> None:
    platform = streaming.platform
    job_id = platform.submit(text=TEXT, seed=1)
    assert platform.result(job_id) == {"output": []}
    pieces = platform.pieces[job_id]
    assert [piece["seq"] for piece in pieces] == list(range(len(pieces)))
    assert pieces[-1]["final"] and platform.events[-1] == ("job-done", job_id)
    duration_s = samples_of(pieces, tmp_path / "joined.wav").size / 24_000
    assert duration_s == pytest.approx(pieces[-1]["duration_s"], abs=0.001)
    assert pieces[0]["audio"][:100] not in streaming.log.read_text()


def test_the_sdk_posts_nothing_larger_than_the_platform_takes(streaming: Served) -> None:
    job_id = streaming.platform.submit(text="Before. [pause 30s] After.", sample_rate=48_000)
    streaming.platform.result(job_id)
    assert len(streaming.platform.pieces[job_id]) > 3
    assert streaming.platform.most_bytes[job_id] <= MAX_PIECE_BYTES


def test_an_error_is_a_failed_job_whose_error_is_json(streaming: Served) -> None:
    job_id = streaming.platform.submit(text="Hello", voice_name="Ann")
    result = streaming.platform.result(job_id)
    assert set(result) == {"error"}
    error = json.loads(result["error"])
    assert (error["error_code"], error["field"]) == ("voice_not_found", "voice_name")
    assert streaming.platform.pieces[job_id] == []


@pytest.mark.parametrize("is_sending", [False, True], ids=["while it speaks", "while it sends a piece"])
def test_a_job_that_the_platform_stops_is_stopped_and_the_next_one_runs(is_sending: bool, streaming: Served) -> None:
    platform = streaming.platform
    if is_sending:
        platform.may_take_pieces.clear()
    stopped = platform.submit(text=LONG)
    platform.wait_for(lambda: ("piece sent", stopped) in platform.events)
    platform.stop(stopped)
    wait_until(lambda: f"job {stopped}: stopped" in streaming.log.read_text())
    platform.may_take_pieces.set()
    after = platform.submit(text=TEXT)
    assert platform.result(after) == {"output": []}
    assert platform.pieces[after][-1]["final"]
    assert stopped not in platform.results
    assert not any(piece["final"] for piece in platform.pieces[stopped])


def test_a_worker_whose_model_does_not_load_says_so_and_has_itself_replaced(platform: Platform, tmp_path: Path) -> None:
    with platform.worker(HANDLER, tmp_path, **{**STREAMS, "MODEL": "turbot"}) as process:
        result = platform.result(platform.submit(text=TEXT))
        assert json.loads(result["error"])["error_code"] == "model_unavailable"
        assert result["stopPod"] is True
        assert process.wait(20) == 0


def test_a_plain_worker_gives_results_with_codes_on_the_same_platform(platform: Platform, tmp_path: Path) -> None:
    with platform.worker(HANDLER, tmp_path, MODEL="draft"):
        done, failed = platform.submit(text=TEXT, mode="streaming"), platform.submit(text="")
        output = platform.result(done)["output"]
        assert "does not stream" in output["warnings"][0] and output["audio"]
        error = platform.result(failed)
    assert error["error"] and error["output"] == {"error_code": "text_empty", "field": "text"}


def test_progress_is_sent_now_and_then_and_never_at_the_end_or_after_it() -> None:
    sent: list[dict[str, Any]] = []
    now_s = 100.0
    with ProgressUpdates(sent.append, clock=lambda: now_s) as updates:
        updates.report({"chunks_done": 0, "chunks": 10})
        for chunks_done in range(1, 11):
            now_s += 5
            updates.report({"chunks_done": chunks_done, "chunks": 10})
            now_s += 4
            updates.report({"chunks_done": chunks_done, "chunks": 10})
    now_s += 100
    updates.report({"chunks_done": 5, "chunks": 10})
    assert [figures["chunks_done"] for figures in sent] == list(range(1, 10))


# ---------------------------------------------------------------------------------- on a person's machine


@pytest.fixture
def run_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """handler.py's main in this process and in tmp_path: its status and the result it prints."""
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(without_ours(os.environ)):
        monkeypatch.delenv(name)

    def run(streaming: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        monkeypatch.setenv("STREAMING", streaming)
        status = handler.main(["--test_input", json.dumps({"id": "a-job", "input": fields})])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_a_local_run_writes_the_stream_to_a_file_and_tells_the_same_as_a_plain_one(
    run_main: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    told, samples = {}, {}
    for streaming in ("off", "on"):
        status, told[streaming] = run_main(streaming, text=TEXT, seed=1, sample_rate=48_000)
        assert (status, told[streaming]["audio"]) == (0, str(Path("out", "a-job.wav")))
        samples[streaming] = soundfile.read(tmp_path / "out" / "a-job.wav")[0]
        (tmp_path / "out" / "a-job.wav").unlink()
    assert set(told["on"]) == set(told["off"])
    assert told["on"]["chunks"] == told["off"]["chunks"]
    assert samples["on"].size == samples["off"].size
    assert np.abs(samples["on"] - samples["off"]).max() < 0.1  # marked piece by piece, and as a whole
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("suffix", ["mp3", "pcm"])
def test_a_local_streams_file_has_its_formats_name(
    suffix: str, run_main: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    assert run_main("on", text=TEXT, output_format=suffix)[0] == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == [f"a-job.{suffix}"]


def test_a_local_stream_that_fails_leaves_no_file_behind_and_an_older_one_alone(
    run_main: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.draft import DraftEngine
    from engine.errors import SpeechError

    assert run_main("on", text="Before")[0] == 0
    before = (tmp_path / "out" / "a-job.wav").read_bytes()
    spoken = DraftEngine._speak_chunk

    def fail_in_the_middle(engine: DraftEngine, chunk: Any, *arguments: Any) -> Any:
        if "last" in chunk.text:
            raise SpeechError("generation_failed", "no end was found")
        return spoken(engine, chunk, *arguments)

    monkeypatch.setattr(DraftEngine, "_speak_chunk", fail_in_the_middle)
    status, result = run_main("on", text=TEXT)
    assert (status, result["error_code"]) == (1, "generation_failed")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a-job.wav"]
    assert (tmp_path / "out" / "a-job.wav").read_bytes() == before


def test_a_local_streaming_run_without_audio_makes_no_folder(
    run_main: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    status, result = run_main("on", operation="info")
    assert (status, result["model"]) == (0, "draft")
    assert run_main("on", text="")[1]["error_code"] == "text_empty"
    assert not (tmp_path / "out").exists()


def test_the_sdks_own_server_streams_a_job_and_the_readmes_client_takes_one(tmp_path: Path) -> None:
    with local_server(HANDLER, tmp_path, STREAMING="1") as url:
        job_id = post(f"{url}/run", input={"text": TEXT})["id"]
        answer = post(f"{url}/stream/{job_id}")
        assert answer["status"] == "COMPLETED"
        pieces = [item["output"] for item in answer["stream"]]
        assert len(pieces) > 2 and pieces[-1]["final"]
        duration_s = samples_of(pieces, tmp_path / "joined.wav").size / 24_000
        assert duration_s == pytest.approx(pieces[-1]["duration_s"], abs=0.001)
        job_id = post(f"{url}/run", input={"text": ""})["id"]
        (refused,) = post(f"{url}/stream/{job_id}")["stream"]
        assert json.loads(refused["output"]["error"])["error_code"] == "text_empty"

        (client,) = re.findall(
            r"```python\n(import base64.*?)```", (HANDLER.parent / "README.md").read_text(), re.DOTALL
        )
        client = client.replace("https://api.runpod.ai/v2/ENDPOINT_ID", url)
        subprocess.run([sys.executable, "-c", client], cwd=tmp_path, check=True, timeout=60)
        assert soundfile.info(tmp_path / "speech.mp3").duration > 0.5
