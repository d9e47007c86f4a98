"""Operation `info`: what this worker is, so that a client can find out instead of guessing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import tomllib
from pathlib import Path
from typing import Any, get_args

from jobs.context import JobContext
from jobs.schema import INPUT_MODELS, AudioFormat, Info

PROJECT = "worker-chatterbox"
_PACKAGES = ("torch", "chatterbox-tts", "runpod")


async def run(request: Info, context: JobContext) -> dict[str, Any]:
    """Model, device, versions, limits and the engine's own figures."""
    engine = context.engine
    stats = await asyncio.to_thread(engine.stats)
    return {
        "model": engine.model,
        "device": stats.get("device", "cpu"),
        "sample_rate": engine.sample_rate,
        "languages": sorted(engine.languages),
        "operations": list(INPUT_MODELS),
        "output_formats": list(get_args(AudioFormat)),
        "versions": await asyncio.to_thread(versions),
        "limits": context.settings.limits,
        "engine": stats,
        "warnings": list(context.warnings),
    }


def versions() -> dict[str, str | None]:
    """Versions of the project and of what it stands on; None for what is not installed."""
    packages = {name: _package_version(name) for name in _PACKAGES}
    return {PROJECT: project_version(), "python": platform.python_version(), **packages}


def project_version() -> str | None:
    """The version in pyproject.toml beside the code: the project runs from its folder, not as a package."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    try:
        version = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return _package_version(PROJECT)
    return str(version)


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
