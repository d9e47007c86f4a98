"""What is on this machine: GPUs, the CPU's cores and instructions, what the container grants.

Only looks, decides nothing: `engine.device` draws the conclusions from a `Probe`, which a test can
also write by hand.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.kernels import can_compile

_BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_PROBE_ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class CudaDevice:
    """One GPU: its name, compute capability and memory in bytes."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


@dataclass(frozen=True)
class Probe:
    """What was found on the machine.

    Args:
        system, machine: as `platform` names them, such as Linux and x86_64, or Darwin and arm64.
        cuda: the GPUs that torch sees, in its order.
        cuda_arches: what torch's kernels were built for (sm_80, compute_90); empty when unknown.
        mps_built, mps_available: torch's word on Apple's GPU.
        cpu_bf16: the CPU multiplies bf16 in hardware (AVX-512 BF16, AMX BF16, ARM BF16).
        num_cores: physical cores that this process may use.
        num_performance_cores: the fast ones of a CPU with two kinds; None where all are alike.
        num_granted_cores: CPU time that the container grants, in cores; None when not limited.
        env: the variables that bear on the choice.
        bf16_gain: times by which bf16 was measured faster than float32 for a decoding step.
        bf16_flow_gain: the same for the flow's large products; None where nothing was measured.
        half_kernels: T3's float16 kernels run on this CPU (`engine.kernels`).
        half_gain: times by which they were measured faster than float32.
    """

    system: str
    machine: str
    cuda: tuple[CudaDevice, ...] = ()
    cuda_arches: tuple[str, ...] = ()
    mps_built: bool = False
    mps_available: bool = False
    cpu_bf16: bool = False
    num_cores: int = 1
    num_performance_cores: int | None = None
    num_granted_cores: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    bf16_gain: float | None = None
    bf16_flow_gain: float | None = None
    half_kernels: bool = False
    half_gain: float | None = None


def probe() -> Probe:
    """Look at this machine. Costs milliseconds, except that the first look at a GPU starts CUDA."""
    system = platform.system()
    cuda = _probe_cuda()
    cores = {"Linux": _probe_linux, "Darwin": _probe_macos}.get(system, _probe_other)()
    return Probe(
        system=system,
        machine=platform.machine(),
        cuda=cuda,
        cuda_arches=tuple(torch.cuda.get_arch_list()) if cuda else (),
        mps_built=torch.backends.mps.is_built(),
        mps_available=torch.backends.mps.is_available(),
        half_kernels=can_compile(),
        env={name: os.environ[name] for name in _PROBE_ENVIRONMENT if name in os.environ},
        **cores,
    )


def _probe_cuda() -> tuple[CudaDevice, ...]:
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(CudaDevice(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in found)


def _probe_linux(root: Path = Path("/")) -> dict[str, Any]:
    allowed = os.sched_getaffinity(0)
    fast = parse_cpu_list(_read(root / "sys/devices/cpu_core/cpus"))  # only there on CPUs with two kinds of cores
    return {
        "cpu_bf16": has_bf16_flag(_read(root / "proc/cpuinfo")),
        "num_cores": _count_cores(root, allowed),
        "num_performance_cores": _count_cores(root, allowed & fast) if allowed & fast else None,
        "num_granted_cores": parse_cpu_quota(_read(root / "sys/fs/cgroup/cpu.max")),
    }


def _count_cores(root: Path, cpus: set[int]) -> int:
    """Distinct physical cores among logical CPUs: hyper-threads share their list of siblings."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(root / topology.format(cpu)) or str(cpu) for cpu in cpus})


def _probe_macos() -> dict[str, Any]:
    performance = _sysctl("hw.perflevel0.physicalcpu")
    return {
        "cpu_bf16": _sysctl("hw.optional.arm.FEAT_BF16") == 1,
        "num_cores": _sysctl("hw.physicalcpu") or os.cpu_count() or 1,
        "num_performance_cores": performance or None,
    }


def _probe_other() -> dict[str, Any]:
    return {"num_cores": max(1, (os.cpu_count() or 2) // 2)}  # hyper-threads are counted there


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where nobody says.

    The kernel's own estimate, which counts the page cache as available: right after weights were mapped,
    little memory is free and most of it is.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if found is None:
        return None
    available = int(found[1]) * 1024
    limit, used = (_read(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        # What the container has of the page cache, such as weights that were just read, counts as used and is not lost.
        stat = _read(root / "sys/fs/cgroup/memory.stat")
        cached = sum(int(size) for size in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
        available = min(available, max(0, int(limit) - int(used) + cached))
    return available


HUGE_PAGE_BYTES = 2 << 20
"""Of x86, and of ARM with small pages of 4 KiB."""


def ask_for_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Have fresh memory of the CPU backed by huge pages where Linux gives them on request (madvise(2)); the tensor.

    Filling a gigabyte then takes 500 page faults instead of 260,000, and reading it fewer look-ups of addresses. Only
    whole huge pages inside the tensor are asked for, so that it takes no more memory. Where there are none, or another
    policy is set, nothing happens.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    num_bytes = end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - first
    madvise = _madvise()
    if madvise is not None and tensor.device.type == "cpu" and num_bytes > 0:
        madvise(first, num_bytes, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Any:
    """The C library's, or None where there is no such call or no such advice."""
    if platform.system() != "Linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def _sysctl(name: str) -> int | None:
    found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
    return int(found) if found.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def has_bf16_flag(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo names bf16 instructions ("flags" on x86, "Features" on ARM)."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return any(_BF16_CPU_FLAGS & set(line.split()) for line in lines)


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format: "0-3,8" is {0, 1, 2, 3, 8}."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {cpu for low, _, high in ranges for cpu in range(int(low), int(high or low) + 1)}


def parse_cpu_quota(text: str) -> int | None:
    """Cores that cgroup v2's cpu.max grants ("200000 100000" is 2), rounded down to at least 1; None without limit."""
    quota, _, period = text.partition(" ")
    return max(1, int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None
