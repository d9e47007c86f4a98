"""Which device, which dtype, how many threads, and why.

What was found on the machine (`engine.machine.Probe`) is kept apart from what follows from it
(`choose`, a pure function), so that the decisions for a GPU, a server CPU and an Apple laptop are
tested on any machine. What is process-wide by nature in torch is set in one place, `apply`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import SpeechError
from engine.kernels import HalfMatrix, product
from engine.machine import Probe, ask_for_huge_pages, probe

MIN_BF16_GAIN = 1.1
"""How much faster bf16 must be measured before it is worth its lost digits; below lies timing noise."""

FLOW_ROWS = 256
"""Rows at which bf16 is measured for the flow, which multiplies whole mel sequences."""

DTYPES = ("auto", "float32", "bfloat16", "float16")

_BF16_CAPABILITY = (8, 0)
"""Ampere: the first CUDA capability with bf16 in hardware (CUDA C Programming Guide)."""


@dataclass(frozen=True)
class DevicePlan:
    """What was decided.

    Args:
        device: "cpu", "mps" or "cuda:N".
        dtype: "float32", "bfloat16" or, on x86 CPUs, "float16", of T3's weights.
        num_threads: of torch on the CPU.
        reasons: why, one sentence per decision.
        warnings: what the user should know.
        flow_dtype: of the flow's autocast. The vocoder is float32 always.
    """

    device: str
    dtype: str
    num_threads: int
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    flow_dtype: str = "float32"

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return dtypes[self.dtype]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of T3's keys and values. On a CPU bf16 ones would be emulated."""
        is_short = self.device_type == "cuda" or self.dtype == "float16"
        return self.torch_dtype if is_short else torch.float32


@dataclass(frozen=True)
class _Choice:
    value: str
    reason: str
    warning: str | None = None


# ---------------------------------------------------------------------------------------- deciding


def choose(probe: Probe, device: str = "auto", dtype: str = "auto", num_threads: int | None = None) -> DevicePlan:
    """Decide from what was probed; the same probe gives the same plan.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto", "float32", "bfloat16" or, where `engine.kernels` run, "float16".
        num_threads: None for one per performance core.

    Raises:
        SpeechError: invalid_request naming `device`, `dtype` or `num_threads`, when it is not a value there is
            or the device is not on this machine.
    """
    place = _choose_device(probe, device)
    t3 = _choose_dtype(probe, place.value, dtype, probe.bf16_gain, "T3")
    if dtype == "auto" and place.value == "cpu" and probe.half_kernels:
        t3 = _choose_half(probe, t3)
    # float16 is a layout of T3's matrices on a CPU; the flow's masks overflow in it.
    flow_dtype = "float32" if dtype == "float16" else dtype
    flow = _choose_dtype(probe, place.value, flow_dtype, probe.bf16_flow_gain, "flow")
    threads, threads_reason = _choose_threads(probe, num_threads)
    return DevicePlan(
        device=place.value,
        dtype=t3.value,
        num_threads=threads,
        reasons=(place.reason, t3.reason, flow.reason, threads_reason),
        warnings=tuple(choice.warning for choice in (place, t3) if choice.warning),
        flow_dtype=flow.value,
    )


def _choose_device(probe: Probe, wanted: str) -> _Choice:
    if wanted == "auto":
        return _choose_any_device(probe)
    if wanted == "cpu":
        return _Choice("cpu", "cpu: asked for")
    if wanted == "mps":
        return _choose_mps(probe)
    if re.fullmatch(r"cuda(:\d+)?", wanted):
        return _choose_cuda(probe, int(wanted.partition(":")[2] or 0))
    raise SpeechError("invalid_request", f"expected device auto, cpu, cuda, cuda:N or mps, got {wanted!r}", "device")


def _choose_any_device(probe: Probe) -> _Choice:
    if probe.cuda and _has_kernels(probe.cuda[0].capability, probe.cuda_arches):
        return _Choice("cuda:0", f"cuda:0: {probe.cuda[0].name} is there")
    if probe.cuda:
        return _Choice("cpu", "cpu: the GPU cannot be used", f"speaking on the CPU: {_no_kernels(probe, 0)}")
    if probe.system == "Darwin":
        return _Choice("cpu", "cpu: the reliable default on Apple machines; DEVICE=mps tries the GPU")
    return _Choice("cpu", "cpu: no GPU was found")


def _choose_mps(probe: Probe) -> _Choice:
    if not probe.mps_available:
        why = "this torch is built without it" if not probe.mps_built else "macOS does not offer a Metal GPU here"
        raise SpeechError("invalid_request", f"device mps is not available: {why}", "device")
    return _Choice("mps", "mps: asked for; kept if a probe utterance succeeds")


def _choose_cuda(probe: Probe, index: int) -> _Choice:
    if index >= len(probe.cuda):
        found = f"{len(probe.cuda)} found" if probe.cuda else "torch sees no NVIDIA GPU"
        raise SpeechError("invalid_request", f"device cuda:{index} is not available: {found}", "device")
    if not _has_kernels(probe.cuda[index].capability, probe.cuda_arches):
        raise SpeechError(
            "invalid_request", f"device cuda:{index} cannot be used: {_no_kernels(probe, index)}", "device"
        )
    return _Choice(f"cuda:{index}", f"cuda:{index}: asked for ({probe.cuda[index].name})")


