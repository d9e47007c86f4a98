"""The vocoder's activation, x + sin²(αx)/α, in one pass over memory where single operations take five.

The sine is that of αx less its nearest multiple of π, taken off in three parts (Cody and Waite 1980), by its Taylor
series; squared, it does not matter which multiple it was.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from engine.kernels.compiler import Kernel, Vectors, host_vectors, load_arguments, share_of, splat
from engine.kernels.parts import all_lanes, declarations

_PI_PARTS = (3.140625, 0.0009670257568359375, 6.2771141529083252e-07)
"""π in three: the first two have few enough bits for their products with whole numbers up to 2^13 to be exact."""
_SINE = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(6)]
"""Of r, r³ … r¹¹; on [-π/2, π/2] the next would be 6e-8."""
_EPSILON = 1e-9
"""Upstream's, against division by zero."""
_ARGUMENTS = tuple(
    [(name, "ptr") for name in ("x", "out", "alpha", "inverse")]
    + [(name, "i64") for name in ("items", "channels", "length")]
)


def snake(x: Tensor, alpha: Tensor, *, in_place: bool = False, vectors: Vectors | None = None) -> Tensor:
    """x + sin²(αx)/α.

    Args:
        x: float32 (rows, channels, length), contiguous.
        alpha: float32 (channels,).
        in_place: write over x.
        vectors: of the processor; None for the host's.

    Returns:
        float32 (rows, channels, length).
    """
    num_rows, num_channels, length = x.shape
    assert x.dtype == torch.float32 and x.is_contiguous() and alpha.shape == (num_channels,), (x.shape, alpha.shape)
    out = x if in_place else torch.empty_like(x)
    alpha = alpha.contiguous()
    inverse = 1.0 / (alpha + _EPSILON)
    addresses = (tensor.data_ptr() for tensor in (x, out, alpha, inverse))
    kernel(vectors or host_vectors())(*addresses, num_rows * num_channels, num_channels, length)
    return out


@functools.cache
def kernel(vectors: Vectors) -> Kernel:
    """Compiled once for a process."""
    return Kernel(_snake_ir(vectors), "snake")


def _snake_ir(vectors: Vectors) -> str:
    lanes, floats = vectors.lanes, vectors.floats
    return f"""
{declarations(vectors)}
{_activate_ir(vectors)}
define void @snake(ptr %arguments) {{
entry:
{load_arguments(_ARGUMENTS)}
{share_of("%items")}
  %whole = and i64 %length, -{lanes}
  %spare = alloca {floats}, align 64
  %has.work = icmp slt i64 %first, %end
  br i1 %has.work, label %item, label %done

item:
  %index = phi i64 [%first, %entry], [%index.next, %item.end]
  %channel = srem i64 %index, %channels
  %own.alpha = getelementptr float, ptr %alpha, i64 %channel
  %a = load float, ptr %own.alpha
  %own.inverse = getelementptr float, ptr %inverse, i64 %channel
  %b = load float, ptr %own.inverse{splat("alphas", "%a", lanes)}{splat("inverses", "%b", lanes)}
  %offset = mul i64 %index, %length
  %from = getelementptr float, ptr %x, i64 %offset
  %to = getelementptr float, ptr %out, i64 %offset
  %has.whole = icmp sgt i64 %whole, 0
  br i1 %has.whole, label %loop, label %rest

loop:
  %i = phi i64 [0, %item], [%i.next, %loop]
  %i.from = getelementptr float, ptr %from, i64 %i
  %i.x = load {floats}, ptr %i.from, align 4
  %i.y = call {floats} @activate({floats} %i.x, {floats} %alphas, {floats} %inverses)
  %i.to = getelementptr float, ptr %to, i64 %i
  store {floats} %i.y, ptr %i.to, align 4
  %i.next = add i64 %i, {lanes}
  %more = icmp slt i64 %i.next, %whole
  br i1 %more, label %loop, label %rest

rest:
  %has.rest = icmp slt i64 %whole, %length
  br i1 %has.rest, label %gather.start, label %item.end
gather.start:
  store {floats} zeroinitializer, ptr %spare
  br label %gather
gather:
  %g = phi i64 [%whole, %gather.start], [%g.next, %gather]
  %g.from = getelementptr float, ptr %from, i64 %g
  %g.x = load float, ptr %g.from
  %g.place = sub i64 %g, %whole
  %g.spare = getelementptr float, ptr %spare, i64 %g.place
  store float %g.x, ptr %g.spare
  %g.next = add i64 %g, 1
  %g.more = icmp slt i64 %g.next, %length
  br i1 %g.more, label %gather, label %gathered
gathered:
  %r.x = load {floats}, ptr %spare
  %r.y = call {floats} @activate({floats} %r.x, {floats} %alphas, {floats} %inverses)
  store {floats} %r.y, ptr %spare
  br label %scatter
scatter:
  %s = phi i64 [%whole, %gathered], [%s.next, %scatter]
  %s.place = sub i64 %s, %whole
  %s.spare = getelementptr float, ptr %spare, i64 %s.place
  %s.y = load float, ptr %s.spare
  %s.to = getelementptr float, ptr %to, i64 %s
  store float %s.y, ptr %s.to
  %s.next = add i64 %s, 1
  %s.more = icmp slt i64 %s.next, %length
  br i1 %s.more, label %scatter, label %item.end

item.end:
  %index.next = add i64 %index, 1
  %is.more = icmp slt i64 %index.next, %end
  br i1 %is.more, label %item, label %done
done:
  ret void
}}
"""


def _activate_ir(vectors: Vectors) -> str:
    """IR of `@activate(x, alphas, inverses)` on a register."""
    lanes, floats = vectors.lanes, vectors.floats

    def fma(a: str, b: str, c: str) -> str:
        return f"call {floats} @llvm.fma.v{lanes}f32({floats} {a}, {floats} {b}, {floats} {c})"

    pi_parts, sine = ([all_lanes(value, lanes) for value in values] for values in (_PI_PARTS, _SINE))
    reduced = "".join(f"\n  %r{n + 1} = {fma('%minus.k', part, f'%r{n}')}" for n, part in enumerate(pi_parts))
    horner = "".join(
        f"\n  %p{n} = {fma(f'%p{n + 1}', '%square', sine[n])}" for n in reversed(range(len(sine) - 1))
    ).replace(f"%p{len(sine) - 1}", sine[-1])
    return f"""
define internal {floats} @activate({floats} %x, {floats} %alphas, {floats} %inverses) alwaysinline {{
  %r0 = fmul {floats} %x, %alphas
  %turns = fmul {floats} %r0, {all_lanes(1.0 / math.pi, lanes)}
  %k = call {floats} @llvm.rint.v{lanes}f32({floats} %turns)
  %minus.k = fneg {floats} %k{reduced}
  %square = fmul {floats} %r3, %r3{horner}
  %sine = fmul {floats} %p0, %r3
  %power = fmul {floats} %sine, %sine
  %y = {fma("%power", "%inverses", "%x")}
  ret {floats} %y
}}
"""
