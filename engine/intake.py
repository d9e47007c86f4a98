"""From a request to an utterance: the text planned and tokenised, every voice resolved, defaults filled in.

Host work that needs no rows, done before the engine's thread sees a request and beside its decoding.
All that can be wrong with a request is found here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from engine import guard
from engine.errors import SpeechError
from engine.keeping import Keeper
from engine.models import ModelSpec
from engine.t3.sampling import SamplingSettings
from engine.text import Lexicon, PlannedChunk, TextFrontEnd, is_speakable
from engine.types import PARAMETERS, Conditionals, IntArray, Speech, SpeechRequest, Voice, VoicePrompt
from engine.utterance import ChunkWork, Utterance, chunk_seeds
from engine.voices import ConditionalsCache, check_voice

UNLIMITED_TOP_K = 1 << 30
"""More than any vocabulary: every token is a candidate."""


class Intake:
    """Thread-safe; holds what is fixed at load.

    Args:
        spec: the model.
        text: its text front end.
        voices: prompts to conditionals.
        builtin: the checkpoint's own voice, or None.
        model_key: what conditionals must be made for.
        max_chunk_chars: longest stretch of text decoded at once.
        max_positions: cache positions of a row.
        num_voice_positions: the most that a voice takes of them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        text: TextFrontEnd,
        voices: ConditionalsCache,
        builtin: Conditionals | None,
        model_key: str,
        *,
        max_chunk_chars: int,
        max_positions: int,
        num_voice_positions: int,
    ) -> None:
        self.spec, self.text, self.voices, self.builtin = spec, text, voices, builtin
        self.model_key = model_key
        self._max_chunk_chars = max_chunk_chars
        self._max_positions = max_positions
        self._num_voice_positions = num_voice_positions
        self._ids = itertools.count()

    def accept(
        self,
        request: SpeechRequest,
        future: Future[Speech],
        *,
        is_early: bool = False,
        keeper: Keeper | None = None,
    ) -> Utterance:
        """Make an utterance.

        Args:
            is_early: its audio is given out while it is being decoded.
            keeper: knows what was done of it before.

        Raises:
            SpeechError: text_empty, text_too_long, language_unsupported, invalid_request, the reference's codes.
        """
        started = time.perf_counter()
        segments = request.all_segments
        lexicon = Lexicon(request.pronunciations)
        planned = self.text.plan(segments, language=request.language, max_chars=self._max_chunk_chars)
        planned = only_spoken(planned, lambda text: is_speakable(lexicon.apply(text), self.text.tags))
        if not planned:
            raise SpeechError("text_empty", "the text holds nothing that can be spoken", "text")
        seed = request.known_seed
        seeds = chunk_seeds(seed, [chunk.text for chunk in planned])
        voices = [self.resolve(segment.voice or request.voice) for segment in segments]
        chunks = [
            self._make_chunk(chunk, lexicon, chunk_seed, voices[chunk.segment_index], request.max_new_tokens)
            for chunk, chunk_seed in zip(planned, seeds, strict=True)
        ]
        sampling = self._settings(request)
        if keeper is not None:
            keeper.load_tokens(chunks, sampling, self._default(request, "exaggeration"))
        utterance = Utterance(
            id=self.next_id(),
            future=future,
            seed=seed,
            settings=sampling,
            exaggeration=self._default(request, "exaggeration"),
            chunks=chunks,
            warnings=(*self._warnings(request), *self.text.warnings(segments)),
            is_early=is_early,
        )
        utterance.add_time("condition", time.perf_counter() - started)
        return utterance

    def next_id(self) -> int:
        """An utterance's id, unique in the engine."""
        return next(self._ids)

    def _make_chunk(
        self,
        planned: PlannedChunk,
        lexicon: Lexicon,
        seed: int,
        conditionals: Conditionals,
        max_new_tokens: int | None,
    ) -> ChunkWork:
        spoken = lexicon.apply(planned.text)
        tokens = self.text.encode(spoken, planned.language)
        expectation = guard.expect(spoken, self.text.check_language(planned.language))
        return ChunkWork(
            text=planned.text,
            text_tokens=tokens,
            conditionals=conditionals,
            expectation=expectation,
            max_new_tokens=self._bound(tokens, max_new_tokens or expectation.max_tokens),
            seed=seed,
            pause_before_s=planned.pause_before_s,
            pause_after_s=planned.pause_after_s,
        )

    def _bound(self, text_tokens: IntArray, wanted: int) -> int:
        """As many new tokens as a row has positions for."""
        room = self._max_positions - self._num_voice_positions - len(text_tokens) - 1
        if room < 1:
            raise SpeechError(
                "text_too_long", f"a stretch of text became {len(text_tokens)} tokens, too many for one row", "text"
            )
        return min(wanted, room)

    def resolve(self, wanted: Voice | None) -> Conditionals:
        """The conditionals of a voice, None meaning the model's own.

        Raises:
            SpeechError: invalid_request, reference_too_short, reference_silent.
        """
        voice = wanted or self.builtin
        if voice is None:
            raise SpeechError(
                "invalid_request", f"this checkpoint of {self.spec.name} has no built-in voice: give one", "voice"
            )
        check_voice(voice, self.model_key)
        return self.voices.get(voice) if isinstance(voice, VoicePrompt) else voice

    def _default(self, request: SpeechRequest, name: str) -> float | None:
        """The request's value, the model's default, or None where the model has no such parameter."""
        default = getattr(self.spec.sampling, name)
        value = getattr(request, name)
        return default if default is None or value is None else value

    def _settings(self, request: SpeechRequest) -> SamplingSettings:
        value = functools.partial(self._default, request)
        return SamplingSettings(
            temperature=float(value("temperature") or 0.0),
            top_p=float(value("top_p") or 0.0),
            repetition_penalty=float(value("repetition_penalty") or 0.0),
            top_k=int(value("top_k") or UNLIMITED_TOP_K),
            min_p=float(value("min_p") or 0.0),
            cfg_weight=float(value("cfg_weight") or 0.0),
        )

    def _warnings(self, request: SpeechRequest) -> list[str]:
        return [
            f"{self.spec.name} has no {name}: it was ignored"
            for name in PARAMETERS
            if getattr(request, name) is not None and name not in self.spec.parameters
        ]


def only_spoken(planned: Sequence[PlannedChunk], has_sound: Callable[[str], bool]) -> list[PlannedChunk]:
    """The chunks in which there is something to say; the pauses of the others stay, with the chunk beside them."""
    kept: list[PlannedChunk] = []
    lead_s = 0.0
    for chunk in planned:
        if chunk.speakable and has_sound(chunk.text):
            kept.append(dataclasses.replace(chunk, pause_before_s=chunk.pause_before_s + lead_s))
            lead_s = 0.0
        elif kept:
            pause_s = kept[-1].pause_after_s + chunk.pause_before_s + chunk.pause_after_s
            kept[-1] = dataclasses.replace(kept[-1], pause_after_s=pause_s)
        else:
            lead_s += chunk.pause_before_s + chunk.pause_after_s
    return kept