def _has_kernels(capability: tuple[int, int], arches: tuple[str, ...]) -> bool:
    """Binaries (sm_XY) run on the same major and an equal or higher minor, PTX (compute_XY) on all that is newer."""
    if not arches:
        return True
    built = [match for arch in arches if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch))]
    return any(
        (kind == "sm" and int(major) == capability[0] and int(minor) <= capability[1])
        or (kind == "compute" and (int(major), int(minor)) <= capability)
        for kind, major, minor in (match.groups() for match in built)
    )


def _no_kernels(probe: Probe, index: int) -> str:
    gpu = probe.cuda[index]
    major, minor = gpu.capability
    return f"this torch has no kernels for {gpu.name} (sm_{major}{minor}; it has {', '.join(probe.cuda_arches)})"


def _has_bf16(probe: Probe, device: str) -> bool:
    return probe.cuda[int(device.partition(":")[2])].capability >= _BF16_CAPABILITY


def _choose_dtype(probe: Probe, device: str, wanted: str, gain: float | None, part: str) -> _Choice:
    if wanted not in DTYPES:
        raise SpeechError("invalid_request", f"expected dtype {', '.join(DTYPES)}, got {wanted!r}", "dtype")
    if wanted == "float16" and (device != "cpu" or not probe.half_kernels):
        where = f"{device} on {probe.system} {probe.machine}"
        raise SpeechError(
            "invalid_request", f"dtype float16 is for x86 CPUs with AVX2 under Linux, this is {where}", "dtype"
        )
    emulated = wanted == "bfloat16" and device.startswith("cuda") and not _has_bf16(probe, device)
    if wanted != "auto":
        warning = "this GPU emulates bfloat16; float32 is faster here" if emulated else None
        return _Choice(wanted, f"{part} {wanted}: asked for", warning)
    if device == "mps":
        return _Choice("float32", f"{part} float32: bf16 is not measured on mps")
    if device.startswith("cuda"):
        if _has_bf16(probe, device):
            return _Choice("bfloat16", f"{part} bfloat16: half the bytes to read, and reading bounds decoding on a GPU")
        return _Choice("float32", f"{part} float32: this GPU has no bf16 in hardware")
    return _choose_measured(gain, part, native=probe.cpu_bf16)


def _choose_measured(gain: float | None, part: str, *, native: bool) -> _Choice:
    if gain is None:
        return _Choice("float32", f"{part} float32: bf16 was not measured on this CPU")
    value = "bfloat16" if gain >= MIN_BF16_GAIN else "float32"
    hardware = "with" if native else "without"
    return _Choice(value, f"{part} {value}: bf16 measured at {gain:.2f} x float32 on this CPU {hardware} bf16 hardware")


def _choose_half(probe: Probe, otherwise: _Choice) -> _Choice:
    """float16 for T3, unless bf16 hardware was measured to be faster still."""
    if probe.half_gain is None or probe.bf16_gain is None:
        return _Choice("float16", "T3 float16: half the bytes to read, and reading bounds decoding on a CPU")
    measured = f"measured at {probe.half_gain:.2f} x float32 on this CPU, bf16 at {probe.bf16_gain:.2f} x"
    if probe.half_gain < max(MIN_BF16_GAIN, probe.bf16_gain):
        return dataclasses.replace(otherwise, reason=f"{otherwise.reason}; float16 {measured}")
    return _Choice("float16", f"T3 float16: {measured}")


def _choose_threads(probe: Probe, wanted: int | None) -> tuple[int, str]:
    if wanted is not None:
        if wanted < 1:
            raise SpeechError("invalid_request", f"expected at least one thread, got {wanted}", "num_threads")
        return wanted, f"{wanted} threads: asked for"
    from_environment = probe.env.get("OMP_NUM_THREADS", "")
    if from_environment.isdigit() and int(from_environment) > 0:
        return int(from_environment), f"{from_environment} threads: OMP_NUM_THREADS"
    cores, kind = probe.num_performance_cores or probe.num_cores, "physical"
    if probe.num_performance_cores:
        kind = "performance"  # a slow core in the team makes every other one wait at each product
    if probe.num_granted_cores is not None and probe.num_granted_cores < cores:
        cores, kind = probe.num_granted_cores, "granted"
    return max(1, cores), f"{max(1, cores)} threads: one per {kind} core"


# ------------------------------------------------------------------------------------- Apple's GPU


@dataclass(frozen=True)
class MpsTrial:
    """Whether the probe utterance came out well on Apple's GPU; `problem` says what was wrong."""

    problem: str | None = None

    @property
    def works(self) -> bool:
        return self.problem is None


