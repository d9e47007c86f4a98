"""As much of a Hugging Face hub as a download needs, on this machine, and what can go wrong with one."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from engine.models import MODELS, ModelSpec

DOWN = -1
"""In place of a number of bytes: the hub answers that it is down."""

COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40
TURBO = MODELS["turbo"]


class Hub:
    """A repository, served over HTTP: model info, file tree, and files with ETag, X-Linked-Size and ranges.

    Args:
        files: content by name. Weights are large files (Git LFS), all others small.
        token: what a client has to bear, if anything.

    Public attributes are knobs and may be changed while it serves: `cuts` holds, by file name, after how many bytes
    the connection breaks, next time and so on; `served` what is sent instead of a file's content.
    """

    def __init__(self, files: Mapping[str, bytes], repository: str = TURBO.repo_id, token: str | None = None) -> None:
        self.files, self.repository, self.token = dict(files), repository, token
        self.commits = {"main": COMMIT, "v2": OTHER_COMMIT}
        self.cuts: dict[str, list[int]] = {}
        self.served: dict[str, bytes] = {}
        self.sent: list[tuple[str, int]] = []  # (file, first byte) of every GET
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 (the server looks for this name)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _reply(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith(f"/api/models/{self.repository}"):
            return self._answer_api(request, path.removeprefix(f"/api/models/{self.repository}"))
        if found := re.fullmatch(rf"/{self.repository}/resolve/([^/]+)/(.+)", path):
            return self._answer_file(request, self.commits.get(found[1], found[1]), found[2])
        return _reply(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer_api(self, request: http.server.BaseHTTPRequestHandler, path: str) -> None:
        if path.startswith("/tree/"):
            return _reply(request, 200, json.dumps([self._entry(name) for name in self.files]).encode())
        revision = path.removeprefix("/revision/") or "main"
        commit = self.commits.get(revision, revision if revision in self.commits.values() else None)
        if commit is None:
            return _reply(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [self._sibling(name) for name in self.files]
        return _reply(request, 200, json.dumps({"id": self.repository, "sha": commit, "siblings": siblings}).encode())

    def _answer_file(self, request: http.server.BaseHTTPRequestHandler, commit: str, name: str) -> None:
        if name not in self.files:
            return _reply(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data = self.served.get(name, self.files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(self.files[name])}"', "Accept-Ranges": "bytes"}
        if _is_large(name):
            linked = {"X-Linked-Size": str(len(self.files[name])), "X-Linked-ETag": f'"{_sha256(self.files[name])}"'}
            headers |= linked
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or ("", "0"))[1])
        if request.command == "HEAD":
            return _reply(request, 200, data, headers)
        self.sent.append((name, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = next(iter(self.cuts.get(name, ())), None)
        if cut is not None:
            self.cuts[name].pop(0)
        if cut == DOWN:
            return _reply(request, 503, b"")
        return _reply(request, 206 if start else 200, data[start:], headers, cut)

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
        return entry | (
            {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 130}} if _is_large(name) else {}
        )

    def _sibling(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        sibling = {"rfilename": name, "size": len(data), "blobId": _git_oid(data)}
        lfs = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
        return sibling | ({"lfs": lfs} if _is_large(name) else {})


def model_files(spec: ModelSpec = TURBO, num_values: int = 50_000, seed: int = 0) -> dict[str, bytes]:
    """Files of a checkpoint that is complete for who does not read its tensors, and a model card."""
    files = {"README.md": b"a model card", "conds.pt": b"a voice"}
    for index, name in enumerate(spec.required_files):
        files[name] = weights(num_values, seed + index) if name.endswith(".safetensors") else f"{name} {seed}".encode()
    return files


def weights(num_values: int, seed: int = 0) -> bytes:
    """A safetensors file with one tensor."""
    return save({"tensor": np.random.default_rng(seed).standard_normal(num_values).astype(np.float32)})


def _is_large(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".pt")


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _reply(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    cut_after: int | None = None,
) -> None:
    """Answer; with `cut_after`, break the connection after so many bytes of the body."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body if cut_after is None else body[:cut_after])
    request.close_connection = True
