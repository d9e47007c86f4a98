"""The listing at RunPod's Hub says what this worker understands (docs.runpod.io, "Hub publishing guide")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models import MODELS
from jobs.schema import parse_job
from jobs.settings import Settings

FOLDER = Path(__file__).resolve().parents[1] / ".runpod"
HUB: dict[str, Any] = json.loads((FOLDER / "hub.json").read_text(encoding="utf-8"))
TESTS: dict[str, Any] = json.loads((FOLDER / "tests.json").read_text(encoding="utf-8"))
INPUTS: dict[str, dict[str, Any]] = {entry["key"]: entry["input"] for entry in HUB["config"]["env"]}
VARIABLES = {name.upper(): field for name, field in Settings.model_fields.items()}


def settings_from(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Settings:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value if isinstance(value, str) else json.dumps(value))
    return Settings()


def test_the_listing_has_every_required_field() -> None:
    assert {"title", "description", "type", "category", "config"} <= HUB.keys()
    assert (HUB["type"], HUB["category"]) == ("serverless", "audio")
    assert {"runsOn", "containerDiskInGb", "gpuCount", "gpuIds"} <= HUB["config"].keys()
    assert {"gpuTypeId", "gpuCount"} <= TESTS["config"].keys()


def test_cuda_is_asked_for_from_the_version_on_that_the_image_is_built_with() -> None:
    needed = (12, 8)  # constraints/cuda.txt: +cu128
    for config in (HUB["config"], TESTS["config"]):
        versions = [tuple(map(int, version.split("."))) for version in config["allowedCudaVersions"]]
        assert min(versions) == needed


@pytest.mark.parametrize("key", INPUTS)
def test_every_variable_is_a_setting_with_its_type_and_default(key: str) -> None:
    shown, field = INPUTS[key], VARIABLES[key]
    kinds = {bool: "boolean", int: "number", float: "number"}
    kind = kinds.get(type(field.default), "string")
    assert shown["type"] == kind
    assert shown["name"]
    assert shown["description"]
    assert shown.get("default") == field.default


@pytest.mark.parametrize("key", [key for key, shown in INPUTS.items() if "options" in shown or "min" in shown])
def test_every_choice_and_bound_is_one_that_the_worker_takes(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = INPUTS[key]
    for value in [option["value"] for option in shown.get("options", ())] + [
        shown[end] for end in ("min", "max") if end in shown
    ]:
        assert getattr(settings_from(monkeypatch, {key: value}), key.lower()) == value


def test_a_switch_says_what_the_worker_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key, shown in INPUTS.items() if shown["type"] == "boolean"]:
        for state, word in ((True, "trueValue"), (False, "falseValue")):
            assert getattr(settings_from(monkeypatch, {key: INPUTS[key][word]}), key.lower()) is state


def test_all_models_can_be_chosen_and_there_are_presets_for_the_main_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [option["value"] for option in INPUTS["MODEL"]["options"]] == list(MODELS)
    chosen = [settings_from(monkeypatch, preset["defaults"]).model for preset in HUB["config"]["presets"]]
    assert {model.partition("-")[0] for model in chosen} >= {"turbo", "multilingual", "nano"}
    for preset in HUB["config"]["presets"]:
        assert preset["defaults"].keys() <= INPUTS.keys()
        assert preset["defaults"]["MODEL"] in MODELS


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_every_test_job_is_one_that_the_worker_takes(test: dict[str, Any]) -> None:
    assert parse_job({"id": "hub", "input": test["input"]}).warnings == ()
    assert test["timeout"] >= 10_000, "milliseconds"


def test_the_test_environment_holds_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {entry["key"]: entry["value"] for entry in TESTS["config"]["env"]}
    assert values.keys() <= VARIABLES.keys()
    assert settings_from(monkeypatch, values).model in MODELS
