"""What a file says and what RunPod answers, as the same fields; how they differ; and what to send.

Fields are named as in the file (`workers.min`, `env.MODEL`). A field that the file leaves out is not compared; a new
endpoint gets its default. Shapes are those of the REST API v2 (https://docs.runpod.io/api-reference-v2/openapi.json).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.deploying.files import DEFAULT_EXECUTION_TIMEOUT_S, DeployError, EndpointFile

DEFAULT_IDLE_TIMEOUT_S = 5
DEFAULT_SCALER, DEFAULT_SCALER_VALUE = "queue_delay", 4
_SCALERS = {"queue_delay": ("QUEUE_DELAY", "queueDelay"), "request_count": ("REQUEST_COUNT", "requestCount")}
_UNORDERED = ("gpus", "exclude_gpus", "data_centers", "network_volumes", "cuda")
_SENT_TOGETHER = (
    *("workers.min", "workers.max", "workers.idle_timeout_s", "scaler.type", "scaler.value"),
    *("exclude_gpus", "gpus_per_worker"),
)
"""Goes along with others as it is deployed where the file leaves it out."""
_ENV = "env."

Fields = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A field that is not as the file says; None for nothing."""

    field: str
    deployed: Any
    wanted: Any

    @property
    def env_name(self) -> str | None:
        return self.field.removeprefix(_ENV) if self.field.startswith(_ENV) else None


def wanted_fields(file: EndpointFile, volume_id: str | None, deployed: Fields | None = None) -> Fields:
    """Of a file, with defaults where there is nothing yet that could stay as it is.

    Args:
        volume_id: of the file's network volume.
        deployed: None for a new endpoint.
    """
    scaler_type = file.scaler.type or (None if file.scaler.value is None else DEFAULT_SCALER)
    said: Fields = {
        "image": file.image,
        "workers.min": file.workers.min,
        "workers.max": file.workers.max,
        "workers.idle_timeout_s": file.workers.idle_timeout_s,
        "scaler.type": scaler_type,
        "scaler.value": file.scaler.value,
        "execution_timeout_s": file.execution_timeout_s,
        "flashboot": file.flashboot,
        "gpus": file.gpus or None,
        "exclude_gpus": file.exclude_gpus,
        "gpus_per_worker": file.gpus_per_worker,
        "cpus": file.cpus or None,
        "container_disk_gb": file.container_disk_gb,
        "data_centers": file.data_centers,
        "network_volumes": (volume_id,) if volume_id else None if file.network_volume is None else (),
        "registry": file.registry,
    }
    fields = {name: value for name, value in said.items() if value is not None}
    if file.cuda is not None or file.min_cuda:  # each replaces the other
        fields |= {"cuda": file.cuda or (), "min_cuda": file.min_cuda}
    fields |= {_ENV + name: value for name, value in file.whole_env.items()}
    fields = _defaults(fields, deployed) | fields
    return {name: fields[name] for name in said if name in fields} | fields


def _defaults(fields: Fields, deployed: Fields | None) -> Fields:
    """Of a new endpoint; of one that gets another scaler, those that go with it."""
    defaults: Fields = {}
    if deployed is None:
        defaults = {
            "workers.min": 0,
            "workers.max": 3,
            "scaler.type": DEFAULT_SCALER,
            "execution_timeout_s": DEFAULT_EXECUTION_TIMEOUT_S,
            "flashboot": True,
        }
        defaults |= {"exclude_gpus": (), "gpus_per_worker": 1} if "gpus" in fields else {}
    scaler = fields.get("scaler.type") or defaults.get("scaler.type")
    if scaler is not None and (deployed is None or deployed["scaler.type"] != scaler):
        defaults["scaler.value"] = DEFAULT_SCALER_VALUE
        if scaler == "queue_delay":
            defaults["workers.idle_timeout_s"] = DEFAULT_IDLE_TIMEOUT_S
    return defaults


def deployed_fields(endpoint: Mapping[str, Any]) -> Fields:
    """Of an endpoint as RunPod answers."""
    gpu, workers, scaling = (endpoint.get(part) or {} for part in ("gpu", "workers", "scaling"))
    scaler = next((name for name, (wire, _) in _SCALERS.items() if wire == scaling.get("type")), None)
    fields: Fields = {
        "image": endpoint.get("image"),
        "gpus": gpu.get("pools") or (),
        "exclude_gpus": gpu.get("excludedTypes") or (),
        "gpus_per_worker": gpu.get("count"),
        "cpus": tuple(f"{cpu['id']}-{cpu['vcpuCount']}" for cpu in endpoint.get("cpu") or ()),
        "cuda": gpu.get("allowedCudaVersions") or (),
        "min_cuda": gpu.get("minCudaVersion") or None,
        "workers.min": workers.get("min"),
        "workers.max": workers.get("max"),
        "workers.idle_timeout_s": workers.get("idleTimeout"),
        "scaler.type": scaler,
        "scaler.value": None if scaler is None else scaling.get(_SCALERS[scaler][1]),
        "execution_timeout_s": None if endpoint.get("timeout") is None else endpoint["timeout"] / 1000,
        "flashboot": endpoint.get("flashboot") not in (None, "OFF"),
        "container_disk_gb": endpoint.get("disk"),
        "data_centers": endpoint.get("dataCenterIds") or (),
        "network_volumes": endpoint.get("networkVolumes") or (),
        "registry": endpoint.get("registry") or "",
    }
    return fields | {_ENV + name: value for name, value in env_of(endpoint).items()}


def env_of(endpoint: Mapping[str, Any]) -> dict[str, str]:
    return dict(endpoint.get("env") or {})


