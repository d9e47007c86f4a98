"""Decisions about the machine, for machines that are not here: every probe is written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import machine
from engine.device import (
    DevicePlan,
    MpsTrial,
    apply,
    autocast,
    choose,
    exact_float32,
    fall_back_to_cpu,
    measure_gains,
    try_on_mps,
)
from engine.errors import SpeechError
from engine.kernels import can_compile
from engine.machine import CudaDevice, Probe, has_bf16_flag, parse_cpu_list, parse_cpu_quota, probe

ARCHES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
AMPERE = CudaDevice("NVIDIA A100", (8, 0), 80 << 30)
BLACKWELL = CudaDevice("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30)
PASCAL = CudaDevice("NVIDIA GeForce GTX 1080", (6, 1), 8 << 30)

SERVER = Probe("Linux", "x86_64", num_cores=16)
MACBOOK = Probe(
    "Darwin", "arm64", mps_built=True, mps_available=True, cpu_bf16=True, num_cores=10, num_performance_cores=6
)


def with_gpu(gpu: CudaDevice, arches: tuple[str, ...] = ARCHES) -> Probe:
    return dataclasses.replace(SERVER, cuda=(gpu,), cuda_arches=arches)


def code_and_field(probed: Probe, *args: object, **kwargs: object) -> tuple[str, str | None]:
    with pytest.raises(SpeechError) as raised:
        choose(probed, *args, **kwargs)  # type: ignore[arg-type]
    return raised.value.code, raised.value.field


@pytest.mark.parametrize("gpu", [AMPERE, BLACKWELL, CudaDevice("NVIDIA L4", (8, 9), 24 << 30)])
def test_a_modern_gpu_is_taken_with_bf16_and_no_measurement(gpu: CudaDevice) -> None:
    plan = choose(with_gpu(gpu))
    assert (plan.device, plan.dtype, plan.flow_dtype) == ("cuda:0", "bfloat16", "bfloat16")
    assert not plan.warnings
    assert any(gpu.name in reason for reason in plan.reasons)


def test_float32_asked_for_on_a_modern_gpu_is_exact() -> None:
    plan = choose(with_gpu(AMPERE), dtype="float32")
    assert (plan.device, plan.dtype, plan.flow_dtype) == ("cuda:0", "float32", "float32")


def test_an_old_gpu_that_torch_has_kernels_for_speaks_in_float32() -> None:
    plan = choose(with_gpu(PASCAL, ("sm_60", "sm_70")))
    assert (plan.device, plan.dtype, plan.warnings) == ("cuda:0", "float32", ())


def test_bf16_asked_for_on_an_old_gpu_is_done_with_a_warning() -> None:
    plan = choose(with_gpu(PASCAL, ("sm_60",)), dtype="bfloat16")
    assert plan.dtype == "bfloat16"
    assert "emulates" in plan.warnings[0]


@pytest.mark.parametrize(("gpu", "arches"), [(PASCAL, ARCHES), (BLACKWELL, ("sm_80", "sm_90"))])
def test_a_gpu_without_kernels_is_left_with_a_warning_and_refused_when_asked_for(
    gpu: CudaDevice, arches: tuple[str, ...]
) -> None:
    probed = with_gpu(gpu, arches)
    plan = choose(probed)
    assert plan.device == "cpu"
    assert gpu.name in plan.warnings[0]
    assert code_and_field(probed, "cuda") == ("invalid_request", "device")


def test_kernels_run_on_higher_minors_and_ptx_on_newer_majors() -> None:
    a10 = CudaDevice("NVIDIA A10", (8, 6), 24 << 30)
    assert choose(with_gpu(a10, ("sm_80",)), "cuda").device == "cuda:0"
    assert choose(with_gpu(BLACKWELL, ("sm_90", "compute_90")), "cuda").device == "cuda:0"
    assert choose(with_gpu(AMPERE, ("compute_80",)), "cuda").device == "cuda:0"
    assert choose(with_gpu(CudaDevice("NVIDIA H200", (9, 0), 141 << 30), ("sm_90a",)), "cuda").device == "cuda:0"
    assert code_and_field(with_gpu(AMPERE, ("sm_86",)), "cuda") == ("invalid_request", "device")


def test_a_server_cpu_takes_bf16_where_it_was_measured_faster_and_only_there() -> None:
    probed = dataclasses.replace(SERVER, cpu_bf16=True, bf16_gain=1.9, bf16_flow_gain=0.4)
    plan = choose(probed)
    assert (plan.device, plan.dtype, plan.flow_dtype, plan.num_threads) == ("cpu", "bfloat16", "float32", 16)
    swapped = choose(dataclasses.replace(probed, bf16_gain=0.4, bf16_flow_gain=1.9))
    assert (swapped.dtype, swapped.flow_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("gain", [None, 0.3, 1.05])
def test_a_server_cpu_stays_with_float32_where_bf16_was_not_measured_clearly_faster(gain: float | None) -> None:
    plan = choose(dataclasses.replace(SERVER, bf16_gain=gain, bf16_flow_gain=gain))
    assert (plan.dtype, plan.flow_dtype) == ("float32", "float32")


def test_a_dtype_that_was_asked_for_is_given_whatever_was_measured() -> None:
    slow = dataclasses.replace(SERVER, bf16_gain=0.1, bf16_flow_gain=0.1)
    plan = choose(slow, dtype="bfloat16")
    assert (plan.dtype, plan.flow_dtype) == ("bfloat16", "bfloat16")


def test_apple_silicon_speaks_on_the_cpu_with_one_thread_per_performance_core() -> None:
    plan = choose(MACBOOK)
    assert (plan.device, plan.dtype, plan.num_threads) == ("cpu", "float32", 6)


def test_apple_silicon_uses_mps_only_when_asked_and_there() -> None:
    assert choose(MACBOOK, "mps").device == "mps"
    assert code_and_field(dataclasses.replace(MACBOOK, mps_available=False), "mps") == ("invalid_request", "device")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", "", "cuda:", "mps:0"])
def test_a_device_that_is_none_is_refused_by_name(device: str) -> None:
    assert code_and_field(with_gpu(AMPERE), device) == ("invalid_request", "device")


@pytest.mark.parametrize(("probed", "device"), [(SERVER, "cuda"), (with_gpu(AMPERE), "cuda:1"), (SERVER, "mps")])
def test_a_device_that_is_not_there_is_never_replaced(probed: Probe, device: str) -> None:
    assert code_and_field(probed, device) == ("invalid_request", "device")


def test_wrong_dtype_and_thread_count_are_refused_by_name() -> None:
    assert code_and_field(SERVER, dtype="float8") == ("invalid_request", "dtype")
    assert code_and_field(SERVER, num_threads=0) == ("invalid_request", "num_threads")


def test_threads_follow_the_request_then_the_environment_then_the_grant_then_the_cores() -> None:
    granted = dataclasses.replace(SERVER, num_granted_cores=4)
    told = dataclasses.replace(granted, env={"OMP_NUM_THREADS": "3"})
    assert choose(told, num_threads=2).num_threads == 2
    assert choose(told).num_threads == 3
    assert choose(granted).num_threads == 4
    assert choose(dataclasses.replace(SERVER, num_granted_cores=64)).num_threads == 16
    assert choose(dataclasses.replace(SERVER, env={"OMP_NUM_THREADS": "many"})).num_threads == 16


def test_mps_that_speaks_is_kept() -> None:
    assert try_on_mps(lambda: np.array([0.1, -0.1], dtype=np.float32)) == MpsTrial()


def _fails() -> np.ndarray:
    raise NotImplementedError("aten::unfold is not implemented for MPS")


@pytest.mark.parametrize(
    ("run_probe", "problem"),
    [
        (_fails, "aten::unfold"),
        (lambda: np.array([0.1, np.nan]), "NaN"),
        (lambda: np.array([0.1, np.inf]), "infinity"),
        (lambda: np.zeros(100), "silent"),
        (lambda: np.zeros(0), "silent"),
    ],
)
def test_mps_that_fails_its_trial_leaves_a_float32_cpu_plan_with_a_warning(run_probe, problem: str) -> None:
    trial = try_on_mps(run_probe)
    assert not trial.works
    plan = fall_back_to_cpu(choose(MACBOOK, "mps", "bfloat16"), trial)
    assert (plan.device, plan.dtype, plan.flow_dtype, plan.num_threads) == ("cpu", "float32", "float32", 6)
    assert problem in plan.warnings[-1]


@pytest.fixture
def torch_settings():
    threads = torch.get_num_threads()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32)
    yield
    torch.set_num_threads(threads)
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = kept


@pytest.mark.usefixtures("torch_settings")
def test_applying_a_plan_sets_threads_and_turns_tf32_off_for_good() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    apply(DevicePlan("cuda:0", "bfloat16", 2))
    assert torch.get_num_threads() == 2
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_autocast_follows_the_flow_dtype_and_exact_float32_switches_it_off() -> None:
    a = torch.ones(2, 2)
    with autocast(DevicePlan("cpu", "float32", 1, flow_dtype="bfloat16")):
        assert (a @ a).dtype is torch.bfloat16
        with exact_float32():
            assert (a @ a).dtype is torch.float32
    with autocast(DevicePlan("cpu", "bfloat16", 1, flow_dtype="float32")):
        assert (a @ a).dtype is torch.float32


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", pytest.param("float16", marks=pytest.mark.skipif(not can_compile(), reason="needs the CPU kernels"))],
)
def test_the_measured_gain_is_a_positive_ratio(rows: int, dtype: str) -> None:
    gains = measure_gains((dtype,), rows)
    assert list(gains) == [dtype] and 0.01 < gains[dtype] < 100


WITH_KERNELS = dataclasses.replace(SERVER, half_kernels=True)


def test_float16_is_for_cpus_with_kernels_and_leaves_the_flow_in_float32() -> None:
    plan = choose(WITH_KERNELS, dtype="float16")
    assert (plan.dtype, plan.flow_dtype, plan.torch_dtype) == ("float16", "float32", torch.float16)
    for probed, device in ((SERVER, "cpu"), (MACBOOK, "cpu"), (with_gpu(AMPERE), "cuda")):
        with pytest.raises(SpeechError, match="x86") as caught:
            choose(probed, device, "float16")
        assert caught.value.field == "dtype"


def test_float16_is_the_automatic_choice_where_its_kernels_run() -> None:
    plan = choose(WITH_KERNELS)
    assert (plan.dtype, plan.flow_dtype, plan.cache_dtype) == ("float16", "float32", torch.float16)
    assert choose(WITH_KERNELS, dtype="float32").dtype == "float32"
    assert choose(dataclasses.replace(with_gpu(AMPERE), half_kernels=True)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("half", "bf16", "chosen"), [(1.9, 1.7, "float16"), (1.7, 1.9, "bfloat16"), (0.9, 0.8, "float32")]
)
def test_where_bf16_is_measured_the_faster_of_the_two_short_dtypes_is_chosen(
    half: float, bf16: float, chosen: str
) -> None:
    probed = dataclasses.replace(WITH_KERNELS, cpu_bf16=True, half_gain=half, bf16_gain=bf16, bf16_flow_gain=1.0)
    assert choose(probed).dtype == chosen


def test_this_machine_can_be_probed_and_planned_for() -> None:
    found = probe()
    assert found.num_cores >= 1
    assert choose(found, "cpu").num_threads >= 1
    assert choose(found).device in ("cpu", "cuda:0")


def test_bf16_hardware_is_read_from_cpuinfo() -> None:
    assert has_bf16_flag("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n")
    assert has_bf16_flag("processor\t: 0\nFeatures\t: fp asimd svebf16 bf16\n")
    assert not has_bf16_flag("flags\t\t: fpu avx512f avx512_vnni\nmodel name\t: bf16\n")


def test_kernel_lists_and_quotas_are_read() -> None:
    assert parse_cpu_list("0-3,8\n".strip()) == {0, 1, 2, 3, 8}
    assert parse_cpu_list("") == set()
    assert parse_cpu_quota("200000 100000") == 2
    assert parse_cpu_quota("50000 100000") == 1
    assert parse_cpu_quota("max 100000") is None
    assert parse_cpu_quota("") is None


def test_hyper_threads_count_as_one_core_and_slow_cores_are_set_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5}, raising=False)
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"}
    for cpu, listed in siblings.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(listed + "\n")
    (tmp_path / "sys/devices/cpu_core").mkdir(parents=True)
    (tmp_path / "sys/devices/cpu_core/cpus").write_text("0-3\n")
    found = machine._probe_linux(tmp_path)
    assert (found["num_cores"], found["num_performance_cores"], found["num_granted_cores"]) == (4, 2, None)
