"""handler.py as a person runs it, and as the platform does: real processes, the draft voice, no network."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import handler
from engine.random_checkpoint import PlantedSpeech, write_checkpoint
from tests.platform import local_server, post, without_ours

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handler.py"


@dataclass(frozen=True)
class Finished:
    """What a run of handler.py left: exit status, standard output and error."""

    status: int
    stdout: str
    stderr: str

    def result(self, status: int = 0) -> dict[str, Any]:
        assert self.status == status, self.stderr
        assert "Traceback" not in self.stderr
        result: dict[str, Any] = json.loads(self.stdout)  # one JSON value and nothing else
        return result


def run(cwd: Path, *arguments: str, stdin: str | None = None, **changes: str) -> Finished:
    """handler.py in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HANDLER), *arguments],
        cwd=cwd,
        env=without_ours(os.environ) | changes,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """handler.py's main in this process, in tmp_path: the same code without the price of a start."""
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(without_ours(os.environ)):
        monkeypatch.delenv(name)

    def run_main(*arguments: str, **changes: str) -> Finished:
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        try:
            status = handler.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run_main


def job(**fields: Any) -> str:
    return json.dumps({"input": fields})


@pytest.fixture
def voice_wav(tmp_path: Path) -> Path:
    times = np.arange(6 * 24_000) / 24_000
    wave = 0.2 * sum(np.sin(2 * np.pi * 210 * k * times) / k for k in range(1, 8))
    path = tmp_path / "voice.wav"
    soundfile.write(path, wave, 24_000)
    return path


