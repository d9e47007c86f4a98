"""Shorter dtypes of T3's matrices stay close to float32, which is the one that is compared with upstream."""

from __future__ import annotations

import platform

import pytest
import torch

from engine.models import get_model
from engine.t3.backbone import KVCache, Window
from engine.t3.model import T3, load_t3
from tests.engine.conftest import Checkpoint

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def hidden_states(model: T3) -> torch.Tensor:
    x = torch.randn(2, 9, model.shape.width, generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.shape, 2, 9, model.device, torch.float32)
    with torch.inference_mode():
        return model.logits(model.backbone(x, cache, Window(slice(0, 2), 9, torch.arange(9).expand(2, -1))))


@pytest.mark.parametrize("model", ["turbo", "original"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float16, 0.005, marks=pytest.mark.skipif(not IS_X86, reason="FBGEMM is x86 only")),
        (torch.bfloat16, 0.05),
    ],
)
def test_a_shorter_dtype_changes_the_logits_by_its_rounding_only(
    model: str, dtype: torch.dtype, tolerance: float, tiny_checkpoint: Checkpoint
) -> None:
    path = tiny_checkpoint(model) / get_model(model).t3_file
    exact = hidden_states(load_t3(path, torch.device("cpu"), torch.float32))
    short = hidden_states(load_t3(path, torch.device("cpu"), dtype))
    error = ((short - exact).norm() / exact.norm()).item()
    assert 0 < error < tolerance, error
