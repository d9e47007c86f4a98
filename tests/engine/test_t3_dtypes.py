"""Shorter dtypes of T3's matrices stay close to float32, which is the one that is compared with upstream."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import can_compile
from engine.models import get_model
from engine.t3.backbone import KVCache, Window
from engine.t3.model import T3, load_t3
from tests.engine.conftest import Checkpoint


def hidden_states(model: T3, cache_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 9, model.shape.width, generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.shape, 2, 9, model.device, cache_dtype)
    places = torch.arange(9).expand(2, -1)
    with torch.inference_mode():
        first = model.backbone(x[:, :6], cache, Window(slice(0, 2), 9, places[:, :6]))
        steps = [
            model.backbone(x[:, [at]], cache, Window(slice(0, 2), 9, places[:, [at]].contiguous())) for at in (6, 7, 8)
        ]
        return model.logits(torch.cat((first, *steps), dim=1))


@pytest.mark.parametrize("model", ["turbo", "original"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float16, 0.005, marks=pytest.mark.skipif(not can_compile(), reason="needs the CPU kernels")),
        (torch.bfloat16, 0.05),
    ],
)
def test_a_shorter_dtype_changes_the_logits_by_its_rounding_only(
    model: str, dtype: torch.dtype, tolerance: float, tiny_checkpoint: Checkpoint
) -> None:
    path = tiny_checkpoint(model) / get_model(model).t3_file
    exact = hidden_states(load_t3(path, torch.device("cpu"), torch.float32))
    cache_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    short = hidden_states(load_t3(path, torch.device("cpu"), dtype), cache_dtype)
    error = ((short - exact).norm() / exact.norm()).item()
    assert 0 < error < tolerance, error
