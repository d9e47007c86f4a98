"""Weight files are read lazily and safely, and modules filled from them exactly, once, and in little memory."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine import weights as weights_module
from engine.errors import SpeechError
from engine.weights import Combined, WeightFile, load_module, load_pickled


class Part(nn.Module):
    """A table that no file holds, a counter, a bias that stays float32, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.inner = nn.Linear(8, 4)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)


def meta(build: Callable[[], nn.Module] = Part) -> Any:
    with torch.device("meta"):
        return build()


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embedding.weight": torch.randn(50, 8, generator=generator),
        "inner.weight": torch.randn(4, 8, generator=generator),
        "inner.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(7),
    }


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **options) -> Path:
    tensors = state() if tensors is None else tensors
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, **options)
    return path


FORMATS = pytest.mark.parametrize(
    ("name", "options"),
    [("a.safetensors", {}), ("a.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})],
    ids=["safetensors", "pt", "pt-before-1.6"],
)


def load(path: Path, module: nn.Module, **options) -> Any:
    with WeightFile(path) as file:
        return load_module(module, file, **options)


def refusal(path: Path, module: nn.Module, **options) -> str:
    with pytest.raises(SpeechError) as raised:
        load(path, module, **options)
    assert raised.value.code == "weights_missing"
    return raised.value.message


@FORMATS
def test_every_format_fills_a_module_with_the_files_values(tmp_path: Path, name: str, options: dict) -> None:
    module = load(write(tmp_path / name, **options), meta())
    for key, value in state().items():
        assert torch.equal(module.state_dict()[key], value), key
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@FORMATS
def test_a_file_lists_keys_shapes_and_tensors(tmp_path: Path, name: str, options: dict) -> None:
    with WeightFile(write(tmp_path / name, **options)) as file:
        assert set(file.keys()) == set(state())
        assert file.shape("embedding.weight") == (50, 8)
        assert torch.equal(file.tensor("inner.bias"), state()["inner.bias"])


@FORMATS
def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path, name: str, options: dict) -> None:
    path = write(tmp_path / name, **options)
    module = load(path, meta())
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(module.inner.weight, state()["inner.weight"])


@pytest.mark.parametrize("window", [1, 40, 1 << 20])
@FORMATS
def test_values_are_the_same_however_often_the_file_is_mapped_anew(
    tmp_path: Path, name: str, options: dict, window: int
) -> None:
    with WeightFile(write(tmp_path / name, **options)) as file:
        file.window_bytes = window
        module = load_module(meta(), file)
    for key, value in state().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_a_pt_file_is_read_the_same_by_a_torch_that_notes_no_offsets(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights_module, "_offsets_are_noted", lambda: False)
    module = load(write(tmp_path / "a.pt"), meta())
    assert torch.equal(module.inner.weight, state()["inner.weight"])


OFFSETS = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="older releases need not note offsets on the meta device"
)


@OFFSETS
def test_this_torch_notes_offsets_so_that_pt_files_are_mapped_by_piece() -> None:
    assert weights_module._offsets_are_noted()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_tensor_that_was_handed_out_outlives_the_mapping_and_the_file(tmp_path: Path, name: str) -> None:
    with WeightFile(write(tmp_path / name)) as file:
        tensor = file.tensor("inner.weight")
        file.note_read(1 << 40)
    assert torch.equal(tensor, state()["inner.weight"])


