"""Attention of all frames to all frames in float32, for the flow.

torch's own operator reaches half the speed of a matrix product on a CPU at these sizes (hundreds of frames, heads of
64). Here a head's keys are laid out once as the tiles of a product, then blocks of queries are scored against all of
them, made weights, and multiplied with the values, each step at a product's speed and in the core's own cache.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from engine.kernels.compiler import Kernel, Vectors, host_vectors, load_arguments, share_of
from engine.kernels.parts import block_ir, declarations, exp2_ir, float_ir
from engine.kernels.scoring import HEAD_DIM, layout_ir, softmax_ir

GROUP_BLOCKS = 8
"""Blocks of queries that pass a tile of keys, or a piece of the values, while it is in the core's first cache."""
PIECE = 64
"""Values of one piece."""
_TENSORS = ("query", "key", "value", "out", "lengths", "scratch")
_SIZES = (
    *("batch.stride", "frame.stride", "out.batch", "out.frame"),
    *("rows", "heads", "parts", "frames", "padded.most", "score.stride", "scratch.stride"),
)
_ARGUMENTS = (*((name, "ptr") for name in _TENSORS), *((name, "i64") for name in _SIZES))


def attend_fully(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, vectors: Vectors | None = None) -> Tensor:
    """Attention over the first frames of each row.

    Args:
        query, key, value: float32 (rows, heads, frames, 64) views of one tensor, heads adjacent within a frame.
        lengths: int64 (rows,), the frames to attend to, at least 1; results of frames beyond mean nothing.
        vectors: None for this CPU's own.

    Returns:
        float32 (rows, frames, heads × 64). A row's result is the same bit for bit whatever its neighbours.
    """
    vectors = vectors or host_vectors()
    num_rows, num_heads, num_frames, head_dim = query.shape
    assert head_dim == HEAD_DIM and query.dtype == torch.float32, (query.shape, query.dtype)
    for tensor in (query, key, value):
        assert tensor.stride() == query.stride() and tensor.stride()[1::2] == (HEAD_DIM, 1), tensor.stride()
    assert num_frames >= vectors.most_rows, f"fewer frames than a block has rows: {num_frames}"
    # Where there are more threads than heads, several share a head's queries.
    num_threads = torch.get_num_threads()
    parts = max(1, min(-(-num_threads // (num_rows * num_heads)), num_frames // vectors.most_rows))
    width = vectors.outputs * vectors.lanes
    most_padded = -(-num_frames // width) * width
    score_stride = most_padded + vectors.lanes  # never a multiple of a page
    out = torch.empty((num_rows, num_frames, num_heads * HEAD_DIM))
    group_rows = GROUP_BLOCKS * vectors.most_rows
    scratch = torch.empty((num_threads, 2 * HEAD_DIM * most_padded + group_rows * (HEAD_DIM + score_stride)))
    tensors = (query, key, value, out, lengths, scratch)
    kernel(vectors)(
        *(tensor.data_ptr() for tensor in tensors),
        *(query.stride(0), query.stride(2), *out.stride()[:2]),
        *(num_rows, num_heads, parts, num_frames, most_padded, score_stride, scratch.shape[1]),
    )
    return out


@functools.cache
def kernel(vectors: Vectors) -> Kernel:
    """Compiled once for a process."""
    return Kernel(_attend_ir(vectors), "attend_fully")


def _attend_ir(vectors: Vectors) -> str:
    """For each row, head and part of its queries: lay out keys and values, then the queries in groups of blocks. The
    last block is moved back to be whole; what it computes twice comes out the same."""
    lanes, most = vectors.lanes, vectors.most_rows
    width = vectors.outputs * lanes
    scale = float_ir(1.0 / math.sqrt(HEAD_DIM) / math.log(2.0))  # softmax in powers of two
    return f"""
{declarations(vectors)}
{exp2_ir(vectors)}
{block_ir("block", most, vectors, weights_type="float", start="zero")}
{block_ir("more", most, vectors, weights_type="float", start="out")}
{layout_ir(vectors)}
{softmax_ir(vectors, scale)}
define void @attend_fully(ptr %arguments) {{
entry:
{load_arguments(_ARGUMENTS)}
  %heads.parts = mul i64 %heads, %parts
  %items = mul i64 %rows, %heads.parts
{share_of("%items")}
  %scratch.offset = mul i64 %thread, %scratch.stride
  %tiles.keys = getelementptr float, ptr %scratch, i64 %scratch.offset
  %tiles.size = mul i64 %padded.most, {HEAD_DIM}
  %tiles.values = getelementptr float, ptr %tiles.keys, i64 %tiles.size
  %sums = getelementptr float, ptr %tiles.values, i64 %tiles.size
  %scores = getelementptr float, ptr %sums, i64 {GROUP_BLOCKS * most * HEAD_DIM}
  %has.work = icmp slt i64 %first, %end
  br i1 %has.work, label %item, label %done

item:
  %index = phi i64 [%first, %entry], [%index.next, %item.end]
  %row = sdiv i64 %index, %heads.parts
  %within = srem i64 %index, %heads.parts
  %head = sdiv i64 %within, %parts
  %part = srem i64 %within, %parts
  %length.at = getelementptr i64, ptr %lengths, i64 %row
  %length = load i64, ptr %length.at
  %length.up = add i64 %length, {width - 1}
  %padded = and i64 %length.up, -{width}
  %row.offset = mul i64 %row, %batch.stride
  %head.offset = mul i64 %head, {HEAD_DIM}
  %offset = add i64 %row.offset, %head.offset
  %head.query = getelementptr float, ptr %query, i64 %offset
  %head.key = getelementptr float, ptr %key, i64 %offset
  %head.value = getelementptr float, ptr %value, i64 %offset
  %out.row = mul i64 %row, %out.batch
  %out.offset = add i64 %out.row, %head.offset
  %head.out = getelementptr float, ptr %out, i64 %out.offset
  call void @lay_out_keys(ptr %head.key, ptr %tiles.keys, i64 %length, i64 %padded, i64 %frame.stride)
  call void @lay_out_values(ptr %head.value, ptr %tiles.values, i64 %length, i64 %frame.stride)
  %queries.scaled = mul i64 %part, %frames
  %queries.first = sdiv i64 %queries.scaled, %parts
  %part.next = add i64 %part, 1
  %queries.end.scaled = mul i64 %part.next, %frames
  %queries.end = sdiv i64 %queries.end.scaled, %parts
  %last.block = sub i64 %queries.end, {most}
  br label %group.loop

group.loop:
  %group = phi i64 [%queries.first, %item], [%group.next, %group.end]
  %group.next = add i64 %group, {GROUP_BLOCKS * most}
  %group.cut = icmp sgt i64 %group.next, %queries.end
  %group.stop = select i1 %group.cut, i64 %queries.end, i64 %group.next
  br label %tile.loop

tile.loop:
  %s = phi i64 [0, %group.loop], [%s.next, %tile.end]
  %s.offset = mul i64 %s, {HEAD_DIM}
  %s.tile = getelementptr float, ptr %tiles.keys, i64 %s.offset
  %s.scores = getelementptr float, ptr %scores, i64 %s
  br label %score.loop
score.loop:
{_block_loop_ir("sb", "tile.loop", "score.loop", most)}
  %sb.query.offset = mul i64 %sb.start, %frame.stride
  %sb.query = getelementptr float, ptr %head.query, i64 %sb.query.offset
  %sb.scores = getelementptr float, ptr %s.scores, i64 %sb.score.offset
  call void @block(ptr %sb.query, ptr %s.tile, ptr null, ptr %sb.scores, i64 {HEAD_DIM}, i64 %frame.stride,
                   i64 %score.stride)
  br i1 %sb.more, label %score.loop, label %tile.end
tile.end:
  %s.next = add i64 %s, {width}
  %s.more = icmp slt i64 %s.next, %padded
  br i1 %s.more, label %tile.loop, label %weigh
weigh:
  %group.scores = sub i64 %group.stop, %group
  %group.up = add i64 %group.scores, {most - 1}
  %group.blocks = sdiv i64 %group.up, {most}
  %group.rows = mul i64 %group.blocks, {most}
  call void @softmax(ptr %scores, i64 %group.rows, i64 %length, i64 %score.stride)
  br label %piece.loop

piece.loop:
  %p = phi i64 [0, %weigh], [%p.next, %piece.end]
  %p.next = add i64 %p, {PIECE}
  %p.cut = icmp sgt i64 %p.next, %length
  %p.stop = select i1 %p.cut, i64 %length, i64 %p.next
  %p.size = sub i64 %p.stop, %p
  %p.is.first = icmp eq i64 %p, 0
  %p.offset = mul i64 %p, {width}
  %p.weights = getelementptr float, ptr %scores, i64 %p
  br label %value.loop
value.loop:
  %v = phi i64 [0, %piece.loop], [%v.next, %value.end]
  %v.offset = mul i64 %v, %length
  %v.piece = add i64 %v.offset, %p.offset
  %v.tile = getelementptr float, ptr %tiles.values, i64 %v.piece
  %v.sums = getelementptr float, ptr %sums, i64 %v
  br label %sum.loop
sum.loop:
{_block_loop_ir("vb", "value.loop", "sum.end", most)}
  %vb.sums.offset = mul i64 %vb.row, {HEAD_DIM}
  %vb.sums = getelementptr float, ptr %v.sums, i64 %vb.sums.offset
  %vb.weights = getelementptr float, ptr %p.weights, i64 %vb.score.offset
  br i1 %p.is.first, label %sum.first, label %sum.more
sum.first:
  call void @block(ptr %vb.weights, ptr %v.tile, ptr null, ptr %vb.sums, i64 %p.size, i64 %score.stride, i64 {HEAD_DIM})
  br label %sum.end
sum.more:
  call void @more(ptr %vb.weights, ptr %v.tile, ptr null, ptr %vb.sums, i64 %p.size, i64 %score.stride, i64 {HEAD_DIM})
  br label %sum.end
sum.end:
  br i1 %vb.more, label %sum.loop, label %value.end
value.end:
  %v.next = add i64 %v, {width}
  %v.more = icmp slt i64 %v.next, {HEAD_DIM}
  br i1 %v.more, label %value.loop, label %piece.end
piece.end:
  %p.more = icmp slt i64 %p.next, %length
  br i1 %p.more, label %piece.loop, label %copy.loop
copy.loop:
{_block_loop_ir("cb", "piece.end", "copy.loop", most)}
{"".join(_copy_ir(r, c, vectors) for r in range(most) for c in range(HEAD_DIM // lanes))}
  br i1 %cb.more, label %copy.loop, label %group.end
group.end:
  %groups.more = icmp slt i64 %group.next, %queries.end
  br i1 %groups.more, label %group.loop, label %item.end

item.end:
  %index.next = add i64 %index, 1
  %is.more = icmp slt i64 %index.next, %end
  br i1 %is.more, label %item, label %done
done:
  ret void
}}
"""


def _block_loop_ir(name: str, before: str, again: str, most: int) -> str:
    """Count a group's blocks: where its queries start, and its scores."""
    return f"""
  %{name} = phi i64 [%group, %{before}], [%{name}.next, %{again}]
  %{name}.is.over = icmp sgt i64 %{name}, %last.block
  %{name}.start = select i1 %{name}.is.over, i64 %last.block, i64 %{name}
  %{name}.row = sub i64 %{name}, %group
  %{name}.score.offset = mul i64 %{name}.row, %score.stride
  %{name}.next = add i64 %{name}, {most}
  %{name}.more = icmp slt i64 %{name}.next, %group.stop"""


def _copy_ir(row: int, register: int, vectors: Vectors) -> str:
    """A register of a row's sums to where the result lies."""
    name, channel = f"c{row}.{register}", register * vectors.lanes
    return f"""
  %{name}.row = add i64 %cb.row, {row}
  %{name}.sums = mul i64 %{name}.row, {HEAD_DIM}
  %{name}.from.offset = add i64 %{name}.sums, {channel}
  %{name}.from = getelementptr float, ptr %sums, i64 %{name}.from.offset
  %{name}.frame = add i64 %cb.start, {row}
  %{name}.out = mul i64 %{name}.frame, %out.frame
  %{name}.to.offset = add i64 %{name}.out, {channel}
  %{name}.to = getelementptr float, ptr %head.out, i64 %{name}.to.offset
  %{name} = load {vectors.floats}, ptr %{name}.from, align 4
  store {vectors.floats} %{name}, ptr %{name}.to, align 4"""
