"""What speaking on a CPU spends its time on, in kernels of our own: products with float16 weights, attention over a
float16 cache, the flow's attention, the vocoder's activation.

Decoding is bound by reading weights and cache from memory, and torch has no kernel on a CPU that reads them in half
the bytes, computes in float32 and costs nothing to lay out: bf16 is emulated where the hardware lacks it, FBGEMM's
float16 packs for tens of seconds. These kernels are written as LLVM IR, compiled at load in a fraction of a second
(llvmlite, which librosa brings along) for the very CPU, and run on the threads that torch's own operators use.

A row is summed in the same order whatever its neighbours, so its result is the same to the last bit in any batch.
"""

from engine.kernels import activation, attention, full_attention, products
from engine.kernels.activation import snake
from engine.kernels.attention import DecodeAttention, attend
from engine.kernels.compiler import X86, Vectors, can_compile, host_vectors
from engine.kernels.full_attention import attend_fully
from engine.kernels.products import HalfMatrix, as_tiles, product, tiles_shape

__all__ = [
    "X86",
    "DecodeAttention",
    "HalfMatrix",
    "Vectors",
    "as_tiles",
    "attend",
    "attend_fully",
    "can_compile",
    "compile_kernels",
    "host_vectors",
    "product",
    "snake",
    "tiles_shape",
]


def compile_kernels() -> None:
    """Compile all kernels now, where they run, so that no request waits for it."""
    if can_compile():
        for room in (products, attention, full_attention, activation):
            room.kernel(host_vectors())
