"""Measures the engine on this machine: `python scripts/benchmark.py all --model turbo --against upstream`.

Rows of figures: t3, flow, vocoder, utterance, long-form, stream, plan, throughput, voice, voices, cold-start, memory,
speak, or all of them. A benchmark is not a test: it measures and never fails for being slow. Weights are random, so
nothing is said about audio quality. How it is built: `scripts/benchmarks/__init__.py`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from engine.errors import SpeechError  # noqa: E402
from engine.models import MODELS  # noqa: E402
from scripts.benchmarks.figures import BenchmarkError, Figure  # noqa: E402
from scripts.benchmarks.options import Options  # noqa: E402
from scripts.benchmarks.rows import Row, measure  # noqa: E402

TABLE_WIDTH = 160
"""Where there is no terminal to ask."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
WITH_PLOT = (Row.T3, Row.THROUGHPUT, Row.ALL)


class Against(StrEnum):
    """Who the baseline is."""

    UPSTREAM = "upstream"
    SELF = "self"
    NOTHING = "nothing"


class Size(StrEnum):
    """Of the weights."""

    FULL = "full"
    TINY = "tiny"


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """ "1,8,16" → (1, 8, 16); nothing → ()."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        message = f"expected whole numbers above 0, separated by commas, got {text!r}"
        raise typer.BadParameter(message, param_hint=option)
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_names(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    """ "float32,bfloat16" → ("float32", "bfloat16")."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(parts) <= set(known):
        raise typer.BadParameter(f"expected {', '.join(known)}, got {text!r}", param_hint=option)
    return parts


def main(
    row: Annotated[Row, typer.Argument(help="What to measure.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(MODELS)}.")] = "turbo",
    against: Annotated[Against, typer.Option(help="Upstream's own code, our first setting, or nothing.")] = (
        Against.NOTHING
    ),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; of both sides.")] = "auto",
    dtypes: Annotated[
        str, typer.Option("--dtype", "--dtypes", metavar="LIST", help="Ours: auto, float32, bfloat16, float16.")
    ] = "auto",
    rows: Annotated[str, typer.Option(metavar="LIST", help="Chunks decoded at once, such as 1,8.")] = "",
    threads: Annotated[str, typer.Option(metavar="LIST", help="CPU threads, such as 1,2.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, after a warm-up.")] = 3,
    size: Annotated[Size, typer.Option(help="Of the weights: full for figures, tiny to try the program.")] = Size.FULL,
    tokens: Annotated[int | None, typer.Option(min=2, max=480, help="Speech tokens of a chunk.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them against rows.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Where the weights are kept.")] = ROOT / ".cache" / "benchmark",
) -> None:
    """Measure this engine: against upstream's own code, against itself, or by itself."""
    if plot_file is not None and row not in WITH_PLOT:
        raise typer.BadParameter(f"only {', '.join(WITH_PLOT)} have rows to plot", param_hint="--plot")
    if model not in MODELS:
        raise typer.BadParameter(f"expected one of {', '.join(MODELS)}, got {model!r}", param_hint="--model")
    options = Options(
        model=model,
        device=device,
        against=against.value,
        dtypes=parse_names(dtypes, DTYPES, "--dtype"),
        rows=parse_counts(rows, "--rows"),
        threads=parse_counts(threads, "--threads"),
        repeats=repeats,
        size=size.value,
        num_tokens=tokens,
        cache_dir=cache_dir,
    )
    keep_quiet()
    check_device(options)
    run(row, options, json_file, plot_file)


def keep_quiet() -> None:
    """No progress bars and log lines of packages between our own, and no question to a hub that is not needed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)


def check_device(options: Options) -> None:
    try:
        place = options.place
    except SpeechError as error:
        raise typer.BadParameter(error.message, param_hint="--device") from error
    if place.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"upstream is measured on cpu or cuda, not on {place}", param_hint="--device")


def run(row: Row, options: Options, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure, and write after every row, so that a long run that is broken off has told what it knew."""
    from scripts.benchmarks.plot import write_plot
    from scripts.benchmarks.report import document, print_table, write_json

    progress = Console(stderr=True)
    figures: list[Figure] = []
    contents = document(options, figures, command())
    try:
        for found in measure(row, options, lambda text: progress.print(f"[dim]{text}[/dim]")):
            figures += found
            contents = document(options, figures, command())
            if json_file is not None:
                write_json(json_file, contents)
    except (BenchmarkError, SpeechError) as error:
        progress.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    finally:
        if figures:
            print_table(Console(width=None if sys.stdout.isatty() else TABLE_WIDTH), contents, figures, options)
    if plot_file is not None:
        write_plot(plot_file, figures, f"{options.model} on {contents['machine']['gpu'] or contents['machine']['cpu']}")


def command() -> str:
    """How to run this again, without the paths of this machine."""
    return shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])


if __name__ == "__main__":
    typer.run(main)
