"""The benchmark as a person runs it: what it writes is complete, and its ratios are those of its medians."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks.figures import BenchmarkError, Better, Figure, Outcome, Runner, Series, Target, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.plot import throughput_of, write_plot
from scripts.benchmarks.starting import check_length, worker_environment
from scripts.benchmarks.targets import target
from scripts.benchmarks.weights import distinct_tokens

ROOT = Path(__file__).resolve().parent.parent
OURS = Contender("ours", "float32", 1)
UPSTREAM = Contender("upstream", "float32", 1, 1)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the runs, so that the tiny weights are written once."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def against_upstream(cache_dir: Path) -> dict[str, Any]:
    """One real run of a row against upstream's own code, and what it wrote."""
    file, plot = cache_dir / "figures.json", cache_dir / "curves.png"
    arguments = [
        *("t3", "--size", "tiny", "--device", "cpu", "--against", "upstream", "--rows", "1,2", "--threads", "1"),
        *("--tokens", "12", "--repeats", "2", "--cache-dir", str(cache_dir), "--json", str(file), "--plot", str(plot)),
    ]
    done = run_benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    return {"printed": done.stdout, "plot": plot, **json.loads(file.read_text())}


def recompute_ratio(figure: dict[str, Any]) -> float:
    ours, baseline = (statistics.median(figure[side]["samples"]) for side in ("ours", "baseline"))
    return {"ours / baseline": ours / baseline, "baseline / ours": baseline / ours}[figure["ratio_is"]]


def test_a_run_against_upstream_gives_a_figure_for_every_number_of_rows(against_upstream: dict[str, Any]) -> None:
    figures = [figure for figure in against_upstream["figures"] if figure["key"] == "tokens_per_s"]
    assert [figure["ours"]["rows"] for figure in figures] == [1, 2]
    for figure in figures:
        assert figure["baseline"]["side"] == "upstream"
        assert len(figure["ours"]["samples"]) == len(figure["baseline"]["samples"]) == 2
        assert all(sample > 0 for side in ("ours", "baseline") for sample in figure[side]["samples"])


def test_ratios_are_quotients_of_the_medians_that_stand_beside_them(against_upstream: dict[str, Any]) -> None:
    compared = [figure for figure in against_upstream["figures"] if figure["baseline"]]
    assert compared
    for figure in compared:
        assert figure["ratio"] == pytest.approx(recompute_ratio(figure))
        for side in ("ours", "baseline"):
            samples = figure[side]["samples"]
            expected = (statistics.median(samples), min(samples), max(samples))
            assert (figure[side]["median"], figure[side]["min"], figure[side]["max"]) == expected


def test_what_is_written_names_machine_versions_weights_and_settings(against_upstream: dict[str, Any]) -> None:
    assert against_upstream["machine"]["cpu"] and against_upstream["machine"]["cores"] >= 1
    assert {"worker-chatterbox", "torch", "chatterbox-tts"} <= set(against_upstream["versions"])
    assert against_upstream["weights"] == {"kind": "random", "model": "turbo", "size": "tiny", "seed": 0}
    for figure in against_upstream["figures"]:
        assert (figure["ours"]["dtype"], figure["ours"]["num_threads"]) != ("auto", None)
    assert "nothing about audio quality" in against_upstream["about"]


def test_the_table_shows_what_is_written(against_upstream: dict[str, Any]) -> None:
    first = against_upstream["figures"][0]
    assert first["title"] in against_upstream["printed"] and f"{first['ratio']:.3g} x" in against_upstream["printed"]
    assert "nothing about audio quality" in " ".join(against_upstream["printed"].split())


def test_a_plot_is_drawn(against_upstream: dict[str, Any]) -> None:
    assert against_upstream["plot"].read_bytes().startswith(b"\x89PNG")


def test_against_itself_the_first_setting_is_the_baseline_of_the_others(
    cache_dir: Path, against_upstream: dict[str, Any]
) -> None:
    file = cache_dir / "self.json"
    arguments = [
        *("vocoder", "--size", "tiny", "--device", "cpu", "--against", "self", "--dtypes", "float32,bfloat16"),
        *("--threads", "1", "--repeats", "1", "--cache-dir", str(cache_dir), "--json", str(file)),
    ]
    done = run_benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(file.read_text())["figures"]
    assert first["baseline"] is None and first["ratio"] is None
    assert second["baseline"] == first["ours"]
    assert second["ratio"] == pytest.approx(recompute_ratio(second))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nothing-like-it", "long-form"),
        ("t3 --model turbot", "turbo, nano"),
        ("t3 --rows 1,none", "whole numbers"),
        ("t3 --threads 0", "whole numbers"),
        ("t3 --dtype float8", "bfloat16"),
        ("t3 --repeats 0", "repeats"),
        ("t3 --size medium", "tiny"),
        ("t3 --against everyone", "upstream"),
        ("flow --plot curves.png", "throughput"),
        ("t3 --device cuda:99", "cuda:99"),
    ],
)
def test_a_bad_argument_is_told_and_nothing_is_measured(arguments: str, said: str, tmp_path: Path) -> None:
    # Tiny first, so that a case that comes to be taken does not measure for minutes; a later --size overrides it.
    row, *rest = arguments.split()
    done = run_benchmark(row, "--size", "tiny", "--cache-dir", str(tmp_path), *rest)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


