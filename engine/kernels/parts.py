"""IR that several kernels share: blocks of products, and powers of two."""

from __future__ import annotations

import math
import struct

from engine.kernels.compiler import Vectors, splat

_EXP2_TERMS = 8
"""Taylor terms of 2^f on [-½, ½]: the first left out is 5e-9."""


def declarations(vectors: Vectors) -> str:
    """IR of the intrinsics that kernels use."""
    lanes, floats = vectors.lanes, vectors.floats
    return f"""
declare {floats} @llvm.fma.v{lanes}f32({floats}, {floats}, {floats})
declare {floats} @llvm.rint.v{lanes}f32({floats})
declare {floats} @llvm.maxnum.v{lanes}f32({floats}, {floats})
declare float @llvm.maxnum.f32(float, float)
declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, {floats})
declare float @llvm.vector.reduce.fmax.v{lanes}f32({floats})
"""


def float_ir(value: float) -> str:
    """A float32 constant as LLVM wants it: the bits of the double of the same value."""
    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


def all_lanes(value: float, lanes: int) -> str:
    """A constant register with the value in every lane."""
    return f"<{', '.join([f'float {float_ir(value)}'] * lanes)}>"


def exp2_ir(vectors: Vectors) -> str:
    """IR of `@exp2`, 2^x for x ≤ 0: the whole part into the exponent, the rest by Horner's rule; NaN stays NaN."""
    floats, lanes = vectors.floats, vectors.lanes
    integers = f"<{lanes} x i32>"

    terms = [all_lanes(math.log(2.0) ** n / math.factorial(n), lanes) for n in range(_EXP2_TERMS)]
    horner = "".join(
        f"""
  %p{n} = call {floats} @llvm.fma.v{lanes}f32({floats} %p{n + 1}, {floats} %f, {floats} {terms[n]})"""
        for n in reversed(range(_EXP2_TERMS - 1))
    ).replace(f"%p{_EXP2_TERMS - 1}", terms[-1])
    return f"""
define internal {floats} @exp2({floats} %x) alwaysinline {{
  %clamped = call {floats} @llvm.maxnum.v{lanes}f32({floats} %x, {floats} {all_lanes(-126.0, lanes)})
  %n = call {floats} @llvm.rint.v{lanes}f32({floats} %clamped)
  %f = fsub {floats} %clamped, %n{horner}
  %n.int = fptosi {floats} %n to {integers}
  %biased = add {integers} %n.int, <{", ".join(["i32 127"] * lanes)}>
  %bits = shl {integers} %biased, <{", ".join(["i32 23"] * lanes)}>
  %power = bitcast {integers} %bits to {floats}
  %result = fmul {floats} %p0, %power
  %is.nan = fcmp uno {floats} %x, zeroinitializer
  %checked = select <{lanes} x i1> %is.nan, {floats} %x, {floats} %result
  ret {floats} %checked
}}
"""


def block_ir(
    name: str, num_rows: int, vectors: Vectors, *, weights_type: str, start: str = "bias", is_packed: bool = False
) -> str:
    """IR of `@name(x, tile, bias, out, inputs, x.stride, out.stride)`:
    out[row, tile] = start + Σ x[row, i] · weights[i, tile], with all sums in registers.

    The strides of the loop over inputs are constants, so that it has nothing to compute but addresses.

    Args:
        num_rows: of the block.
        weights_type: "half" or "float".
        start: "bias" (of the tile), "zero", or "out" to add to what is there.
        is_packed: x is (inputs, rows) instead of rows that are x.stride apart.
    """
    row_stride, input_stride = ("1", str(num_rows)) if is_packed else ("%x.stride", "1")
    floats, lanes = vectors.floats, vectors.lanes
    rows, registers = range(num_rows), range(vectors.outputs)
    starts = "".join(_start_ir(start, m, r, vectors) for m in (rows if start == "out" else [0]) for r in registers)

    def start_of(m: int, r: int) -> str:
        return {"zero": "zeroinitializer", "bias": f"%start0.{r}", "out": f"%start{m}.{r}"}[start]

    sums = "".join(
        f"\n  %sum{m}.{r} = phi {floats} [{start_of(m, r)}, %entry], [%next{m}.{r}, %loop]"
        for m in rows
        for r in registers
    )

    def load_weight(r: int) -> str:
        if weights_type == "float":
            return f"%weight{r} = load {floats}, ptr %weight{r}.at, align 4"
        return f"""%weight{r}.half = load {vectors.halves}, ptr %weight{r}.at, align 2
  %weight{r} = fpext {vectors.halves} %weight{r}.half to {floats}"""

    weights = "".join(
        f"""
  %weight{r}.offset = add i64 %weights.offset, {r * lanes}
  %weight{r}.at = getelementptr {weights_type}, ptr %tile, i64 %weight{r}.offset
  {load_weight(r)}"""
        for r in registers
    )
    return f"""
define internal void @{name}(ptr noalias %x, ptr noalias %tile, ptr noalias %bias, ptr noalias %out,
                                      i64 %inputs, i64 %x.stride, i64 %out.stride) alwaysinline {{
entry:{starts}{"".join(_row_start_ir(m, row_stride) for m in rows)}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %loop]{sums}
  %weights.offset = mul i64 %i, {vectors.outputs * lanes}{weights}
  %x.offset = mul i64 %i, {input_stride}
{"".join(_row_ir(m, vectors) for m in rows)}
  %i.next = add i64 %i, 1
  %is.more = icmp ult i64 %i.next, %inputs
  br i1 %is.more, label %loop, label %done
done:{"".join(_store_ir(m, r, vectors) for m in rows for r in registers)}
  ret void
}}
"""


def _start_ir(start: str, row: int, register: int, vectors: Vectors) -> str:
    """Load what a sum begins with."""
    name = f"start{row}.{register}"
    if start == "zero":
        return ""
    source = "%out" if start == "out" else "%bias"
    return f"""
  %{name}.row = mul i64 %out.stride, {row}
  %{name}.offset = add i64 %{name}.row, {register * vectors.lanes}
  %{name}.at = getelementptr float, ptr {source}, i64 %{name}.offset
  %{name} = load {vectors.floats}, ptr %{name}.at, align 4"""


def _row_start_ir(row: int, row_stride: str) -> str:
    return f"""
  %x{row}.start = mul i64 {row_stride}, {row}
  %x{row}.row = getelementptr float, ptr %x, i64 %x{row}.start"""


def _row_ir(row: int, vectors: Vectors) -> str:
    """One row's input times the weights that are in registers."""
    floats = vectors.floats
    multiply = "".join(
        f"""
  %next{row}.{r} = call {floats} @llvm.fma.v{vectors.lanes}f32({floats} %x{row}, {floats} %weight{r},
                                                               {floats} %sum{row}.{r})"""
        for r in range(vectors.outputs)
    )
    return f"""
  %x{row}.at = getelementptr float, ptr %x{row}.row, i64 %x.offset
  %x{row}.value = load float, ptr %x{row}.at, align 4{splat(f"x{row}", f"%x{row}.value", vectors.lanes)}{multiply}"""


def _store_ir(row: int, register: int, vectors: Vectors) -> str:
    name = f"out{row}.{register}"
    return f"""
  %{name}.row = mul i64 %out.stride, {row}
  %{name}.offset = add i64 %{name}.row, {register * vectors.lanes}
  %{name}.at = getelementptr float, ptr %out, i64 %{name}.offset
  store {vectors.floats} %next{row}.{register}, ptr %{name}.at, align 4"""