def test_pt_tensors_that_are_views_of_one_storage_are_read_at_their_places(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    torch.save({"whole": whole, "row": whole[2], "turned": whole.t(), "none": torch.empty(0)}, tmp_path / "a.pt")
    with WeightFile(tmp_path / "a.pt") as file:
        assert torch.equal(file.tensor("row"), whole[2])
        assert torch.equal(file.tensor("turned"), whole.t())
        assert file.tensor("none").shape == (0,)


def test_each_parameter_gets_its_own_dtype_and_integers_keep_theirs(tmp_path: Path) -> None:
    module = load(
        write(tmp_path / "a.safetensors"),
        meta(),
        dtype_for=lambda name: torch.float32 if name.endswith("bias") else torch.bfloat16,
    )
    assert module.inner.weight.dtype is torch.bfloat16
    assert module.inner.bias.dtype is torch.float32
    assert (module.steps.dtype, int(module.steps)) == (torch.int64, 7)
    assert torch.equal(module.inner.weight, state()["inner.weight"].bfloat16())


def test_half_precision_files_load_as_float32_by_default(tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state().items()}
    module = load(write(tmp_path / "a.safetensors", half), meta())
    assert module.inner.weight.dtype is torch.float32
    assert torch.equal(module.inner.weight, half["inner.weight"].float())


def test_a_prefix_picks_one_part_of_a_file(tmp_path: Path) -> None:
    both = {f"flow.{key}": value for key, value in state().items()} | {"vocoder.weight": torch.ones(3)}
    module = load(write(tmp_path / "a.safetensors", both), meta(), prefix="flow.")
    assert torch.equal(module.inner.bias, state()["inner.bias"])


def test_keys_are_renamed_and_dropped_by_function_or_mapping(tmp_path: Path) -> None:
    renamed = {f"old_{key}": value for key, value in state().items()} | {"old_extra": torch.ones(2)}
    path = write(tmp_path / "a.safetensors", renamed)
    for rename in (
        lambda key: None if key == "old_extra" else key.removeprefix("old_"),
        {f"old_{key}": key for key in state()} | {"old_extra": None},
    ):
        assert torch.equal(load(path, meta(), rename=rename).inner.bias, state()["inner.bias"])


def test_a_parameter_can_be_made_of_several_tensors_or_of_another_layout(tmp_path: Path) -> None:
    split = state()
    weight = split.pop("inner.weight")
    split["upper"], split["lower"] = weight[:1].clone(), weight[1:].clone()
    split["embedding.weight"] = split["embedding.weight"].t().contiguous()
    module = load(
        write(tmp_path / "a.safetensors", split),
        meta(),
        combined={
            "inner.weight": Combined(("upper", "lower"), lambda upper, lower: torch.cat([upper, lower])),
            "embedding.weight": Combined(("embedding.weight",), lambda tensor: tensor.t()),
        },
    )
    assert torch.equal(module.inner.weight, weight)
    assert torch.equal(module.embedding.weight, state()["embedding.weight"])


def test_combined_parts_that_are_missing_or_give_another_shape_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    gone = {"inner.weight": Combined(("upper",), lambda tensor: tensor)}
    assert "upper" in refusal(path, meta(), combined=gone, strict=False)
    turned = {"inner.weight": Combined(("inner.weight",), lambda tensor: tensor.t())}
    assert "inner.weight 8×4, expected 4×8" in refusal(path, meta(), combined=turned)


@pytest.mark.parametrize("strict", [True, False])
def test_missing_and_misshapen_parameters_are_named_even_when_not_strict(tmp_path: Path, strict: bool) -> None:
    wrong = state()
    del wrong["inner.bias"]
    wrong["embedding.weight"] = torch.ones(51, 8)
    message = refusal(write(tmp_path / "a.safetensors", wrong), meta(), strict=strict)
    assert "missing: inner.bias" in message
    assert "embedding.weight 51×8, expected 50×8" in message


def test_unexpected_keys_are_named_when_strict_and_passed_over_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state() | {"extra": torch.ones(1)})
    assert "unexpected: extra" in refusal(path, meta())
    assert torch.equal(load(path, meta(), strict=False).inner.bias, state()["inner.bias"])


def test_a_refused_file_leaves_the_module_untouched(tmp_path: Path) -> None:
    module = meta()
    refusal(write(tmp_path / "a.safetensors", {"inner.weight": torch.ones(4, 8)}), module)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_what_the_file_lacks_must_be_filled_already_when_not_strict(tmp_path: Path) -> None:
    less = state()
    del less["steps"]
    path = write(tmp_path / "a.safetensors", less)
    assert "missing: steps" in refusal(path, meta(), strict=False)
    filled = meta()
    filled.steps = torch.tensor(3)
    assert int(load(path, filled, strict=False).steps) == 3
    assert "missing: steps" in refusal(path, filled, strict=True)