# ---------------------------------------------------------------------------------------- without a process


def series(contender: Contender, *samples: float) -> Series:
    return Series(contender, contender.dtype, samples)


@pytest.mark.parametrize(
    ("better", "ratio_is", "expected"), [("more", "gain", 4.0), ("less", "gain", 0.25), ("less", "share", 4.0)]
)
def test_a_gain_is_above_one_when_ours_is_better_and_a_share_is_of_the_baseline(
    better: Better, ratio_is: Any, expected: float
) -> None:
    ours, theirs = series(OURS, 7.0, 8.0, 100.0), series(UPSTREAM, 1.0, 2.0, 2.5)
    assert Figure("row", "key", "", "s", better, ours, theirs, ratio_is).ratio == expected


@pytest.mark.parametrize(
    ("goal", "ratio", "met"),
    [
        (Target(ratio_at_least=2), 2.0, True),
        (Target(ratio_at_least=2), 1.9, False),
        (Target(ratio_at_most=0.7), 0.8, False),
        (Target(ratio_at_least=2), None, None),
        (Target(value_at_least=10), None, True),
        (Target(value_at_most=9), None, False),
        (Target(ratio_at_least=2, value_at_least=11), 3.0, False),
    ],
)
def test_a_target_is_met_only_when_all_that_it_asks_for_is_reached(
    goal: Target, ratio: float | None, met: bool | None
) -> None:
    assert goal.is_met(10.0, ratio) is met


def test_sides_take_turns_and_only_the_rounds_after_the_warm_up_count() -> None:
    order: list[str] = []

    def load(contender: Contender) -> Runner:
        def run() -> dict[str, float]:
            order.append(contender.side)
            return {"place": float(len(order))}

        return Runner(run, contender.dtype, close=lambda: order.append("closed"))

    outcome = take_turns([UPSTREAM, OURS], load, 2, has_baseline=True)
    assert order == ["upstream", "ours"] * 3 + ["closed"] * 2
    assert outcome.series(0, "place").samples == (3.0, 5.0)
    assert [(a.contender.side, b and b.contender.side) for a, b in outcome.compare("place")] == [("ours", "upstream")]


def test_every_of_our_settings_is_compared_with_the_one_baseline() -> None:
    options = Options(against="self", dtypes=("float32", "bfloat16"), threads=(1, 2), rows=(1, 8))
    contenders = options.contenders((4,))
    assert [(c.dtype, c.num_threads, c.rows) for c in contenders][:3] == [
        ("float32", 1, 1),
        ("float32", 1, 8),
        ("float32", 2, 1),
    ]
    outcome = Outcome(contenders, [c.dtype for c in contenders], [[{"s": 1.0}]] * 8, has_baseline=True)
    baselines: Sequence[Series | None] = [baseline for _, baseline in outcome.compare("s")]
    assert baselines == [None] + [outcome.series(0, "s")] * 7


def test_tiny_models_and_other_comparisons_have_no_targets() -> None:
    full = Options(device="cpu", against="upstream")
    assert target(full, "t3", 8) == Target(ratio_at_least=10)
    assert target(full.replace(size="tiny"), "t3", 8) is None
    assert target(full.replace(against="self"), "t3", 8) is None
    assert target(full.replace(model="nano"), "t3", 8) is None


def test_planted_tokens_are_different_and_always_the_same() -> None:
    tokens = distinct_tokens(500, seed=0)
    assert len(set(tokens)) == 500 and tokens == distinct_tokens(500, seed=0)


def test_figures_without_rows_cannot_be_plotted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        write_plot(tmp_path / "curves.png", [Figure("flow", "seconds", "", "s", "less", series(OURS, 1.0))], "")
    assert throughput_of([Figure("t3", "tokens_per_s", "", "", "more", series(OURS, 1.0))])


@pytest.mark.parametrize(("audio_s", "is_refused"), [(2.4, False), (2.52, False), (2.0, True), (5.0, True)])
def test_a_start_counts_only_where_a_side_said_what_it_was_to(audio_s: float, is_refused: bool) -> None:
    with pytest.raises(BenchmarkError, match="expected 2.40 s") if is_refused else contextlib.nullcontext():
        check_length(audio_s, 60, OURS)


def test_a_start_is_measured_with_a_workers_own_settings_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICES_DIR", "/voices")
    monkeypatch.setenv("DTYPE", "bfloat16")
    environment = worker_environment(Options(model="turbo", device="cpu"), Path("weights"), OURS)
    assert "VOICES_DIR" not in environment
    assert (environment["MODEL"], environment["DTYPE"], environment["OMP_NUM_THREADS"]) == ("turbo", "float32", "1")
    assert Path(environment["MODEL_DIR"]).is_absolute()
