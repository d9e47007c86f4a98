"""Operation `info`: what this worker is, so that a client can find out instead of guessing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
from typing import Any

from engine.audio.mastering import FORMATS, STREAM_FORMATS
from jobs.context import JobContext
from jobs.errors import error_result
from jobs.schema import INPUT_MODELS, Info
from voice_library.errors import LibraryError

PROJECT = "worker-chatterbox"
VERSION = "0.1.0"
"""Of the project. It runs from its folder and is not installed, so no package metadata holds it."""

_PACKAGES = ("torch", "chatterbox-tts", "runpod")


async def run(request: Info, context: JobContext) -> dict[str, Any]:
    """Model, device, versions, limits, the engine's own figures and those of the jobs until now."""
    engine = context.engine
    stats = await asyncio.to_thread(engine.stats)
    return {
        "model": engine.model,
        "device": stats.get("device", "cpu"),
        "sample_rate": engine.sample_rate,
        "languages": sorted(engine.languages),
        "operations": list(INPUT_MODELS),
        "output_formats": list(FORMATS if context.feed is None else STREAM_FORMATS),
        "streaming": context.feed is not None,
        "versions": await asyncio.to_thread(versions),
        "limits": context.settings.limits,
        "engine": stats,
        "jobs": context.metrics.totals().report(),
        "voice_library": await _library_stats(context),
        "warnings": list(context.warnings),
    }


async def _library_stats(context: JobContext) -> dict[str, Any] | None:
    """Figures of the voice library; None where there is none. A store that fails is told, and the rest still given."""
    if context.voices is None:
        return None
    try:
        return await context.voices.run(context.voices.stats)
    except LibraryError as error:
        return error_result(error)


def versions() -> dict[str, str | None]:
    """Versions of the project and of what it stands on; None for what is not installed."""
    packages = {name: _package_version(name) for name in _PACKAGES}
    return {PROJECT: VERSION, "python": platform.python_version(), **packages}


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
