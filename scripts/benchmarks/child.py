"""One side in a process of its own, for what only a fresh process shows: its start and its memory.

Run by starting.py: `python -m scripts.benchmarks.child '{"side": "ours", …}'`. Prints a line of JSON when it
is ready to speak the built-in voice, and one more when it has spoken a chunk (by then all weights have been
touched: pages that are only mapped do not count as resident before).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.options import Options

Speak = Callable[[], tuple[float, str]]
"""Says the text; gives the audio's seconds, and what it was computed in."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what upstream prints is not a report
    options = Options(model=asked["model"], device=asked["device"], size=asked["size"])
    if asked["side"] == "ours":
        speak = load_ours(asked["text"])
    else:
        speak = load_upstream(options, Path(asked["folder"]), asked["text"], asked["num_threads"])
    _report(reports, "ready")
    audio_s, dtype = speak()
    _report(reports, "spoken", audio_s=audio_s, dtype=dtype)


def load_ours(text: str) -> Speak:
    """A worker as the platform's is loaded, by the environment; then a job, up to the encoded audio."""
    from jobs.settings import read_settings
    from jobs.worker import Worker

    worker = Worker.load(read_settings())

    def run(**fields: object) -> dict[str, Any]:
        result = asyncio.run(worker.run({"id": "first", "input": fields}))
        assert "error" not in result, result
        return result

    def speak() -> tuple[float, str]:
        result = run(text=text, seed=1)
        assert all(chunk["attempts"] == 1 for chunk in result["chunks"]), result["chunks"]
        stats = run(operation="info")["engine"]
        return result["duration_s"], f"{stats['dtype']}, flow {stats['flow_dtype']}"

    return speak


def load_upstream(options: Options, folder: Path, text: str, num_threads: int) -> Speak:
    """By upstream's own `from_local`, where it knows the checkpoint; then its `generate`, with the voice ready-made."""
    from scripts.benchmarks.upstream import generate, load_speaker, quiet, upstream_class

    if options.size == "full" and options.model in ("turbo", "original", "multilingual"):
        with quiet():
            speaker = upstream_class(options.spec.family).from_local(folder, asked_device(options))
    else:
        speaker = load_speaker(options, folder)
    import torch

    torch.set_num_threads(num_threads)
    return lambda: (generate(speaker, text).shape[-1] / speaker.sr, "float32")


def asked_device(options: Options) -> str:
    """Found without the engine's probing, which would count as upstream's time."""
    import torch

    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(reports: Any, event: str, **more: object) -> None:
    reports.write(json.dumps({"event": event, **more, **memory_bytes()}) + "\n")
    reports.flush()


def memory_bytes() -> dict[str, float]:
    """This process's memory, by Linux's counters (proc_pid_status(5), proc_pid_smaps(5)); empty elsewhere.

    resident counts every page in memory, those mapped from the weight files too; anonymous only what is the
    process's own and has no file behind it; unique what no other process shares.
    """
    counters = _kilobytes("/proc/self/status") | _kilobytes("/proc/self/smaps_rollup")
    if "VmRSS" not in counters:
        return {}
    unique = counters.get("Private_Clean", 0) + counters.get("Private_Dirty", 0)
    kilobytes = {"resident": counters["VmRSS"], "anonymous": counters.get("RssAnon", 0), "unique": unique}
    return {name: 1024.0 * count for name, count in kilobytes.items()}


def _kilobytes(path: str) -> dict[str, int]:
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


if __name__ == "__main__":
    main()
