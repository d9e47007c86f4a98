"""IR around the products of full attention: keys and values laid out as tiles, scores made weights."""

from __future__ import annotations

from engine.kernels.compiler import Vectors, splat
from engine.kernels.parts import float_ir

HEAD_DIM = 64
_LOWEST = -3e38


def layout_ir(vectors: Vectors) -> str:
    """Keys as tiles (channels, keys of a tile), the last filled up with the last key; values as tiles (frames, channels
    of a tile)."""
    lanes, floats, width = vectors.lanes, vectors.floats, vectors.outputs * vectors.lanes
    copies = "".join(
        f"""
  %from{c} = getelementptr float, ptr %frame.value, i64 {c * lanes}
  %tile{c}.offset = mul i64 %length, {c * lanes // width * width}
  %to{c}.offset = add i64 %tile{c}.offset, {c * lanes % width}
  %at{c}.offset = add i64 %to{c}.offset, %within
  %to{c} = getelementptr float, ptr %tiles, i64 %at{c}.offset
  %copied{c} = load {floats}, ptr %from{c}, align 4
  store {floats} %copied{c}, ptr %to{c}, align 4"""
        for c in range(HEAD_DIM // lanes)
    )
    return f"""
define internal void @lay_out_keys(ptr noalias %key, ptr noalias %tiles, i64 %length, i64 %padded, i64 %stride) {{
entry:
  %last = sub i64 %length, 1
  br label %loop
loop:
  %frame = phi i64 [0, %entry], [%frame.next, %loop]
  %tile = sdiv i64 %frame, {width}
  %tile.offset = mul i64 %tile, {width * HEAD_DIM}
  %column = srem i64 %frame, {width}
  %start = add i64 %tile.offset, %column
{"".join(_source_ir(lane) for lane in range(lanes))}
{"".join(_transpose_ir(channel, vectors) for channel in range(0, HEAD_DIM, lanes))}
  %frame.next = add i64 %frame, {lanes}
  %more = icmp slt i64 %frame.next, %padded
  br i1 %more, label %loop, label %done
done:
  ret void
}}

define internal void @lay_out_values(ptr noalias %value, ptr noalias %tiles, i64 %length, i64 %stride) {{
entry:
  br label %loop
loop:
  %frame = phi i64 [0, %entry], [%frame.next, %loop]
  %source.offset = mul i64 %frame, %stride
  %frame.value = getelementptr float, ptr %value, i64 %source.offset
  %within = mul i64 %frame, {width}{copies}
  %frame.next = add i64 %frame, 1
  %more = icmp slt i64 %frame.next, %length
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


def _source_ir(lane: int) -> str:
    """A frame's key, or the last one's beyond the end."""
    return f"""
  %f{lane} = add i64 %frame, {lane}
  %f{lane}.is.over = icmp sgt i64 %f{lane}, %last
  %f{lane}.source = select i1 %f{lane}.is.over, i64 %last, i64 %f{lane}
  %f{lane}.offset = mul i64 %f{lane}.source, %stride
  %f{lane}.key = getelementptr float, ptr %key, i64 %f{lane}.offset"""


def _transpose_ir(channel: int, vectors: Vectors) -> str:
    """As many frames as lanes, as many channels from `channel` on: load by frame, store by channel. Registers swap
    halves, then quarters of halves and so on (the butterfly of a power of two)."""
    lanes, floats = vectors.lanes, vectors.floats
    names, ir = [f"%t{channel}.{lane}" for lane in range(lanes)], ""
    for lane in range(lanes):
        ir += f"""
  {names[lane]}.at = getelementptr float, ptr %f{lane}.key, i64 {channel}
  {names[lane]} = load {floats}, ptr {names[lane]}.at, align 4"""
    step = 1
    while step < lanes:
        low = ", ".join(f"i32 {i if not i & step else i - step + lanes}" for i in range(lanes))
        high = ", ".join(f"i32 {i + step if not i & step else i + lanes}" for i in range(lanes))
        swapped = [f"{name}.{step}" for name in names]
        for i in (i for i in range(lanes) if not i & step):
            pair = f"{floats} {names[i]}, {floats} {names[i + step]}"
            ir += f"""
  {swapped[i]} = shufflevector {pair}, <{lanes} x i32> <{low}>
  {swapped[i + step]} = shufflevector {pair}, <{lanes} x i32> <{high}>"""
        names, step = swapped, 2 * step
    width = vectors.outputs * lanes
    for lane in range(lanes):
        ir += f"""
  %k{channel}.{lane}.offset = add i64 %start, {(channel + lane) * width}
  %k{channel}.{lane} = getelementptr float, ptr %tiles, i64 %k{channel}.{lane}.offset
  store {floats} {names[lane]}, ptr %k{channel}.{lane}, align 4"""
    return ir


def softmax_ir(vectors: Vectors, scale: str) -> str:
    """Scores of some rows to weights that sum to one, in place."""
    lanes, floats = vectors.lanes, vectors.floats
    return f"""
define internal void @softmax(ptr noalias %scores, i64 %rows, i64 %length, i64 %stride) {{
entry:
  %length.up = add i64 %length, {lanes - 1}
  %padded = and i64 %length.up, -{lanes}{splat("scales", scale, lanes)}{splat("lowest", float_ir(_LOWEST), lanes)}
  br label %row.loop

row.loop:
  %row = phi i64 [0, %entry], [%row.next, %row.end]
  %row.offset = mul i64 %row, %stride
  %row.scores = getelementptr float, ptr %scores, i64 %row.offset
  %needs.filling = icmp slt i64 %length, %padded
  br i1 %needs.filling, label %fill.loop, label %most.loop
fill.loop:
  %f = phi i64 [%length, %row.loop], [%f.next, %fill.loop]
  %f.at = getelementptr float, ptr %row.scores, i64 %f
  store float {float_ir(_LOWEST)}, ptr %f.at
  %f.next = add i64 %f, 1
  %f.more = icmp slt i64 %f.next, %padded
  br i1 %f.more, label %fill.loop, label %most.loop

most.loop:
  %m = phi i64 [0, %row.loop], [0, %fill.loop], [%m.next, %most.loop]
  %m.most = phi {floats} [%lowest, %row.loop], [%lowest, %fill.loop], [%m.most.next, %most.loop]
  %m.at = getelementptr float, ptr %row.scores, i64 %m
  %m.scores = load {floats}, ptr %m.at, align 4
  %m.most.next = call {floats} @llvm.maxnum.v{lanes}f32({floats} %m.most, {floats} %m.scores)
  %m.next = add i64 %m, {lanes}
  %m.more = icmp slt i64 %m.next, %padded
  br i1 %m.more, label %most.loop, label %most.end
most.end:
  %most = call float @llvm.vector.reduce.fmax.v{lanes}f32({floats} %m.most.next){splat("mosts", "%most", lanes)}
  br label %weigh.loop

weigh.loop:
  %w = phi i64 [0, %most.end], [%w.next, %weigh.loop]
  %w.sum = phi {floats} [zeroinitializer, %most.end], [%w.sum.next, %weigh.loop]
  %w.at = getelementptr float, ptr %row.scores, i64 %w
  %w.scores = load {floats}, ptr %w.at, align 4
  %w.below = fsub {floats} %w.scores, %mosts
  %w.scaled = fmul {floats} %w.below, %scales
  %w.weights = call {floats} @exp2({floats} %w.scaled)
  store {floats} %w.weights, ptr %w.at, align 4
  %w.sum.next = fadd {floats} %w.sum, %w.weights
  %w.next = add i64 %w, {lanes}
  %w.more = icmp slt i64 %w.next, %padded
  br i1 %w.more, label %weigh.loop, label %weigh.end
weigh.end:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float -0.0, {floats} %w.sum.next)
  %share = fdiv float 1.0, %sum{splat("shares", "%share", lanes)}
  br label %share.loop

share.loop:
  %n = phi i64 [0, %weigh.end], [%n.next, %share.loop]
  %n.at = getelementptr float, ptr %row.scores, i64 %n
  %n.weights = load {floats}, ptr %n.at, align 4
  %n.shares = fmul {floats} %n.weights, %shares
  store {floats} %n.shares, ptr %n.at, align 4
  %n.next = add i64 %n, {lanes}
  %n.more = icmp slt i64 %n.next, %padded
  br i1 %n.more, label %share.loop, label %row.end

row.end:
  %row.next = add i64 %row, 1
  %rows.more = icmp slt i64 %row.next, %rows
  br i1 %rows.more, label %row.loop, label %done
done:
  ret void
}}
"""
