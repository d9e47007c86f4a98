"""The benchmark's row of the voice library: all its figures, each compared with what it says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks.library import PickleVoices
from scripts.benchmarks.voices import make_prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--size", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "1", "--cache-dir", str(folder)]
    command = [sys.executable, "scripts/benchmark.py", "voices", *arguments, "--json", str(folder / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout
    return {figure["key"]: figure for figure in json.loads((folder / "figures.json").read_text())["figures"]}


def test_every_figure_of_the_library_is_measured_and_those_with_a_baseline_are_compared(
    figures: dict[str, dict],
) -> None:
    assert set(figures) == {"open", "list", "memory", "disk", "cold", "warm", "audio-memory"}
    assert {key for key, figure in figures.items() if figure["ratio"] is None} == {"open", "list"}
    assert all(figure["ours"]["median"] > 0 for figure in figures.values())


def test_a_voice_from_memory_and_from_disk_are_compared_with_the_same_computing(figures: dict[str, dict]) -> None:
    assert figures["memory"]["baseline"] == figures["disk"]["baseline"]


def test_the_pickle_way_gives_the_audio_that_was_put_in_and_leaves_no_file(tmp_path: Path) -> None:
    audio = make_prompt()
    pickles = PickleVoices(tmp_path / "pickles")
    pickles.add("v", audio)
    assert np.abs(pickles.use_cold("v") - audio).max() <= 2.0**-15, "through 16-bit wav, as soundfile writes it"
    assert [path.name for path in (tmp_path / "pickles").iterdir()] == ["v.pkl.gz"]
