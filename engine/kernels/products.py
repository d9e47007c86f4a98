"""Products of a few float32 rows with a matrix kept in float16.

The matrix lies in tiles of a few registers' outputs, (tiles, inputs, outputs of a tile), so that a thread reads its
part of it once, in order, widens some registers of weights and multiplies them into the sums of a block of rows.
Of the two formats of 16 bits float16 has eight times bfloat16's precision, and weights lie well inside its range.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.compiler import Kernel, Vectors, host_vectors, load_arguments, share_of
from engine.kernels.parts import block_ir, declarations

PACKED_ROWS = 24
"""From so many rows on, blocks of rows are transposed first: rows of 4 KiB each would share one set of the cache."""
_ARGUMENTS = (
    *(("x", "ptr"), ("matrix", "ptr"), ("bias", "ptr"), ("out", "ptr")),
    *(("rows", "i64"), ("inputs", "i64"), ("tiles", "i64")),
    *(("block.rows", "i64"), ("is.packed", "i64")),
)


@dataclass(frozen=True)
class HalfMatrix:
    """A projection's weight and bias, laid out for `product`.

    Args:
        tiles: float16 (tiles, inputs, outputs of a tile); the last tile is filled up with zeros.
        bias: float32 (tiles × outputs of a tile,).
        num_outputs: without the filling.
        vectors: whose tiles these are.
    """

    tiles: Tensor
    bias: Tensor
    num_outputs: int
    vectors: Vectors

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, vectors: Vectors | None = None) -> HalfMatrix:
        """Lay out a weight (outputs, inputs) of any dtype and strides, and a bias (outputs,).

        Args:
            vectors: None for this CPU's own.
        """
        vectors = vectors or host_vectors()
        tiles = torch.empty(tiles_shape(weight.shape[0], weight.shape[1], vectors), dtype=torch.float16)
        tiles.copy_(as_tiles(weight, vectors))
        bias = torch.zeros(len(weight)) if bias is None else bias.float()
        return cls(tiles, F.pad(bias, (0, tiles.shape[0] * tiles.shape[2] - len(bias))), len(weight), vectors)

    @functools.cached_property
    def _addresses(self) -> tuple[int, int, Kernel]:
        return self.tiles.data_ptr(), self.bias.data_ptr(), kernel(self.vectors)

    def run(self, x: Tensor, out: Tensor, num_rows: int, block_rows: int, *, is_packed: bool) -> None:
        """The kernel on contiguous rows, or on blocks of them."""
        tiles, bias, multiply = self._addresses
        num_tiles, num_inputs, _ = self.tiles.shape
        multiply(x.data_ptr(), tiles, bias, out.data_ptr(), num_rows, num_inputs, num_tiles, block_rows, is_packed)


def tiles_shape(num_outputs: int, num_inputs: int, vectors: Vectors) -> tuple[int, int, int]:
    """(tiles, inputs, outputs of a tile)."""
    width = vectors.outputs * vectors.lanes
    return -(-num_outputs // width), num_inputs, width


def as_tiles(weight: Tensor, vectors: Vectors) -> Tensor:
    """A weight (outputs, inputs) of any strides seen as tiles, of its own dtype; a copy only where the last tile has to
    be filled up."""
    num_tiles, _, width = tiles_shape(weight.shape[0], weight.shape[1], vectors)
    missing = num_tiles * width - len(weight)
    whole = F.pad(weight, (0, 0, 0, missing)) if missing else weight
    return whole.unflatten(0, (num_tiles, width)).transpose(1, 2)


def product(x: Tensor, matrix: HalfMatrix) -> Tensor:
    """x · Wᵀ + b, summed in float32.

    Args:
        x: float32 (…, inputs) on the CPU.

    Returns:
        float32 (…, outputs).
    """
    num_tiles, num_inputs, width = matrix.tiles.shape
    assert x.dtype == torch.float32 and x.shape[-1] == num_inputs, (x.dtype, x.shape, matrix.tiles.shape)
    num_rows = x.numel() // num_inputs
    if num_rows >= PACKED_ROWS:
        return _packed_product(x, matrix)
    out = torch.empty((*x.shape[:-1], num_tiles * width))
    # Equal blocks: eight rows go as four and four.
    block_rows = -(-num_rows // -(-num_rows // matrix.vectors.most_rows))
    matrix.run(x.contiguous(), out, num_rows, block_rows, is_packed=False)
    return out if out.shape[-1] == matrix.num_outputs else out[..., : matrix.num_outputs]


def _packed_product(x: Tensor, matrix: HalfMatrix) -> Tensor:
    num_tiles, num_inputs, width = matrix.tiles.shape
    blocks = _in_blocks(x.reshape(-1, num_inputs), matrix.vectors.most_rows)
    num_rows = blocks.shape[0] * blocks.shape[2]
    out = torch.empty((num_rows, num_tiles * width))
    matrix.run(blocks, out, num_rows, blocks.shape[2], is_packed=True)
    return out[: x.numel() // num_inputs, : matrix.num_outputs].unflatten(0, x.shape[:-1])


def _in_blocks(rows: Tensor, block_rows: int) -> Tensor:
    """(rows, inputs) as (blocks, inputs, rows of a block), the last filled up with zeros."""
    num_rows, num_inputs = rows.shape
    whole = num_rows // block_rows
    blocks = torch.empty((-(-num_rows // block_rows), num_inputs, block_rows))
    blocks[:whole] = rows[: whole * block_rows].unflatten(0, (whole, block_rows)).transpose(1, 2)
    if whole < len(blocks):
        rest = num_rows - whole * block_rows
        blocks[whole, :, :rest] = rows[whole * block_rows :].T
        blocks[whole, :, rest:] = 0.0
    return blocks


@functools.cache
def kernel(vectors: Vectors) -> Kernel:
    """Compiled once for a process."""
    return Kernel(_product_ir(vectors), "product")


def _product_ir(vectors: Vectors) -> str:
    """For each tile of the thread's share, the rows in blocks, the last of which may be smaller."""
    width, sizes = vectors.outputs * vectors.lanes, range(1, vectors.most_rows + 1)
    block = "ptr %block.x, ptr %tile, ptr %tile.bias, ptr %block.out, i64 %inputs, i64 %inputs, i64 %out.stride"
    cases = " ".join(f"i64 {rows}, label %block{rows}" for rows in sizes)
    calls = "\n".join(
        f"{name}:\n  call void @{name}({block})\n  br label %next.block"
        for name in ("packed", *(f"block{rows}" for rows in sizes))
    )
    return f"""
{declarations(vectors)}
{"".join(block_ir(f"block{rows}", rows, vectors, weights_type="half") for rows in sizes)}
{block_ir("packed", vectors.most_rows, vectors, weights_type="half", is_packed=True)}
define void @product(ptr %arguments) {{
entry:
{load_arguments(_ARGUMENTS)}
{share_of("%tiles")}
  %out.stride = mul i64 %tiles, {width}
  %are.packed = icmp ne i64 %is.packed, 0
  %tile.size = mul i64 %inputs, {width}
  %has.work = icmp slt i64 %first, %end
  br i1 %has.work, label %tile.loop, label %done
tile.loop:
  %index = phi i64 [%first, %entry], [%index.next, %next.tile]
  %tile.offset = mul i64 %index, %tile.size
  %tile = getelementptr half, ptr %matrix, i64 %tile.offset
  %column = mul i64 %index, {width}
  %tile.bias = getelementptr float, ptr %bias, i64 %column
  %tile.out = getelementptr float, ptr %out, i64 %column
  br label %row.loop
row.loop:
  %row = phi i64 [0, %tile.loop], [%row.next, %next.block]
  %left = sub i64 %rows, %row
  %is.whole = icmp sge i64 %left, %block.rows
  %size = select i1 %is.whole, i64 %block.rows, i64 %left
  %x.offset = mul i64 %row, %inputs
  %block.x = getelementptr float, ptr %x, i64 %x.offset
  %out.offset = mul i64 %row, %out.stride
  %block.out = getelementptr float, ptr %tile.out, i64 %out.offset
  %key = select i1 %are.packed, i64 0, i64 %size
  switch i64 %key, label %next.block [i64 0, label %packed {cases}]
{calls}
next.block:
  %row.next = add i64 %row, %block.rows
  %are.more = icmp slt i64 %row.next, %rows
  br i1 %are.more, label %row.loop, label %next.tile
next.tile:
  %index.next = add i64 %index, 1
  %is.more = icmp slt i64 %index.next, %end
  br i1 %is.more, label %tile.loop, label %done
done:
  ret void
}}
"""
