"""What a start may cost: only what the chosen model needs is imported, and the first job imports nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.random_checkpoint import PlantedSpeech, write_checkpoint
from tests.platform import without_ours

ROOT = Path(__file__).resolve().parent.parent

NOT_FOR_A_START = (
    # of chatterbox-tts, for preparing voices or for its own loops
    *("chatterbox", "transformers", "diffusers", "librosa", "scipy", "torchaudio", "s3tokenizer", "onnx", "conformer"),
    *("omegaconf", "gradio", "perth", "pkg_resources", "numba", "sklearn"),
    # of torch: its compiler, and what only that needs
    *("torch._dynamo", "torch._inductor", "sympy", "triton"),
    # of languages that are spoken seldom
    *("spacy_pkuseg", "pykakasi", "dicta_onnx", "russian_text_stresser", "onnxruntime"),
    # of places and services that were not asked for
    *("boto3", "botocore", "s3transfer", "huggingface_hub", "prometheus_client", "fastapi", "uvicorn"),
    # of tests and tools
    *("moto", "pytest", "matplotlib", "typer", "pyloudnorm"),
)
"""Together they take longer to import than a worker to start."""

SERVE = """
import asyncio, json, sys

def start(config):
    ready = sorted(sys.modules)
    result = asyncio.run(config["handler"]({"id": "first", "input": {"text": "One.", "seed": 1}}))
    later = sorted(set(sys.modules) - set(ready))
    print(json.dumps({"ready": ready, "later": later, "result": result}))

import runpod
runpod.serverless.start = start  # where the worker is ready, and the SDK would take jobs
import handler
sys.exit(handler.main([]))
"""


def serve_one_job(cwd: Path, **settings: str) -> dict[str, Any]:
    """handler.py as the platform starts it, until it is ready; then a job. What was imported, and the result."""
    nowhere = dict.fromkeys(("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_WEBHOOK_POST_OUTPUT"), "http://127.0.0.1:9/$ID")
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        cwd=cwd,
        env=without_ours(os.environ) | nowhere | {"PYTHONPATH": str(ROOT), "RUNPOD_POD_ID": "worker-1"} | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    served: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in served["result"], served["result"]
    return served


@pytest.fixture(scope="module", params=["draft", "turbo", "original"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A worker of each kind: what it had imported when it was ready, and what its first job did."""
    model: str = request.param
    folder = tmp_path_factory.mktemp("start")
    if model == "draft":
        return serve_one_job(folder, MODEL=model)
    weights = write_checkpoint(folder / "weights", model, plan=PlantedSpeech(tokens=tuple(range(100, 112))))
    return serve_one_job(folder, MODEL=model, MODEL_DIR=str(weights), DEVICE="cpu")


def test_a_worker_is_ready_without_what_its_model_does_not_need(served: dict[str, Any]) -> None:
    assert "torch" in served["ready"]  # or the list says nothing
    assert [name for name in NOT_FOR_A_START if name in served["ready"]] == []


def test_the_first_job_finds_all_imported_that_it_needs(served: dict[str, Any]) -> None:
    assert served["later"] == []
