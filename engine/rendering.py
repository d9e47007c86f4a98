"""Which tokens become audio next: passes that are decoded, and of those that are heard early what is new.

Owned by the engine's thread, like the models. On CUDA the rendering itself runs beside the decoding, in a thread of its
own; what comes of it is taken in by the engine's thread again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine import early
from engine.early import EarlyPass, Group
from engine.errors import SpeechError
from engine.keeping import Keeper, to_24_bits
from engine.models import SPEECH_TOKEN_RATE, ModelSpec
from engine.outlet import Outlet, Rendered
from engine.s3gen.flow import FRAMES_PER_TOKEN
from engine.s3gen.renderer import Pass, Renderer, Stretch
from engine.s3gen.streaming import StreamedPass
from engine.s3gen.vocoder import SAMPLES_PER_FRAME
from engine.scheduler import STREAM_TURNS, in_turns
from engine.types import SAMPLE_RATE, IntArray
from engine.utterance import Utterance
from engine.voices import PreparedVoices

MOST_BEFORE_TURN = 64
"""How many passes before its turn a pass is rendered at most: what waits for its turn lies in memory."""
MOST_LOADING = 2
"""Passes of an utterance that are fetched at once from where they were kept: more would only lie in memory."""

SAMPLES_PER_TOKEN = SAMPLE_RATE // SPEECH_TOKEN_RATE


@dataclass(eq=False)
class Serving:
    """An utterance being served, and where its audio goes.

    Args:
        utterance: what is to be said.
        outlet: takes its audio.
        keeper: keeps its work, if asked to.
        early: how far it is heard, where that begins before it is decoded.
        is_over: it was given out, or failed: nothing more is done for it.
    """

    utterance: Utterance
    outlet: Outlet
    keeper: Keeper | None = None
    early: EarlyPass | None = None
    is_over: bool = False
    waiting: dict[int, Tensor] = field(default_factory=dict)  # passes that are rendered before their turn
    looked_for: set[int] = field(default_factory=set)  # passes that were not kept, or are being looked for
    num_loading: int = 0
    num_given: int = 0  # passes handed to the outlet

    @classmethod
    def of(cls, utterance: Utterance, outlet: Outlet, keeper: Keeper | None = None) -> Serving:
        return cls(utterance, outlet, keeper, early.begin(utterance) if utterance.is_early else None)


@dataclass(frozen=True)
class _PassWork:
    """A pass to render, or where it is heard early, what is new of it."""

    serving: Serving
    index: int
    request: Pass
    group: Group | None = None
    heard: StreamedPass | None = None

    @property
    def stretch(self) -> Stretch:
        assert self.heard is not None and self.group is not None
        return Stretch(self.request, self.heard, self.group.is_last)


@dataclass(frozen=True)
class _RenderedPass:
    work: _PassWork
    outcome: Tensor | Exception
    elapsed_s: float
    heard: StreamedPass | None = None


class Rendering:
    """The passes of all utterances on their way to audio.

    Args:
        spec: the model.
        renderer: S3Gen.
        voices: prepared voices.
        post: has something done by the engine's thread; may be called from any.
        end: told of an utterance whose audio is all given out.
        fail: told of one that cannot be rendered.
        beside: render in a thread of its own, beside decoding (CUDA), not between steps (CPU).
    """

    def __init__(
        self,
        spec: ModelSpec,
        renderer: Renderer,
        voices: PreparedVoices,
        *,
        post: Callable[[Callable[[], None]], None],
        end: Callable[[Serving], None],
        fail: Callable[[Serving, Exception], None],
        beside: bool,
    ) -> None:
        self._spec, self._renderer, self._voices = spec, renderer, voices
        self._post, self._end, self._fail = post, end, fail
        self._ready: list[tuple[Serving, int]] = []  # passes, decoded and not yet rendered
        self._early: list[Serving] = []
        self._pool = ThreadPoolExecutor(1, "renderer") if beside else None
        self._is_rendering = False
        self._num_turns = 0
        self.is_draining = False  # then nothing waits to be taken

    def add(self, serving: Serving) -> None:
        """Begin with an utterance; what has its tokens already, as a recording has, is rendered at once."""
        utterance = serving.utterance
        if serving.early is not None:
            self._early.append(serving)
        else:
            passes = range(len(utterance.passes))
            self._ready += [(serving, index) for index in passes if utterance.is_pass_decoded(index)]

    def take_decoded(self, serving: Serving, number: int) -> None:
        """A chunk is decoded."""
        utterance = serving.utterance
        chunk = utterance.chunks[number]
        was_cut_short = chunk.num_given and chunk.flags  # heard already, so it was not tried again
        if serving.keeper is not None and not was_cut_short:
            serving.keeper.save_tokens(chunk)
        if serving.early is None and utterance.is_pass_decoded(index := utterance.pass_of(number)):
            self._ready.append((serving, index))

    def drop(self, serving: Serving) -> None:
        """Forget an utterance."""
        serving.is_over = True
        self._ready = [ready for ready in self._ready if ready[0] is not serving]
        self._early = [other for other in self._early if other is not serving]

    def close(self) -> None:
        """Wait for what is being rendered."""
        if self._pool is not None:
            self._pool.shutdown()

    @property
    def has_work(self) -> bool:
        """Whether `render` would start something now."""
        if self._is_rendering:
            return False
        return any(self._is_wanted(*ready) for ready in self._ready) or bool(self._early_work(most=1))

    def _is_wanted(self, serving: Serving, index: int) -> bool:
        """Whether a pass that is ready may be rendered now."""
        is_asked_for = serving.keeper is None or index in serving.looked_for or serving.num_loading < MOST_LOADING
        is_near = index < serving.num_given + MOST_BEFORE_TURN
        return is_asked_for and is_near and not self._is_far_ahead(serving)

    def _is_far_ahead(self, serving: Serving) -> bool:
        return not self.is_draining and serving.outlet.is_far_ahead

    def render(self) -> None:
        """Start on passes that are decoded: here, or in the renderer's own thread when it is free."""
        if self._is_rendering:
            return
        work = self._next_work()
        if not work:
            return
        if self._pool is None:
            self._receive(self._render_all(work))
        else:
            self._is_rendering = True
            self._pool.submit(self._render_beside, work)

    def _render_beside(self, work: list[_PassWork]) -> None:
        rendered = self._render_all(work)

        def receive() -> None:
            self._is_rendering = False
            self._receive(rendered)

        self._post(receive)

    def _next_work(self) -> list[_PassWork]:
        """What is heard early before the rest, but for one turn in a few; a CPU's turn is a single pass."""
        self._num_turns += 1
        budget = self._renderer.max_frames
        sources = [self._early_work, self._take_ready]
        if self._num_turns % STREAM_TURNS == 0:
            sources.reverse()
        work: list[_PassWork] = []
        for source in sources:
            if budget > 0:
                work += source(budget)
                budget = self._renderer.max_frames - sum(item.request.num_frames for item in work)
        for item in work:
            if item.group is not None:
                assert item.serving.early is not None
                early.start_rendering(item.serving.utterance, item.serving.early, item.group, self._spec)
        return work

    def _early_work(self, most: int) -> list[_PassWork]:
        """Groups of tokens that are to be heard now, whoever was heard least first: so many frames, or one group."""
        work: list[_PassWork] = []
        heard = [(serving, serving.early) for serving in self._early if serving.early is not None]
        for serving, state in sorted(heard, key=lambda pair: pair[1].num_renderings):
            group = early.next_group(serving.utterance, state, self._spec)
            if most <= 0 or group is None or self._is_far_ahead(serving):
                continue
            try:
                request = self._pass(serving.utterance, state.index, group.tokens)
            except Exception as error:  # a voice that cannot be prepared harms no other
                self._fail(serving, error)
                continue
            work.append(_PassWork(serving, state.index, request, group, state.heard))
            most -= request.num_frames
        return work

    def _take_ready(self, budget: int) -> list[_PassWork]:
        """As many passes as the renderer takes in one batch, at least one; the rest waits for the next turn.

        Utterances take turns, so that a long recording, whose passes are all ready at once, holds up nobody.
        """
        work: list[_PassWork] = []
        for serving, index in in_turns([ready for ready in self._ready if self._is_wanted(*ready)]):
            if budget <= 0 or serving.is_over:  # or it failed a moment ago, and its passes went with it
                continue
            self._ready.remove((serving, index))
            try:
                item = _PassWork(serving, index, self._whole_pass(serving.utterance, index))
            except Exception as error:
                self._fail(serving, error)
                continue
            if serving.keeper is not None and index not in serving.looked_for:
                self._load(serving, serving.keeper, item)
            else:
                work.append(item)
                budget -= item.request.num_frames
        served = {item.serving for item in work}
        self._ready.sort(key=lambda ready: ready[0] in served)  # whoever was served goes behind the others
        return work

    def _load(self, serving: Serving, keeper: Keeper, work: _PassWork) -> None:
        """Look for a pass that may have been rendered before."""
        serving.looked_for.add(work.index)
        serving.num_loading += 1
        keeper.look_for_audio(
            self._audio_key(keeper, work), lambda audio: self._post(lambda: self._take_loaded(work, audio))
        )

    def _take_loaded(self, work: _PassWork, audio: Tensor | None) -> None:
        serving = work.serving
        serving.num_loading -= 1
        if serving.is_over:
            return
        if audio is None:
            self._ready.insert(0, (serving, work.index))
        else:
            self._take_pass(serving, work.index, audio)

    def _audio_key(self, keeper: Keeper, work: _PassWork) -> str:
        utterance = work.serving.utterance
        first = utterance.chunks[utterance.passes[work.index].start]
        return keeper.audio_key(first.conditionals.key, work.request.tokens, work.request.seed)

    def _whole_pass(self, utterance: Utterance, index: int) -> Pass:
        return self._pass(utterance, index, self._pass_tokens(utterance, index))

    def _pass(self, utterance: Utterance, index: int, tokens: IntArray) -> Pass:
        first = utterance.chunks[utterance.passes[index].start]
        return Pass(self._voices.flow(first.conditionals), tokens, first.seed)

    def _pass_tokens(self, utterance: Utterance, index: int) -> IntArray:
        chunks = [utterance.chunks[chunk] for chunk in utterance.passes[index]]
        return np.concatenate([chunk.rendered_tokens(self._spec) for chunk in chunks])

    def _render_all(self, work: list[_PassWork]) -> list[_RenderedPass]:
        """Render together, or one by one when that fails, so that only the bad one fails."""
        started = time.perf_counter()
        try:
            outcomes = self._outcomes(work)
        except Exception as error:
            if len(work) == 1:
                return [_RenderedPass(work[0], error, 0.0)]
            return [rendered for item in work for rendered in self._render_all([item])]
        elapsed = (time.perf_counter() - started) / len(work)
        return [_RenderedPass(item, audio, elapsed, heard) for item, (audio, heard) in zip(work, outcomes, strict=True)]

    def _outcomes(self, work: list[_PassWork]) -> list[tuple[Tensor, StreamedPass | None]]:
        outcomes: dict[int, tuple[Tensor, StreamedPass | None]] = {}
        whole = [i for i, item in enumerate(work) if item.heard is None]
        growing = [i for i, item in enumerate(work) if item.heard is not None]
        if whole:
            audio = self._renderer.render([work[i].request for i in whole])
            outcomes.update(zip(whole, ((waveform, None) for waveform in audio), strict=True))
        if growing:
            stretches = [work[i].stretch for i in growing]
            outcomes.update(zip(growing, self._renderer.render_on(stretches), strict=True))
        return [outcomes[i] for i in range(len(work))]

    def _receive(self, rendered: list[_RenderedPass]) -> None:
        for item in rendered:
            serving = item.work.serving
            if serving.is_over:
                continue
            if isinstance(item.outcome, Exception):
                self._fail(serving, item.outcome)
                continue
            serving.utterance.add_time("vocode", item.elapsed_s)
            if item.heard is not None:
                self._take_group(serving, item.work, item.outcome, item.heard)
            else:
                self._take_rendered(serving, item.work, item.outcome)

    def _take_group(self, serving: Serving, work: _PassWork, audio: Tensor, heard: StreamedPass) -> None:
        """Give out what is new of a pass that is heard early."""
        assert serving.early is not None and work.group is not None
        num_lost = self._num_lost(work)
        first = serving.early.heard.num_samples + num_lost
        for rendered in self._cut(serving.utterance, work.index, audio, first):
            serving.outlet.put(rendered)
        serving.early = early.finish_rendering(serving.utterance, serving.early, work.group, heard)
        if serving.early is None:
            self._finish(serving)

    def _take_rendered(self, serving: Serving, work: _PassWork, audio: Tensor) -> None:
        if serving.keeper is not None:
            if not bool(torch.isfinite(audio).all()):  # before it is kept, where it would be silence
                self._fail(serving, SpeechError("generation_failed", "the model gave numbers that are not finite"))
                return
            audio = to_24_bits(audio)
            serving.keeper.save_audio(self._audio_key(serving.keeper, work), audio)
        self._take_pass(serving, work.index, audio)

    def _take_pass(self, serving: Serving, index: int, audio: Tensor) -> None:
        """Give out a whole pass when its turn has come, and those that waited for it."""
        serving.waiting[index] = audio
        utterance = serving.utterance
        while serving.num_given in serving.waiting:
            index = serving.num_given
            audio = serving.waiting.pop(index)
            first = len(self._pass_tokens(utterance, index)) * SAMPLES_PER_TOKEN - len(audio)
            for rendered in self._cut(utterance, index, audio, first):
                serving.outlet.put(rendered)
            serving.num_given += 1
        if serving.num_given == len(utterance.passes):
            self._finish(serving)

    def _finish(self, serving: Serving) -> None:
        self.drop(serving)
        self._end(serving)
        serving.outlet.end()

    def _num_lost(self, work: _PassWork) -> int:
        """Samples that a prompt of an odd number of frames takes off the front."""
        voice = work.request.voice
        return (len(voice.mel) - FRAMES_PER_TOKEN * len(voice.tokens)) * SAMPLES_PER_FRAME

    def _cut(self, utterance: Utterance, index: int, audio: Tensor, first: int) -> Iterator[Rendered]:
        """A stretch of a pass by chunk.

        Args:
            audio: float32 (samples,).
            first: sample of the pass where it begins.
        """
        start, end = 0, first + len(audio)
        for number in utterance.passes[index]:
            chunk = utterance.chunks[number]
            num_kept = chunk.num_kept_tokens(self._spec) * SAMPLES_PER_TOKEN if chunk.is_done else end - start
            low, high = max(start, first), min(start + num_kept, end)
            is_end = chunk.is_done and end >= start + num_kept
            if low < high:
                yield Rendered(audio[low - first : high - first], is_end=is_end)
            if not chunk.is_done:
                return
            start += len(chunk.rendered_tokens(self._spec)) * SAMPLES_PER_TOKEN
