"""What all tests share: few threads, and no GPU test without a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch: on tiny models a second thread costs more than it brings, and sums in a
# fixed order make a failure repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("tiny", "full"), default="tiny", help="of random checkpoints, for parity tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; torch is imported only if such a test was collected."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
