"""What all tests share: few threads, and no GPU test without a GPU."""

from __future__ import annotations

import os
import signal

import pytest

# Before anything imports torch: on tiny models a second thread costs more than it brings, and sums in a
# fixed order make a failure repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever runs the tests in the background (nohup, a script's `&`) has these ignored, and so would programs have that
# tests start and interrupt. A handler is not handed on to them, and this one ignores the signal all the same.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


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