def refuse_contradictions(name: str, wanted: Fields, deployed: Fields) -> None:
    """What a file says has to go together with what it leaves as it is."""
    after = deployed | wanted
    least, most = after["workers.min"], after["workers.max"]
    if least is not None and most is not None and least > most:
        raise DeployError(f"{name}: workers.min ({least}) is over workers.max ({most}); say both in the file")
    if after["scaler.type"] == "request_count" and "workers.idle_timeout_s" in wanted:
        raise DeployError(f"{name}: RunPod takes no workers.idle_timeout_s together with its request_count scaler")


def differences(deployed: Fields, wanted: Fields) -> list[Change]:
    """What is to be changed. A variable that the file does not name is to go."""
    changes = [
        Change(name, deployed.get(name), value)
        for name, value in wanted.items()
        if _comparable(name, deployed.get(name)) != _comparable(name, value)
    ]
    gone = [name for name in deployed if name.startswith(_ENV) and name not in wanted]
    return [*changes, *(Change(name, deployed[name], None) for name in gone)]


def _comparable(name: str, value: Any) -> Any:
    """A list as a list, and sorted where its order means nothing."""
    if not isinstance(value, list | tuple):
        return value
    return sorted(set(value)) if name in _UNORDERED else list(value)


# -------------------------------------------------------------------------------------- what to send


def create_body(file: EndpointFile, wanted: Fields) -> dict[str, Any]:
    """Of POST /serverless."""
    body: dict[str, Any] = {"name": file.name, "type": "QUEUE"}
    for part in _parts(wanted):
        body |= _wire(part, wanted)
    if body.get("gpu", {}).get("minCudaVersion") == "":
        del body["gpu"]["minCudaVersion"]  # clears it in an update, and is no version in a new endpoint
    return body


def update_body(changes: Sequence[Change], wanted: Fields, deployed: Fields) -> dict[str, Any]:
    """Of PATCH /serverless/{id}: the parts that hold a change, each of them whole."""
    kept = {name: deployed[name] for name in _SENT_TOGETHER if deployed[name] is not None}
    body: dict[str, Any] = {}
    for part in _parts({change.field: None for change in changes}):
        body |= _wire(part, kept | wanted)
    return body


def refuse_another_family(endpoint: Mapping[str, Any], file: EndpointFile) -> None:
    """An endpoint stays with GPUs, or without, and keeps its type."""
    if bool(endpoint.get("cpu")) != bool(file.cpus):
        kinds = ("CPU", "GPU") if endpoint.get("cpu") else ("GPU", "CPU")
        raise DeployError(
            f"{file.name}: RunPod cannot turn a {kinds[0]} endpoint into a {kinds[1]} one; delete it first"
        )
    if endpoint.get("type") not in (None, "QUEUE"):
        raise DeployError(
            f"{file.name}: deployed as {endpoint['type']}, and this worker needs a queue; delete it first"
        )


_PART_OF = {
    "gpus": "gpu",
    "exclude_gpus": "gpu",
    "gpus_per_worker": "gpu",
    "cuda": "gpu",
    "min_cuda": "gpu",
    "execution_timeout_s": "timeout",
    "container_disk_gb": "disk",
    "data_centers": "dataCenterIds",
    "network_volumes": "networkVolumes",
    "cpus": "cpu",
    "scaler": "scaling",
}


def _parts(fields: Fields) -> dict[str, None]:
    """The wire's parts that hold these fields, in order."""
    firsts = (name if name in _PART_OF else name.split(".")[0] for name in fields)
    return dict.fromkeys(_PART_OF.get(first, first) for first in firsts)


def _wire(part: str, wanted: Fields) -> dict[str, Any]:
    """One part of a body."""
    match part:
        case "gpu":
            return {"gpu": _gpu(wanted)}
        case "cpu":
            split = (cpu.rsplit("-", 1) for cpu in wanted["cpus"])
            return {"cpu": [{"id": flavor, "vcpuCount": int(count)} for flavor, count in split]}
        case "workers":
            keys = {"workers.min": "min", "workers.max": "max"}
            if wanted.get("scaler.type") != "request_count":
                keys["workers.idle_timeout_s"] = "idleTimeout"
            return {"workers": {key: wanted[name] for name, key in keys.items() if name in wanted}}
        case "scaling":
            wire, key = _SCALERS[wanted["scaler.type"]]
            value = wanted["scaler.value"]
            return {"scaling": {"type": wire, key: int(value) if value == int(value) else value}}
        case "timeout":
            return {"timeout": wanted["execution_timeout_s"] * 1000}
        case "flashboot":
            return {"flashboot": "FLASHBOOT" if wanted["flashboot"] else "OFF"}
        case "disk":
            return {"disk": wanted["container_disk_gb"]}
        case "dataCenterIds":
            return {"dataCenterIds": list(wanted["data_centers"])}
        case "networkVolumes":
            return {"networkVolumes": list(wanted["network_volumes"])}
        case "registry":
            return {"registry": wanted["registry"] or None}
        case "env":
            return {"env": {name.removeprefix(_ENV): v for name, v in wanted.items() if name.startswith(_ENV)}}
        case _:
            assert part == "image", part
            return {"image": wanted["image"]}


def _gpu(wanted: Fields) -> dict[str, Any]:
    """Pools and exclusions together: RunPod forgets the exclusions of pools that come without them."""
    gpu: dict[str, Any] = {"pools": list(wanted["gpus"]), "excludedTypes": list(wanted["exclude_gpus"])}
    if "gpus_per_worker" in wanted:
        gpu["count"] = wanted["gpus_per_worker"]
    if "cuda" in wanted:
        gpu |= {"allowedCudaVersions": list(wanted["cuda"]), "minCudaVersion": wanted["min_cuda"] or ""}
    return gpu
