"""A stand-in for RunPod's REST API v2, over HTTP: endpoints and network volumes, as strict as the platform's schema."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "rpa_TESTKEY_0123456789"
Json = dict[str, Any]

CREATE_FIELDS = {
    *("name", "type", "image", "gpu", "cpu", "workers", "scaling", "timeout", "flashboot", "disk", "env"),
    *("dataCenterIds", "networkVolumes", "registry", "args", "ports", "templateId"),
}
GPU_FIELDS = {"pools", "excludedTypes", "count", "allowedCudaVersions", "minCudaVersion"}
LOSE, DROP = "lose", "drop"
"""Faults: the connection ends after the request was carried out, or before."""


@dataclass
class Platform:
    """What an account holds.

    Args:
        faults: by method, what happens to the next requests, in turn: LOSE, DROP, or a status.
        requests: method, path and body of all that came.
    """

    endpoints: dict[str, Json] = field(default_factory=dict)
    volumes: list[Json] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    requests: list[tuple[str, str, Json | None]] = field(default_factory=list)
    url: str = ""
    hides_new_for: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def writes(self) -> list[tuple[str, str, Json | None]]:
        return [request for request in self.requests if request[0] != "GET"]

    def add(self, **changes: Any) -> Json:
        """An endpoint that is there already."""
        status, endpoint = self.create(
            {
                "name": "tts",
                "type": "QUEUE",
                "image": "example.com/tts:1",
                "gpu": {"pools": ["AMPERE_24"]},
                "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
                "timeout": 600_000,
                **changes,
            }
        )
        assert status == 201, endpoint
        return endpoint

    def create(self, body: Json) -> tuple[int, Json]:
        wrong = _wrong_create(body)
        if wrong:
            return problem(422, wrong, errors=[f"{wrong}; got {json.dumps(body)}"])
        new: Json = {
            "id": f"ep{len(self.endpoints) + 1}",
            "createdAt": "2026-01-01T00:00:00Z",
            "env": {},
            "timeout": 300_000,
            "dataCenterIds": [],
            "networkVolumes": [],
            "flashboot": "OFF",
            "disk": 5,
            "registry": None,
            **copy.deepcopy(body),
        }
        defaults = {"min": 0, "max": 3} | ({"idleTimeout": 10} if _by_delay(new) else {})
        new["workers"] = defaults | new.get("workers", {})
        if isinstance(new.get("gpu"), dict):
            new["gpu"] = {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None} | new["gpu"]
        new["requestUrls"] = {"run": f"https://api.runpod.ai/v2/{new['id']}/run"}
        self.endpoints[new["id"]] = new
        return 201, new

    def update(self, endpoint: Json, body: Json) -> tuple[int, Json]:
        unknown = set(body) - (CREATE_FIELDS - {"type"})
        scaling = body.get("scaling") or endpoint["scaling"]
        if unknown or ("idleTimeout" in (body.get("workers") or {}) and scaling["type"] == "REQUEST_COUNT"):
            return problem(422, f"unknown fields {sorted(unknown)}, or idleTimeout with REQUEST_COUNT")
        gpu = body.get("gpu") or {}
        if set(gpu) - GPU_FIELDS or (gpu.get("allowedCudaVersions") and gpu.get("minCudaVersion")):
            return problem(400, "gpu")
        for name, value in copy.deepcopy(body).items():
            endpoint[name] = endpoint[name] | value if name in ("gpu", "workers") else value
        if "pools" in gpu and "excludedTypes" not in gpu:
            endpoint["gpu"].pop("excludedTypes", None)
        if "minCudaVersion" in gpu:
            endpoint["gpu"]["minCudaVersion"] = gpu["minCudaVersion"] or None
        if not _by_delay(endpoint):
            endpoint["workers"].pop("idleTimeout", None)
        return 200, endpoint

    def answer(self, method: str, path: str, body: Json | None) -> tuple[int, Json | None]:
        match method, path.strip("/").split("/"):
            case "GET", ["serverless"]:
                hidden = len(self.endpoints) if self.hides_new_for > 0 and self.endpoints else 0
                self.hides_new_for -= 1 if hidden else 0
                return 200, {"endpoints": list(self.endpoints.values())[hidden:]}
            case "GET", ["network-volumes"]:
                return 200, {"networkVolumes": self.volumes}
            case "POST", ["serverless"] if body is not None:
                return self.create(body)
            case _, ["serverless", endpoint_id] if endpoint_id in self.endpoints:
                return self._of_one(method, endpoint_id, body or {})
        return problem(404, f"no {path}")

    def _of_one(self, method: str, endpoint_id: str, body: Json) -> tuple[int, Json | None]:
        if method == "PATCH":
            return self.update(self.endpoints[endpoint_id], body)
        if method == "DELETE":
            del self.endpoints[endpoint_id]
            return 204, None
        return 200, self.endpoints[endpoint_id]


def _by_delay(endpoint: Json) -> bool:
    return bool(endpoint["scaling"]["type"] == "QUEUE_DELAY")


def _wrong_create(body: Json) -> str | None:
    gpu, workers = body.get("gpu", {}), body.get("workers", {})
    if set(body) - CREATE_FIELDS or set(gpu) - GPU_FIELDS:
        return "unknown field"
    if not {"name", "type", "scaling", "image"} <= set(body) or ("gpu" in body) == ("cpu" in body):
        return "missing field"
    if "minCudaVersion" in gpu and (not gpu["minCudaVersion"] or gpu.get("allowedCudaVersions")):
        return "minCudaVersion"
    if "idleTimeout" in workers and not _by_delay(body):
        return "idleTimeout with REQUEST_COUNT"
    return None


def problem(status: int, detail: str, **more: Any) -> tuple[int, Json]:
    return status, {"title": "Problem", "status": status, "detail": detail, **more}


class _Handler(BaseHTTPRequestHandler):
    platform: Platform

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = self.path.removeprefix("/v2")
        with self.platform.lock:
            self.platform.requests.append((self.command, path, body))
            faults = self.platform.faults.get(self.command, [])
            fault = faults.pop(0) if faults else None
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                status, content = problem(401, f"not valid: {self.headers.get('Authorization')}")
            elif isinstance(fault, int):
                status, content = problem(fault, f"told to fail; got {json.dumps(body)}")
            elif fault != DROP:
                answered, found = self.platform.answer(self.command, path, body)
                status, content = answered, found or {}
        self.close_connection = True
        if fault in (LOSE, DROP):
            return
        sent = b"" if status == 204 else json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Platform]:
    """A platform at its `url`, until the block ends."""
    platform = Platform()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"platform": platform}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    platform.url = f"http://127.0.0.1:{server.server_port}/v2"
    try:
        yield platform
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
