"""Workers and waiting jobs over time, one picture per plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.planning.prices import PlanError

_RUNNING, _STARTING, _WAITING = "#1f6f8b", "#e0a458", "#c8553d"


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw plans (`report.plan_row`) into a file; its suffix says the format.

    Raises:
        PlanError: when matplotlib is not installed or does not know the format, or when the file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlanError("--plot needs matplotlib: pip install matplotlib (requirements-dev.txt)") from error
    mpl.use("Agg")  # draws without a screen
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(len(rows), figsize=(8, 3 * len(rows)), constrained_layout=True, squeeze=False)
    for axes, row in zip(all_axes[:, 0], rows, strict=True):
        _draw(axes, row)
    figure.legend(*_labels(all_axes[0, 0]), loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise PlanError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _draw(axes: Any, row: Mapping[str, Any]) -> None:
    points = row["workers_over_time"]
    hours = [point["s"] / 3600 for point in points]
    running = [point["running"] for point in points]
    workers = [point["running"] + point["starting"] for point in points]
    axes.fill_between(hours, workers, color=_STARTING, step="post", label="starting")
    axes.fill_between(hours, running, color=_RUNNING, step="post", label="running")
    axes.set(title=f"{row['kind']}, {row['mode']}", xlabel="hours", ylabel="workers", ylim=(0, None))
    right = axes.twinx()
    right.plot(hours, [point["waiting"] for point in points], color=_WAITING, linewidth=1)
    axes.plot([], [], color=_WAITING, label="jobs waiting (right)")
    right.set(ylabel="jobs waiting", ylim=(0, None))


def _labels(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels
