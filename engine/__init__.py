"""Text in, waveform out: the Chatterbox speech engine.

Knows nothing of RunPod, jobs, buckets or voice names. The public names are handed on lazily, so that
importing one room of the engine (its errors, its types, its models) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.engine import Engine as Engine
    from engine.errors import SpeechError as SpeechError
    from engine.stream import SpeechStream as SpeechStream
    from engine.types import Chunk as Chunk
    from engine.types import Conditionals as Conditionals
    from engine.types import ConversionRequest as ConversionRequest
    from engine.types import EngineConfig as EngineConfig
    from engine.types import Segment as Segment
    from engine.types import Speech as Speech
    from engine.types import SpeechPiece as SpeechPiece
    from engine.types import SpeechRequest as SpeechRequest
    from engine.types import VoicePrompt as VoicePrompt
    from engine.work import WorkStore as WorkStore

_ROOM_OF = {
    "Engine": "engine.engine",
    "SpeechError": "engine.errors",
    "Chunk": "engine.types",
    "Conditionals": "engine.types",
    "ConversionRequest": "engine.types",
    "EngineConfig": "engine.types",
    "Segment": "engine.types",
    "Speech": "engine.types",
    "SpeechPiece": "engine.types",
    "SpeechRequest": "engine.types",
    "SpeechStream": "engine.stream",
    "VoicePrompt": "engine.types",
    "WorkStore": "engine.work",
}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)
