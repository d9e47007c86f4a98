"""Attention of one new token per row over a float16 cache, read where it lies.

For every row and head: write the new key and value, score the positions seen so far, weigh the values. Only what a
row can see is read, so there is no mask and a row's result does not depend on how long its neighbours are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.compiler import Kernel, Vectors, host_vectors, load_arguments, share_of, splat
from engine.kernels.parts import declarations, exp2_ir, float_ir

HEAD_DIM = 64
_UNROLL = 4
"""Positions scored at once: their sums do not wait for each other."""
_TENSORS = ("query", "key", "value", "keys", "values", "positions", "out", "scratch")
_SIZES = (
    *("query.stride", "key.stride", "value.stride"),
    *("cache.row", "cache.head", "rows", "heads", "scratch.stride"),
)
_ARGUMENTS = (*((name, "ptr") for name in _TENSORS), *((name, "i64") for name in _SIZES))


@dataclass(frozen=True)
class DecodeAttention:
    """One step's inputs of one layer.

    Args:
        query, key, value: float32 (rows, heads, 1, 64), heads adjacent within a row.
        keys, values: float16 (rows or more, heads, positions, 64), the layer's cache from the first row on.
        positions: int64 (rows,), where the new token stands.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


def attend(step: DecodeAttention, length: int, vectors: Vectors | None = None) -> Tensor:
    """Write the new keys and values into the cache, and attend to all up to them.

    Args:
        length: at least every position + 1.
        vectors: None for this CPU's own.

    Returns:
        float32 (rows, heads × 64).
    """
    vectors = vectors or host_vectors()
    num_rows, num_heads = step.query.shape[:2]
    for new in (step.query, step.key, step.value):
        assert new.dtype == torch.float32 and new.stride(1) == HEAD_DIM and new.stride(3) == 1, new.stride()
    for cache in (step.keys, step.values):
        assert cache.dtype == torch.float16 and cache.stride()[2:] == (HEAD_DIM, 1), (cache.dtype, cache.stride())
    assert step.keys.stride() == step.values.stride() and step.keys.shape[0] >= num_rows
    assert length <= step.keys.shape[2] and step.positions.is_contiguous()
    out = torch.empty((num_rows, num_heads * HEAD_DIM))
    scratch = torch.empty((torch.get_num_threads(), -(-length // vectors.lanes) * vectors.lanes))
    tensors = (step.query, step.key, step.value, step.keys, step.values, step.positions, out, scratch)
    kernel(vectors)(
        *(tensor.data_ptr() for tensor in tensors),
        *(step.query.stride(0), step.key.stride(0), step.value.stride(0)),
        *(*step.keys.stride()[:2], num_rows, num_heads, scratch.shape[1]),
    )
    return out


@functools.cache
def kernel(vectors: Vectors) -> Kernel:
    """Compiled once for a process."""
    return Kernel(_attend_ir(vectors), "attend")


def _attend_ir(vectors: Vectors) -> str:
    lanes, floats = vectors.lanes, vectors.floats
    registers = range(HEAD_DIM // lanes)
    scale = float_ir(1.0 / math.sqrt(HEAD_DIM) / math.log(2.0))  # softmax in powers of two
    return f"""
{declarations(vectors)}
{exp2_ir(vectors)}
define void @attend(ptr %arguments) {{
entry:
{load_arguments(_ARGUMENTS)}
  %items = mul i64 %rows, %heads
{share_of("%items")}
  %width = mul i64 %heads, {HEAD_DIM}
  %scratch.offset = mul i64 %thread, %scratch.stride
  %scores = getelementptr float, ptr %scratch, i64 %scratch.offset{splat("scale", scale, lanes)}
  %has.work = icmp slt i64 %first, %end
  br i1 %has.work, label %item, label %done

item:
  %index = phi i64 [%first, %entry], [%index.next, %item.end]
  %row = sdiv i64 %index, %heads
  %head = srem i64 %index, %heads
  %head.offset = mul i64 %head, {HEAD_DIM}
{"".join(_new_ir(name) for name in ("query", "key", "value"))}
  %position.at = getelementptr i64, ptr %positions, i64 %row
  %position = load i64, ptr %position.at
  %count = add i64 %position, 1
  %cache.row.offset = mul i64 %row, %cache.row
  %cache.head.offset = mul i64 %head, %cache.head
  %cache.offset = add i64 %cache.row.offset, %cache.head.offset
  %row.keys = getelementptr half, ptr %keys, i64 %cache.offset
  %row.values = getelementptr half, ptr %values, i64 %cache.offset
  %new.offset = mul i64 %position, {HEAD_DIM}
  %new.key = getelementptr half, ptr %row.keys, i64 %new.offset
  %new.value = getelementptr half, ptr %row.values, i64 %new.offset
{"".join(_keep_ir(name, r, vectors) for name in ("key", "value") for r in registers)}
{"".join(_scaled_query_ir(r, vectors) for r in registers)}
  %count.unrolled = and i64 %count, -{_UNROLL}
  %some.unrolled = icmp sgt i64 %count.unrolled, 0
  br i1 %some.unrolled, label %score.loop, label %score.rest

score.loop:
  %s = phi i64 [0, %item], [%s.next, %score.loop]
  %s.most = phi float [{float_ir(-3e38)}, %item], [%s.most{_UNROLL}, %score.loop]
{_scores_ir("s", _UNROLL, vectors)}
  %s.next = add i64 %s, {_UNROLL}
  %s.more = icmp slt i64 %s.next, %count.unrolled
  br i1 %s.more, label %score.loop, label %score.rest

score.rest:
  %rest.most = phi float [{float_ir(-3e38)}, %item], [%s.most{_UNROLL}, %score.loop]
  %is.rest = icmp slt i64 %count.unrolled, %count
  br i1 %is.rest, label %rest.loop, label %fill

rest.loop:
  %t = phi i64 [%count.unrolled, %score.rest], [%t.next, %rest.loop]
  %t.most = phi float [%rest.most, %score.rest], [%t.most1, %rest.loop]
{_scores_ir("t", 1, vectors)}
  %t.next = add i64 %t, 1
  %t.more = icmp slt i64 %t.next, %count
  br i1 %t.more, label %rest.loop, label %fill

fill:
  %most = phi float [%rest.most, %score.rest], [%t.most1, %rest.loop]{splat("most.all", "%most", lanes)}
  %count.up = add i64 %count, {lanes - 1}
  %count.padded = and i64 %count.up, -{lanes}
  %needs.filling = icmp slt i64 %count, %count.padded
  br i1 %needs.filling, label %fill.loop, label %weigh.loop

fill.loop:
  %f = phi i64 [%count, %fill], [%f.next, %fill.loop]
  %f.at = getelementptr float, ptr %scores, i64 %f
  store float {float_ir(-3e38)}, ptr %f.at
  %f.next = add i64 %f, 1
  %f.more = icmp slt i64 %f.next, %count.padded
  br i1 %f.more, label %fill.loop, label %weigh.loop

weigh.loop:
  %w = phi i64 [0, %fill], [0, %fill.loop], [%w.next, %weigh.loop]
  %w.sum = phi {floats} [zeroinitializer, %fill], [zeroinitializer, %fill.loop], [%w.sum.next, %weigh.loop]
  %w.at = getelementptr float, ptr %scores, i64 %w
  %w.scores = load {floats}, ptr %w.at, align 4
  %w.below = fsub {floats} %w.scores, %most.all
  %w.weights = call {floats} @exp2({floats} %w.below)
  store {floats} %w.weights, ptr %w.at, align 4
  %w.sum.next = fadd {floats} %w.sum, %w.weights
  %w.next = add i64 %w, {lanes}
  %w.more = icmp slt i64 %w.next, %count.padded
  br i1 %w.more, label %weigh.loop, label %weighed

weighed:
  %total = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float -0.0, {floats} %w.sum.next)
  br label %value.loop

value.loop:
  %v = phi i64 [0, %weighed], [%v.next, %value.loop]
{
        "".join(
            f"  %v.sum{r} = phi {floats} [zeroinitializer, %weighed], [%v.sum{r}.next, %value.loop]{chr(10)}"
            for r in registers
        )
    }
  %v.at = getelementptr float, ptr %scores, i64 %v
  %v.weight = load float, ptr %v.at{splat("v.weight.all", "%v.weight", lanes)}
  %v.offset = mul i64 %v, {HEAD_DIM}
{"".join(_weighed_value_ir(r, vectors) for r in registers)}
  %v.next = add i64 %v, 1
  %v.more = icmp slt i64 %v.next, %count
  br i1 %v.more, label %value.loop, label %item.end

item.end:{splat("total.all", "%total", lanes)}
  %out.row = mul i64 %row, %width
  %out.offset = add i64 %out.row, %head.offset
  %out.head = getelementptr float, ptr %out, i64 %out.offset
{"".join(_out_ir(r, vectors) for r in registers)}
  %index.next = add i64 %index, 1
  %is.more = icmp slt i64 %index.next, %end
  br i1 %is.more, label %item, label %done
done:
  ret void
}}
"""


def _new_ir(name: str) -> str:
    """Where this row's and head's new query, key or value lies."""
    return f"""
  %{name}.row = mul i64 %row, %{name}.stride
  %{name}.offset = add i64 %{name}.row, %head.offset
  %{name}.head = getelementptr float, ptr %{name}, i64 %{name}.offset"""


def _keep_ir(name: str, register: int, vectors: Vectors) -> str:
    """Copy a register of the new key or value into the cache."""
    here, offset = f"keep.{name}{register}", register * vectors.lanes
    return f"""
  %{here}.from = getelementptr float, ptr %{name}.head, i64 {offset}
  %{here}.to = getelementptr half, ptr %new.{name}, i64 {offset}
  %{here} = load {vectors.floats}, ptr %{here}.from, align 4
  %{here}.half = fptrunc {vectors.floats} %{here} to {vectors.halves}
  store {vectors.halves} %{here}.half, ptr %{here}.to, align 2"""


def _scaled_query_ir(register: int, vectors: Vectors) -> str:
    return f"""
  %q{register}.at = getelementptr float, ptr %query.head, i64 {register * vectors.lanes}
  %q{register}.raw = load {vectors.floats}, ptr %q{register}.at, align 4
  %q{register} = fmul {vectors.floats} %q{register}.raw, %scale"""


def _load_half_ir(name: str, base: str, offset: str, register: int, vectors: Vectors) -> str:
    """%name = a register of the cache at `offset`, widened."""
    return f"""
  %{name}.offset = add i64 {offset}, {register * vectors.lanes}
  %{name}.at = getelementptr half, ptr {base}, i64 %{name}.offset
  %{name}.half = load {vectors.halves}, ptr %{name}.at, align 2
  %{name} = fpext {vectors.halves} %{name}.half to {vectors.floats}"""


def _scores_ir(counter: str, num_positions: int, vectors: Vectors) -> str:
    """Scores of adjacent positions from %counter on, and the highest so far."""
    floats, lanes = vectors.floats, vectors.lanes
    parts = []
    for p in range(num_positions):
        name = f"{counter}{p}"
        before = f"%{counter}.most{p}" if p else f"%{counter}.most"
        dot = ""
        for r in range(HEAD_DIM // lanes):
            key, so_far = f"{name}.key{r}", f"%{name}.dot{r - 1}" if r else "zeroinitializer"
            dot += (
                _load_half_ir(key, "%row.keys", f"%{name}.offset", r, vectors)
                + f"""
  %{name}.dot{r} = call {floats} @llvm.fma.v{lanes}f32({floats} %q{r}, {floats} %{key}, {floats} {so_far})"""
            )
        parts.append(f"""
  %{name} = add i64 %{counter}, {p}
  %{name}.offset = mul i64 %{name}, {HEAD_DIM}{dot}
  %{name}.score = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float -0.0,
                                                                          {floats} %{name}.dot{HEAD_DIM // lanes - 1})
  %{name}.at = getelementptr float, ptr %scores, i64 %{name}
  store float %{name}.score, ptr %{name}.at
  %{counter}.most{p + 1} = call float @llvm.maxnum.f32(float {before}, float %{name}.score)""")
    return "".join(parts)


def _weighed_value_ir(register: int, vectors: Vectors) -> str:
    floats, name = vectors.floats, f"v.value{register}"
    return (
        _load_half_ir(name, "%row.values", "%v.offset", register, vectors)
        + f"""
  %v.sum{register}.next = call {floats} @llvm.fma.v{vectors.lanes}f32({floats} %v.weight.all, {floats} %{name},
                                                                      {floats} %v.sum{register})"""
    )


def _out_ir(register: int, vectors: Vectors) -> str:
    return f"""
  %o{register} = fdiv {vectors.floats} %v.sum{register}.next, %total.all
  %o{register}.at = getelementptr float, ptr %out.head, i64 {register * vectors.lanes}
  store {vectors.floats} %o{register}, ptr %o{register}.at, align 4"""
