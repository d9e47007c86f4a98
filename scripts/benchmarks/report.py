"""What comes out: a table for people and JSON for machines, with the machine and the versions it holds for."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.info import versions
from scripts.benchmarks.figures import Figure, Series
from scripts.benchmarks.options import Options

ABOUT = "Random weights: the figures are about speed and memory. They say nothing about audio quality."


def document(options: Options, figures: Sequence[Figure], command: str) -> dict[str, Any]:
    """All of a run, as plain values."""
    return {
        "about": ABOUT,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "weights": {"kind": "random", "model": options.model, "size": options.size, "seed": options.seed},
        "device": str(options.place),
        "against": options.against,
        "repeats": options.repeats,
        "figures": [figure.to_json() for figure in figures],
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    from engine.machine import probe

    found = probe()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": found.num_cores,
        "cpu_bf16": found.cpu_bf16,
        "memory_gib": _memory_gib(),
        "gpu": found.cuda[0].name if found.cuda else None,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1)


# ---------------------------------------------------------------------------------------- the table


def print_table(console: Console, contents: dict[str, Any], figures: Sequence[Figure], options: Options) -> None:
    has_baseline = any(figure.baseline for figure in figures)
    table = Table(title=f"{options.model}, {options.size} size, on {contents['device']}")
    table.add_column("")
    table.add_column("ours (min to max)", justify="right")
    if has_baseline:
        table.add_column(_baseline_title(figures, options), justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("target")
    table.add_column("in", overflow="fold")
    for figure in figures:
        table.add_row(*_cells(figure, has_baseline=has_baseline))
    console.print(table)
    for line in _small_print(contents, figures):
        console.print(line, highlight=False)


def _baseline_title(figures: Sequence[Figure], options: Options) -> str:
    """Who the baseline is; the library's rows have their own, which their notes name."""
    if any(figure.row == "voices" for figure in figures):
        return "baseline"
    return "upstream" if options.against == "upstream" else "first setting"


def _cells(figure: Figure, *, has_baseline: bool) -> list[str]:
    cells = [figure.title, _with_spread(figure.ours, figure.unit)]
    if has_baseline:
        cells.append(_with_spread(figure.baseline, figure.unit) if figure.baseline else "")
        cells.append("" if figure.ratio is None else f"{figure.ratio:.3g} x")
    setting = f"{figure.ours.dtype}, {figure.ours.contender.num_threads} threads"
    return [*cells, _target_cell(figure), setting]


def _with_spread(series: Series, unit: str) -> str:
    low, high = min(series.samples), max(series.samples)
    return f"{_number(series.median)} {unit} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _target_cell(figure: Figure) -> str:
    if figure.target is None:
        return ""
    goal = figure.target
    bounds = (("≥", goal.ratio_at_least, " x"), ("≤", goal.ratio_at_most, " x"))
    values = (("≥", goal.value_at_least, f" {figure.unit}"), ("≤", goal.value_at_most, f" {figure.unit}"))
    asked = " and ".join(f"{sign} {bound:g}{unit}" for sign, bound, unit in (*bounds, *values) if bound is not None)
    verdict = {True: "met", False: "missed", None: "not compared"}[figure.is_met]
    return f"{asked}: {verdict}"


def _small_print(contents: dict[str, Any], figures: Sequence[Figure]) -> list[str]:
    where, found = contents["machine"], contents["versions"]
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    weights = contents["weights"]
    return [
        *_notes(figures),
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB{gpu}; {where['system']}.",
        ", ".join(f"{name} {version}" for name, version in found.items() if version) + ".",
        f"Median of {contents['repeats']} after a warm-up, sides in turn. Weights: {weights['kind']}, "
        f"{weights['size']} size, seed {weights['seed']}. {ABOUT}",
    ]


def _notes(figures: Sequence[Figure]) -> list[str]:
    """What was measured, once for all lines of a row that share it."""
    titles: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if figure.note:
            titles.setdefault((figure.row, figure.note), []).append(figure.title)
    return [f"{row if len(set(shared)) > 1 else shared[0]}: {note}." for (row, note), shared in titles.items()]