def test_without_arguments_it_speaks_the_test_job_into_out(tmp_path: Path) -> None:
    finished = run(tmp_path)
    result = finished.result()
    spoken = " ".join(chunk["text"] for chunk in result["chunks"])
    assert spoken == json.loads((ROOT / "test_input.json").read_text())["input"]["text"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["hello.wav"]
    assert soundfile.info(tmp_path / result["audio"]).duration == pytest.approx(result["duration_s"], abs=0.01)
    assert result["model"] == "draft"
    assert "set MODEL" in finished.stderr
    for shown in ("Hello!", "built-in", f"{result['duration_s']:.2f} s", "real-time factor", result["audio"]):
        assert shown in finished.stderr


def test_a_job_comes_as_argument_as_file_or_on_standard_input(tmp_path: Path, call: Callable[..., Finished]) -> None:
    text = job(text="Hello", seed=1, output_format="flac")
    (tmp_path / "job.json").write_text(text)
    audio = set()
    for finished in (run(tmp_path, "--test_input", "-", stdin=text), call("--test_input", text)):
        audio.add((tmp_path / finished.result()["audio"]).read_bytes())
    finished = call("--test_input", "@job.json")
    audio.add((tmp_path / finished.result()["audio"]).read_bytes())
    assert len(audio) == 1


def test_a_reference_as_file_and_as_base64_gives_the_same_voice_and_differs_from_none(
    tmp_path: Path, voice_wav: Path, call: Callable[..., Finished]
) -> None:
    encoded = base64.b64encode(voice_wav.read_bytes()).decode()
    (tmp_path / "job.json").write_text(job(text="Hello there", seed=1, reference_audio=encoded))
    jobs = {
        "file": job(text="Hello there", seed=1, reference_audio="file:voice.wav"),
        "base64": "@job.json",
        "none": job(text="Hello there", seed=1),
    }
    audio = {}
    for name, source in jobs.items():
        result = call("--test_input", source).result()
        audio[name] = (tmp_path / result["audio"]).read_bytes()
    assert audio["file"] == audio["base64"] != audio["none"]


def test_a_voice_clone_writes_its_sample_and_shows_no_base64(voice_wav: Path, call: Callable[..., Finished]) -> None:
    fields = {"operation": "voice_clone", "reference_audio": f"file:{voice_wav}"}
    finished = call("--test_input", json.dumps({"id": "../my clone", "input": fields}))
    result = finished.result()
    assert result["audio"] == result["sample_audio"] == str(Path("out", "my-clone.wav"))
    assert len(finished.stdout) + len(finished.stderr) < 5_000


OUR_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ \w+ +(handler|jobs|engine)[\w.]*: |  [a-z]")
"""A line of our log, or of the summary."""


def test_a_models_own_weights_speak_in_a_files_voice_and_nobody_else_writes_to_the_log(
    tmp_path: Path, voice_wav: Path
) -> None:
    weights = write_checkpoint(tmp_path / "weights", "turbo", plan=PlantedSpeech(tokens=tuple(range(100, 140))))
    fields = {"text": "Hello there", "seed": 1, "reference_audio": "file:voice.wav", "exaggeration": 0.7}
    finished = run(tmp_path, "--test_input", job(**fields), MODEL="turbo", MODEL_DIR=str(weights), DEVICE="cpu")
    result = finished.result()
    assert (result["model"], result["voice"], result["watermarked"]) == ("turbo", "reference", True)
    assert result["duration_s"] == pytest.approx(43 / 25)
    assert soundfile.info(tmp_path / result["audio"]).duration == pytest.approx(43 / 25)
    assert any("exaggeration" in warning for warning in result["warnings"])
    assert [line for line in finished.stderr.splitlines() if not OUR_LINE.match(line)] == []


def test_info_runs_locally(call: Callable[..., Finished]) -> None:
    assert call("--test_input", job(operation="info")).result()["model"] == "draft"


def test_a_job_error_ends_the_process_with_1(tmp_path: Path) -> None:
    assert run(tmp_path, "--test_input", '{"text": "Hello"}').result(status=1)["error_code"] == "invalid_request"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (job(text=""), "text_empty"),
        (job(text="Hello", voice_id="x"), "voice_not_found"),
        (job(text="Hello", reference_audio="file:missing.wav"), "reference_unreadable"),
        ("not json", "invalid_request"),
        ("[1]", "invalid_request"),
        ("@missing.json", "invalid_request"),
        ("[" * 100_000, "invalid_request"),
        ("", "invalid_request"),
    ],
)
def test_a_job_error_is_told_as_json_and_leaves_no_file(
    source: str, code: str, tmp_path: Path, call: Callable[..., Finished]
) -> None:
    result = call("--test_input", source).result(status=1)
    assert set(result) == {"error", "error_code", "field"}
    assert result["error_code"] == code
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_a_coded_error_and_leaves_it_alone(
    tmp_path: Path, call: Callable[..., Finished]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert call("--test_input", job(text="Hello")).result(status=1)["error_code"] == "storage_failed"
    assert (tmp_path / "out").read_text() == "a file"


def test_a_job_file_may_begin_with_a_byte_order_mark(tmp_path: Path, call: Callable[..., Finished]) -> None:
    (tmp_path / "job.json").write_text(job(operation="info"), encoding="utf-8-sig")
    assert call("--test_input", "@job.json").result()["model"] == "draft"


def test_what_is_no_job_is_told_the_ways_to_give_one(call: Callable[..., Finished]) -> None:
    message = call("--test_input", "job.json").result(status=1)["error"]
    assert "@PATH" in message and "standard input" in message


def test_a_model_that_cannot_be_had_is_a_coded_error(call: Callable[..., Finished]) -> None:
    result = call("--test_input", job(text="Hello"), MODEL="turbot").result(status=1)
    assert result["error_code"] == "model_unavailable"


def test_bad_settings_and_unknown_options_exit_2_with_their_names(call: Callable[..., Finished]) -> None:
    finished = call("--test-input", "x")
    assert (finished.status, "--test-input" in finished.stderr) == (2, True)
    finished = call(MAX_CONCURRENCY="lots")
    assert (finished.status, "MAX_CONCURRENCY" in finished.stderr) == (2, True)


def test_the_sdks_own_server_runs_jobs_and_logs_no_audio(tmp_path: Path, voice_wav: Path) -> None:
    with local_server(HANDLER, tmp_path) as url:
        answer = post(f"{url}/runsync", input={"text": "Hello"})
        assert answer["status"] == "COMPLETED"
        audio = base64.b64decode(answer["output"]["audio"])
        assert soundfile.info(io.BytesIO(audio)).samplerate == 24_000
        refused = post(f"{url}/runsync", input={"text": "Hello", "reference_audio": f"file:{voice_wav}"})
        assert (refused["status"], "local test mode" in refused["error"]) == ("FAILED", True)
        assert answer["output"]["audio"][100:200] not in (tmp_path / "log").read_text()