def test_a_table_left_on_the_meta_device_is_caught_by_name(tmp_path: Path) -> None:
    module = meta()
    module.table = torch.empty(4, device="meta")
    with pytest.raises(AssertionError, match="table"):
        load(write(tmp_path / "a.safetensors"), module)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("names", [["embedding.weight"], ["head.weight"]])
def test_tied_parameters_stay_one_and_need_one_name_in_the_file(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path / "a.safetensors", {name: torch.arange(15.0).view(5, 3) for name in names})
    module = load(path, meta(Tied))
    assert module.head.weight is module.embedding.weight
    assert float(module.embedding.weight[4, 2]) == 14


def test_upstreams_training_checkpoints_hold_their_state_under_model(tmp_path: Path) -> None:
    torch.save({"model": [state()], "step": 3}, tmp_path / "t3.pt")
    assert torch.equal(load(tmp_path / "t3.pt", meta()).inner.bias, state()["inner.bias"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_saved_on_cuda_loads_without_cuda(tmp_path: Path, zipped: bool, monkeypatch) -> None:
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    path = write(tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    raw = zipfile.ZipFile(path).read("a/data.pkl") if zipped else path.read_bytes()
    assert b"cuda:0" in raw
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert load(path, meta()).inner.weight.device.type == "cpu"


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save({"weight": _Bomb(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(SpeechError) as raised:
        load_pickled(tmp_path / "a.pt")
    assert raised.value.code == "weights_missing"
    assert not (tmp_path / "ran").exists()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garbage(path: Path) -> None:
    path.write_bytes(b"not weights at all" * 10)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _plain_pickle(path: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump([1, 2, 3], buffer, protocol=2)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("damage", [_truncated, _garbage, _empty, _plain_pickle, Path.unlink])
@FORMATS
def test_a_damaged_file_is_weights_missing_with_its_name(tmp_path: Path, name: str, options: dict, damage) -> None:
    path = write(tmp_path / name, **options)
    damage(path)
    assert str(path) in refusal(path, meta())


def test_a_pt_file_of_other_things_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "epoch": 3}, tmp_path / "a.pt")
    assert "state dict" in refusal(tmp_path / "a.pt", meta())


_MEASURE = """
import sys, torch
from torch import nn
from engine.weights import WeightFile, load_module
from tests.engine.test_weights import big

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(path, dtype):
    with torch.device("meta"):
        module = big()
    before = status("VmRSS")
    with WeightFile(path) as file:
        load_module(module, file, dtype_for=lambda name: dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    assert all(bool((parameter[0] == 1).all()) for parameter in module.parameters())
    return (status("VmHWM") - before) / size

print(peak(sys.argv[1], torch.bfloat16), peak(sys.argv[1], torch.float32))  # the smaller first: peaks only grow
"""


def big() -> nn.Module:
    """410 MB in float32, a quarter of it in one embedding."""
    return nn.ModuleList([nn.Embedding(26_214, 1024), *(nn.Linear(1024, 4096) for _ in range(18))])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["a.safetensors", pytest.param("a.pt", marks=OFFSETS)])
def test_memory_while_loading_peaks_under_1_2_times_the_weights(tmp_path: Path, name: str) -> None:
    """Measured in a process of its own, whose peak is not the tests'."""
    one = torch.ones(1)
    shapes = {name: tensor.shape for name, tensor in meta(big).state_dict().items()}
    path = write(tmp_path / name, {key: one.expand(shape).contiguous() for key, shape in shapes.items()})
    root = Path(weights_module.__file__).parents[1]
    command = [sys.executable, "-c", _MEASURE, str(path)]
    measured = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    path.unlink()
    as_bfloat16, as_float32 = map(float, measured.split())
    assert 0.9 < as_bfloat16 < 1.2
    assert 0.9 < as_float32 < 1.2
