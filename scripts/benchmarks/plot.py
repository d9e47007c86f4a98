"""Throughput and latency against the number of rows: what joining rows brings, and what it costs each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.figures import Figure

THROUGHPUT_KEYS = ("tokens_per_s", "audio_s_per_s")
_OURS, _UPSTREAM, _LATENCY = "#1f6f8b", "#8a8a8a", "#c8553d"


def write_plot(path: Path, figures: Sequence[Figure], title: str) -> None:
    """Draw the rows of `t3` (or else `throughput`) into a file; its suffix says the format.

    Raises:
        ValueError: when nothing was measured that has rows.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws without a screen
    from matplotlib import pyplot

    throughput = throughput_of(figures)
    steps = [figure for figure in figures if figure.key == "step_ms"]
    canvas, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    _draw(axes, throughput, _OURS, "o-", f"throughput ({throughput[0].unit})")
    axes.set(title=title, xlabel="rows decoded at once", ylabel=throughput[0].unit, ylim=(0, None))
    baseline = throughput[0].baseline
    if baseline is not None and baseline.contender.side == "upstream":
        axes.axhline(baseline.median, color=_UPSTREAM, linestyle="--", label="upstream, one after another")
    axes.set_xscale("log", base=2)
    axes.set_xticks([_rows(figure) for figure in throughput], [str(_rows(figure)) for figure in throughput])
    if steps:
        right = axes.twinx()
        _draw(right, steps, _LATENCY, "s--", "latency (ms per step)")
        right.set(ylabel="ms per step", ylim=(0, None))
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(canvas)


def throughput_of(figures: Sequence[Figure]) -> list[Figure]:
    """What is to be drawn: the figures of the first of our settings, by rows.

    Raises:
        ValueError: when there are none.
    """
    for key in THROUGHPUT_KEYS:
        found = [figure for figure in figures if figure.key == key]
        if found:
            return sorted(found, key=_rows)
    raise ValueError("nothing to plot: only t3, throughput and all measure several numbers of rows")


def _rows(figure: Figure) -> int:
    return figure.ours.contender.rows or 1


def _draw(axes: object, figures: Sequence[Figure], colour: str, style: str, label: str) -> None:
    """A line through the medians with bars from least to most, per dtype and number of threads."""
    ordered = sorted(figures, key=_rows)
    for index, setting in enumerate(dict.fromkeys(_setting(figure) for figure in ordered)):
        line = [figure.ours for figure in ordered if _setting(figure) == setting]
        rows = [series.contender.rows or 1 for series in line]
        spread = [
            [series.median - min(series.samples) for series in line],
            [max(series.samples) - series.median for series in line],
        ]
        named = label if index == 0 and len({_setting(figure) for figure in ordered}) == 1 else f"{label}, {setting}"
        axes.errorbar(  # type: ignore[attr-defined]
            rows, [series.median for series in line], spread, fmt=style, color=colour, label=named, alpha=0.5**index
        )


def _setting(figure: Figure) -> str:
    return f"{figure.ours.dtype}, {figure.ours.contender.num_threads} threads"
