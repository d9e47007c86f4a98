"""Ways to cut a waveform into blocks, for tests of what works block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from engine.types import FloatArray

CUTS = st.lists(st.integers(0, 30_000), max_size=12)
"""Where to cut: none, some, the same place twice (an empty block), beyond the end."""


def cut(waveform: FloatArray, at: Sequence[int]) -> Iterator[FloatArray]:
    """The blocks between the cuts, which may be empty; together the waveform."""
    edges = [0, *sorted(min(place, waveform.size) for place in at), waveform.size]
    return (waveform[start:end] for start, end in zip(edges, edges[1:], strict=False))
