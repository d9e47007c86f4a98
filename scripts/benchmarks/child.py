"""One side in a process of its own, for what only a fresh process shows: its start and its memory.

Run by starting.py: `python -m scripts.benchmarks.child '{"side": "ours", …}'`. Prints a line of JSON when it
is ready to speak the built-in voice, and one more when it has spoken a few tokens (by then all weights have
been touched: pages that are only mapped do not count as resident before).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.options import Options

NUM_TOKENS = 8
"""Spoken after loading. Few, because the start is measured; several, because random weights may give control
tokens, which are not spoken."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what upstream prints is not a report
    options = Options(model=asked["model"], device=asked["device"], size=asked["size"])
    load = {"ours": load_ours, "upstream": load_upstream}[asked["side"]]
    speak, dtype = load(options, Path(asked["folder"]), asked["dtype"], asked["num_threads"])
    _report(reports, "ready", dtype)
    speak()
    _report(reports, "spoken", dtype)


def load_ours(options: Options, folder: Path, dtype: str, num_threads: int) -> tuple[Callable[[], object], str]:
    from engine import Engine, EngineConfig, SpeechRequest

    engine = Engine.load(
        EngineConfig(model=options.model, model_dir=folder, device=options.device, dtype=dtype, num_threads=num_threads)
    )
    request = SpeechRequest(text="One.", seed=1, max_new_tokens=NUM_TOKENS)

    def speak() -> object:
        with engine:
            return engine.speak(request)

    stats = engine.stats()
    return speak, f"{stats['dtype']}, flow {stats['flow_dtype']}"


def load_upstream(options: Options, folder: Path, _: str, num_threads: int) -> tuple[Callable[[], object], str]:
    """By upstream's own `from_local`, where it knows the checkpoint."""
    from scripts.benchmarks.upstream import load_speaker, quiet, upstream_class

    if options.size == "full" and options.model in ("turbo", "original", "multilingual"):
        with quiet():
            speaker = upstream_class(options.spec.family).from_local(folder, asked_device(options))
    else:
        speaker = load_speaker(options, folder)
    import torch

    torch.set_num_threads(num_threads)
    return lambda: _speak_upstream(options, speaker), "float32"


def asked_device(options: Options) -> str:
    """Found without the engine's probing, which would count as upstream's time."""
    import torch

    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _speak_upstream(options: Options, speaker: Any) -> object:
    import torch

    from engine.models import SPEECH_VOCAB_SIZE, START_TEXT_TOKEN, STOP_TEXT_TOKEN
    from scripts.benchmarks.decoding import upstream_tokens
    from scripts.benchmarks.upstream import quiet

    device = speaker.t3.speech_emb.weight.device
    text = torch.tensor([[START_TEXT_TOKEN, 300, STOP_TEXT_TOKEN]], device=device)
    with quiet():
        tokens = torch.tensor(upstream_tokens(speaker, options.spec, text, NUM_TOKENS), device=device)
        spoken = tokens[tokens < SPEECH_VOCAB_SIZE]
        waveform, _ = speaker.s3gen.inference(speech_tokens=spoken, ref_dict=speaker.conds.gen)
        return speaker.watermarker.apply_watermark(waveform[0].cpu().numpy(), sample_rate=speaker.sr)


def _report(reports: Any, event: str, dtype: str) -> None:
    reports.write(json.dumps({"event": event, "dtype": dtype, **memory_bytes()}) + "\n")
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
