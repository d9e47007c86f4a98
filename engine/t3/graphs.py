"""CUDA graphs of the decoding step: one replay instead of some thousand kernel launches.

A graph is bound to shapes and addresses, which the static buffers of the cache and the rows keep. Rows
and lengths are rounded up to buckets; all buckets of a session share one memory pool and are captured
when first needed, with the rows' state put back afterwards (warming up runs the step for real).
Turned off by `Decoder(use_graphs=False)`: the same function then runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.t3.state import RowState

WARM_UP_RUNS = 2
"""Runs before a capture, for what libraries set up lazily (cuBLAS workspaces)."""


class StepGraphs:
    """Captured steps by (rows, length, candidates).

    Args:
        state: the rows, for which warming up must leave no trace.
        run: the step, called with (rows, length, candidates).
    """

    def __init__(self, state: RowState, run: Callable[[int, int, int], None]) -> None:
        self._state, self._run = state, run
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, num_rows: int, length: int, num_candidates: int) -> None:
        """Run one step of at least so many rows."""
        key = (row_bucket(num_rows, len(self._state.positions)), length, num_candidates)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        self._graphs[key].replay()

    def _capture(self, num_rows: int, length: int, num_candidates: int) -> torch.cuda.CUDAGraph:
        snapshot = self._state.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._run(num_rows, length, num_candidates)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are part of the capture: the renderer goes on beside it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(num_rows, length, num_candidates)
        self._state.restore(snapshot)
        return graph


def row_bucket(num_rows: int, most: int) -> int:
    """The next power of two, or all rows."""
    return min(1 << (num_rows - 1).bit_length(), most)
