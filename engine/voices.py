"""A voice is paid for once: conditionals, the voice's keys and values, and S3Gen's prompt, each kept.

Caches are bounded by bytes and belong to one engine. Conditionals are host arrays, keyed by the
prompt's content and the model's; what lies on the device is keyed by the conditionals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from cachetools import LRUCache

from engine.errors import SpeechError
from engine.s3gen.flow import FlowVoice
from engine.s3gen.renderer import flow_voice
from engine.t3.decoder import VoicePrefix
from engine.types import Conditionals, Voice, VoicePrompt

_MAX_FLOW_VOICES = 64  # some 0.2 MB each


@dataclass(frozen=True)
class CacheStats:
    """Counters of one cache."""

    hits: int
    misses: int
    entries: int
    num_bytes: int


class ConditionalsCache:
    """Prompts to conditionals, computed at most once even when many ask at the same time.

    Args:
        embed: computes them; called outside any lock, one prompt at a time per key.
        max_bytes: of the conditionals kept.
    """

    def __init__(self, embed: Callable[[VoicePrompt], Conditionals], max_bytes: int) -> None:
        self._embed = embed
        self._kept: LRUCache[str, Conditionals] = LRUCache(max_bytes, getsizeof=lambda c: c.num_bytes)
        self._running: dict[str, Future[Conditionals]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, prompt: VoicePrompt) -> Conditionals:
        """The prompt's conditionals; waits when another thread is computing them.

        Raises:
            SpeechError: what embedding raised.
        """
        with self._lock:
            kept = self._kept.get(prompt.key)
            if kept is not None:
                self._hits += 1
                return kept
            running = self._running.get(prompt.key)
            if running is None:
                self._misses += 1
                mine = self._running[prompt.key] = Future()
            else:
                self._hits += 1
        return running.result() if running is not None else self._compute(prompt, mine)

    def _compute(self, prompt: VoicePrompt, future: Future[Conditionals]) -> Conditionals:
        try:
            conditionals = self._embed(prompt)
        except BaseException as error:
            with self._lock:
                del self._running[prompt.key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._running[prompt.key]
            if conditionals.num_bytes <= self._kept.maxsize:
                self._kept[prompt.key] = conditionals
        future.set_result(conditionals)
        return conditionals

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._kept), int(self._kept.currsize))


@dataclass(frozen=True)
class PreparedVoice:
    """A voice on the device, ready to decode."""

    prefix: VoicePrefix
    flow: FlowVoice


class PreparedVoices:
    """Conditionals to what lies on the device. Owned by the engine's thread, but counted from any.

    Args:
        compute_prefix: runs the voice part of T3: (speaker (256,), prompt tokens (N,), exaggeration).
        device: where the models are.
        max_bytes: of keys and values kept.
    """

    def __init__(
        self,
        compute_prefix: Callable[[torch.Tensor, torch.Tensor, float | None], VoicePrefix],
        device: torch.device,
        max_bytes: int,
    ) -> None:
        self._compute_prefix = compute_prefix
        self._device = device
        self._kept: LRUCache[tuple[str, float | None], PreparedVoice] = LRUCache(
            max_bytes, getsizeof=lambda voice: voice.prefix.num_bytes
        )
        self._flows: LRUCache[str, FlowVoice] = LRUCache(_MAX_FLOW_VOICES)
        self._hits = self._misses = 0

    def flow(self, conditionals: Conditionals) -> FlowVoice:
        """What S3Gen needs of a voice; a recording that is converted needs no more."""
        kept = self._flows.get(conditionals.key)
        if kept is None:
            kept = self._flows[conditionals.key] = flow_voice(conditionals, self._device)
        return kept

    def get(self, conditionals: Conditionals, exaggeration: float | None) -> PreparedVoice:
        key = (conditionals.key, exaggeration)
        kept = self._kept.get(key)
        if kept is not None:
            self._hits += 1
            return kept
        self._misses += 1
        prepared = self._prepare(conditionals, exaggeration)
        if prepared.prefix.num_bytes <= self._kept.maxsize:
            self._kept[key] = prepared
        return prepared

    def _prepare(self, conditionals: Conditionals, exaggeration: float | None) -> PreparedVoice:
        speaker = torch.tensor(conditionals.speaker_embedding, device=self._device)
        tokens = torch.tensor(conditionals.t3_prompt_tokens, dtype=torch.int64, device=self._device)
        return PreparedVoice(self._compute_prefix(speaker, tokens, exaggeration), self.flow(conditionals))

    def stats(self) -> CacheStats:
        return CacheStats(self._hits, self._misses, len(self._kept), int(self._kept.currsize))


def check_voice(voice: Voice, model_key: str) -> None:
    """Refuse conditionals of another model or checkpoint.

    Raises:
        SpeechError: invalid_request.
    """
    if isinstance(voice, Conditionals) and voice.model_key != model_key:
        raise SpeechError(
            "invalid_request",
            f"these conditionals were made for {voice.model_key}, this engine is {model_key}; give the voice prompt",
            "voice",
        )
