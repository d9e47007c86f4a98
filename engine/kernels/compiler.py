"""From LLVM IR to a function that runs on torch's own threads.

torch's operators run on an OpenMP team (libgomp). A second pool of threads would fight with that one for the cores,
so a kernel here is an outlined parallel region, as GCC makes of `#pragma omp parallel`, that is handed to the very
libgomp that torch has loaded: every thread of the team calls it and takes its share by its number.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

X86 = ("x86_64", "amd64")
_NEEDED_FEATURES = ("avx2", "fma", "f16c")


@dataclass(frozen=True)
class Vectors:
    """The registers that kernels are written for.

    Args:
        lanes: floats in one.
        outputs: registers of outputs that a product sums at once for each row.
        most_rows: rows that it sums at once at most, so that all sums stay in registers.
    """

    lanes: int
    outputs: int
    most_rows: int

    @property
    def floats(self) -> str:
        """The IR type of a register of float32."""
        return f"<{self.lanes} x float>"

    @property
    def halves(self) -> str:
        """The IR type of as many float16."""
        return f"<{self.lanes} x half>"


AVX512 = Vectors(lanes=16, outputs=4, most_rows=6)  # 24 of 32 registers hold sums
AVX2 = Vectors(lanes=8, outputs=2, most_rows=4)  # 8 of 16


@functools.cache
def _host_features() -> frozenset[str]:
    import llvmlite.binding as llvm

    return frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)


def host_vectors() -> Vectors:
    """The widest registers of this CPU."""
    return AVX512 if "avx512f" in _host_features() else AVX2


@functools.cache
def _team() -> ctypes.CDLL | None:
    """The libgomp that this torch has loaded, or None where it uses another OpenMP."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:  # there, but not what torch loaded
            continue
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
        return library
    return None


@functools.cache
def can_compile() -> bool:
    """Whether this machine and this torch can run the kernels: Linux on x86 with AVX2, FMA and F16C."""
    if platform.system() != "Linux" or platform.machine().lower() not in X86:
        return False
    if importlib.util.find_spec("llvmlite") is None or _team() is None:
        return False
    return _host_features().issuperset(_NEEDED_FEATURES)


class Kernel:
    """A compiled parallel region, called with numbers: addresses, sizes and strides, all int64.

    Args:
        ir: LLVM IR that defines `void @NAME(ptr arguments)`; see `load_arguments` and `share_of`.
        name: of that function.
    """

    def __init__(self, ir: str, name: str) -> None:
        import llvmlite.binding as llvm

        team = _team()
        assert team is not None, "no OpenMP team to run on"
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(_with_addresses(ir, team))
        module.verify()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        self._code: Any = llvm.create_mcjit_compiler(module, machine)  # owns the machine code
        self._code.finalize_object()
        self._address = self._code.get_function_address(name)
        self._run = team.GOMP_parallel

    def __call__(self, *arguments: int) -> None:
        """Run on all of torch's threads and wait; the interpreter is free meanwhile."""
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        self._run(self._address, ctypes.addressof(packed), torch.get_num_threads(), 0)


def _with_addresses(ir: str, team: ctypes.CDLL) -> str:
    """Put the addresses of libgomp's functions in: no name is looked up in, or added to, the process's own."""
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(team, name), ctypes.c_void_p).value
        ir = ir.replace(f"@{name}", f"inttoptr (i64 {address} to ptr)")
    return ir


def load_arguments(names_and_types: Sequence[tuple[str, str]]) -> str:
    """IR that reads the arguments of a region into %name."""
    return "\n".join(
        f"  %{name}.at = getelementptr i64, ptr %arguments, i64 {index}\n  %{name} = load {kind}, ptr %{name}.at"
        for index, (name, kind) in enumerate(names_and_types)
    )


def share_of(total: str) -> str:
    """IR that sets %first and %end to this thread's equal share of `total` items."""
    return f"""
  %thread.32 = call i32 @omp_get_thread_num()
  %threads.32 = call i32 @omp_get_num_threads()
  %thread = sext i32 %thread.32 to i64
  %threads = sext i32 %threads.32 to i64
  %first.scaled = mul i64 %thread, {total}
  %first = sdiv i64 %first.scaled, %threads
  %thread.next = add i64 %thread, 1
  %end.scaled = mul i64 %thread.next, {total}
  %end = sdiv i64 %end.scaled, %threads"""


def splat(name: str, value: str, lanes: int) -> str:
    """IR that sets %name to a register with `value` in every lane."""
    vector = f"<{lanes} x float>"
    return f"""
  %{name}.one = insertelement {vector} poison, float {value}, i32 0
  %{name} = shufflevector {vector} %{name}.one, {vector} poison, <{lanes} x i32> zeroinitializer"""