def try_on_mps(run_probe: Callable[[], NDArray]) -> MpsTrial:
    """Run a probe utterance and judge it. Never raises: operators that MPS lacks come as exceptions of many kinds.

    Args:
        run_probe: speaks a short text with the loaded model, gives its waveform (T,).
    """
    try:
        waveform = np.asarray(run_probe())
    except Exception as error:  # see above: any failure at all means that the CPU speaks instead
        return MpsTrial(f"{type(error).__name__}: {error}")
    if not waveform.size or not np.any(waveform):
        return MpsTrial("the probe utterance is silent")
    if not np.isfinite(waveform).all():
        return MpsTrial("the probe utterance holds NaN or infinity")
    return MpsTrial()


def fall_back_to_cpu(plan: DevicePlan, trial: MpsTrial) -> DevicePlan:
    """The plan to go on with when Apple's GPU failed its trial: the CPU in float32, and a warning."""
    assert not trial.works
    return dataclasses.replace(
        plan,
        device="cpu",
        dtype="float32",
        flow_dtype="float32",
        reasons=(*plan.reasons, "cpu: mps failed its probe utterance"),
        warnings=(*plan.warnings, f"speaking on the CPU: mps failed its probe utterance ({trial.problem})"),
    )


# -------------------------------------------------------------------------------------- applying


def resolve(
    device: str = "auto", dtype: str = "auto", num_threads: int | None = None, *, rows: int = 1
) -> tuple[DevicePlan, Probe]:
    """Probe this machine, measure bf16 where the choice hangs on it (CPU and "auto"), decide and apply.

    Args:
        rows: decoder rows of one utterance (2 with CFG), at which bf16 is measured.

    Raises:
        SpeechError: as `choose`.
    """
    found = probe()
    plan = choose(found, device, dtype, num_threads)
    apply(plan)  # before measuring: the gain depends on the number of threads
    # Without the hardware bf16 is emulated, which loses as soon as two rows share a step.
    if dtype == "auto" and plan.device == "cpu" and found.cpu_bf16:
        t3_gains = measure_gains(("bfloat16", "float16") if found.half_kernels else ("bfloat16",), rows)
        found = dataclasses.replace(
            found,
            bf16_gain=t3_gains["bfloat16"],
            half_gain=t3_gains.get("float16"),
            bf16_flow_gain=measure_gains(("bfloat16",), FLOW_ROWS)["bfloat16"],
        )
        plan = choose(found, device, dtype, num_threads)
    return plan, found


def apply(plan: DevicePlan) -> None:
    """Set what torch keeps per process. Called once, before the weights load."""
    torch.set_num_threads(plan.num_threads)
    # TF32 is audible in the vocoder's F0 predictor as a wavering pitch, conditioning must equal upstream's, and what
    # is large runs in bf16. The flags belong to the process: switching them while several threads speak would make a
    # voice depend on what runs beside it.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Every utterance has its own length: autotuning would run anew for each, and may pick another algorithm for
    # the same request. Deterministic algorithms keep a seed's audio the same bit for bit.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Run what is inside in plain float32, whatever autocast surrounds it: the vocoder, and conditioning."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def autocast(plan: DevicePlan) -> AbstractContextManager[Any]:
    """bf16 autocast for the flow where the plan says so, else a context that does nothing."""
    if plan.flow_dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(plan.device_type, dtype=torch.bfloat16)


# -------------------------------------------------------------------------------------- measuring


def measure_gains(dtypes: Sequence[str], rows: int = 1) -> dict[str, float]:
    """Times by which each dtype is faster than float32 on the CPU, for a chain of products of T3's sizes, 1024 to 4096
    and back.

    The chain is 134 MB in float32, more than most caches hold, because decoding reads all weights at every step.
    Takes a few hundred milliseconds and measures with torch's current number of threads; nothing is cached here.

    Args:
        dtypes: "bfloat16" by torch's own products, "float16" by `engine.kernels`.
        rows: multiplied at once.
    """
    shapes = [(4096, 1024), (1024, 4096)] * (4 if rows < 64 else 1)  # large products are bound by arithmetic
    weights = [ask_for_huge_pages(torch.empty(shape)).fill_(1.0 / shape[1]) for shape in shapes]
    runs = [_product_chain(weights, rows, dtype) for dtype in ("float32", *dtypes)]
    best = [float("inf")] * len(runs)
    for turn in range(4):  # in turns, so that a busy moment of the machine meets both
        for index, run in enumerate(runs):
            seconds = run()
            if turn:  # the first turn fills caches and packs weights
                best[index] = min(best[index], seconds)
    return {dtype: best[0] / seconds for dtype, seconds in zip(dtypes, best[1:], strict=True)}


def _product_chain(weights: Sequence[torch.Tensor], rows: int, dtype: str) -> Callable[[], float]:
    products = [_product_by(weight, dtype) for weight in weights]
    start = torch.ones(rows, 1024, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    def run() -> float:
        hidden, began = start, time.perf_counter()
        with torch.inference_mode():
            for multiply in products:
                hidden = multiply(hidden)
        return time.perf_counter() - began

    return run


def _product_by(weight: torch.Tensor, dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if dtype == "float16":
        return functools.partial(product, matrix=HalfMatrix.pack(weight, None))
    return functools.partial(torch.nn.functional.linear, weight=weight.to(getattr(torch, dtype)))
