"""What was asked for, and who takes part.

A contender is one side in one setting. Against upstream, upstream is the baseline of all of ours; against
itself, our first setting is the baseline of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.models import ModelSpec, get_model

if TYPE_CHECKING:
    import torch

    from engine.device import DevicePlan
    from engine.random_checkpoint import Size

Against = Literal["upstream", "self", "nothing"]
Side = Literal["ours", "upstream"]

MOST_TINY_TOKENS = 120
"""A tiny Turbo's T3 is 128 wide, and the speech planted in it must be shorter than that (`PlantedSpeech`)."""


@dataclass(frozen=True)
class Contender:
    """One side in one setting.

    Args:
        side: ours or upstream.
        dtype: of T3 and the flow: auto, float32 or bfloat16 (upstream: float32, as its own loader gives).
        num_threads: of torch on the CPU.
        rows: chunks decoded at once; None where a row of figures has no such choice, or the engine makes it.
    """

    side: Side
    dtype: str
    num_threads: int
    rows: int | None = None


@dataclass(frozen=True)
class Options:
    """A run's settings.

    Args:
        model: a name of `engine.models.MODELS`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        against: who the baseline is.
        dtypes, rows, threads: our settings, each in turn; empty for the default.
        repeats: rounds that count.
        size: "full" for figures, "tiny" to try the program.
        num_tokens: speech tokens of a chunk; None for each row's own number.
        cache_dir: where checkpoints are kept.
        seed: of the weights.
    """

    model: str = "turbo"
    device: str = "auto"
    against: Against = "nothing"
    dtypes: tuple[str, ...] = ("auto",)
    rows: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    repeats: int = 3
    size: Size = "full"
    num_tokens: int | None = None
    cache_dir: Path = Path(".cache/benchmark")
    seed: int = 0

    @property
    def spec(self) -> ModelSpec:
        return get_model(self.model)

    @functools.cached_property
    def place(self) -> torch.device:
        """The device that both sides run on.

        Raises:
            SpeechError: invalid_request when it is not on this machine.
        """
        return self.plan(Contender("ours", "float32", self._default_threads)).torch_device

    @functools.cached_property
    def _default_threads(self) -> int:
        from engine.device import choose
        from engine.machine import probe

        return choose(probe(), self.device, "float32").num_threads

    @property
    def thread_counts(self) -> tuple[int, ...]:
        return self.threads or (self._default_threads,)

    @property
    def is_on_gpu(self) -> bool:
        return self.place.type == "cuda"

    def plan(self, contender: Contender) -> DevicePlan:
        """What the engine makes of a contender's setting; sets torch's threads."""
        from engine import device as devices

        rows = 2 if self.spec.uses_cfg else 1
        return devices.resolve(self.device, contender.dtype, contender.num_threads, rows=rows)[0]

    def chunk_tokens(self, default: int) -> int:
        """Speech tokens of a chunk in a row of figures whose own number is `default`."""
        wanted = self.num_tokens or default
        return min(wanted, MOST_TINY_TOKENS) if self.size == "tiny" else wanted

    def ours(self, default_rows: tuple[int | None, ...] = (None,)) -> list[Contender]:
        """Our settings: every dtype, with every number of threads, with every number of rows."""
        rows = default_rows if default_rows == (None,) else self.rows or default_rows
        return [Contender("ours", *setting) for setting in itertools.product(self.dtypes, self.thread_counts, rows)]

    def contenders(self, default_rows: tuple[int | None, ...] = (None,)) -> list[Contender]:
        """All who take part; the first is the baseline unless it is against nothing.

        Args:
            default_rows: numbers of rows to measure where none are asked for; (None,) where there is no choice.
        """
        ours = self.ours(default_rows)
        if self.against != "upstream":
            return ours
        return [Contender("upstream", "float32", self.thread_counts[0], 1), *ours]

    def replace(self, **changes: object) -> Options:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
