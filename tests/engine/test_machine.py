"""Memory as the machine gives it."""

from __future__ import annotations

import mmap
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.machine import HUGE_PAGE_BYTES, ask_for_huge_pages

HAS_HUGE_PAGES = platform.system() == "Linux" and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


def asked_for(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that are marked for huge pages (VmFlags hg, proc_pid_smaps(5))."""
    mapping = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = (int(found[1], 16), int(found[2], 16))
        elif line.startswith("VmFlags:") and "hg" in line.split() and mapping[0] < end and mapping[1] > start:
            yield max(start, mapping[0]), min(end, mapping[1])


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system gives no huge pages on request")
def test_huge_pages_are_asked_for_inside_a_tensor_only() -> None:
    with mmap.mmap(-1, 10 * HUGE_PAGE_BYTES) as room:
        whole = torch.frombuffer(room, dtype=torch.uint8)
        tensor = whole[100 : 7 * HUGE_PAGE_BYTES + 100]
        assert ask_for_huge_pages(tensor) is tensor
        start, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
        parts = list(asked_for(start, end))
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert sum(b - a for a, b in parts) == 6 * HUGE_PAGE_BYTES
        assert all(first <= a < b <= last for a, b in parts)
        del whole, tensor  # they hold the room


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_has_no_whole_huge_page_is_left_as_it_is(device: str) -> None:
    tensor = torch.ones(1000, device=device)
    assert ask_for_huge_pages(tensor) is tensor
    if device == "cpu":
        assert bool((tensor == 1).all())
