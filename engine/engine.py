"""The engine: one loaded model that speaks many requests at once.

    engine = Engine.load(EngineConfig(model="turbo"))
    speech = engine.speak(SpeechRequest(text="Hello."))

A request passes three hands: the intake plans its text and resolves its voices (a small pool of
threads), the core decodes and renders it together with all others (one thread that owns the models),
and the finish joins and marks its audio (a small pool again, beside the decoding).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from engine import device as devices
from engine.audio.watermark import Watermarker
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.conditioning import Conditioner, LazyConditioner, builtin_conditionals, key_of, model_key
from engine.conversion import ConversionIntake
from engine.core import Core
from engine.device import DevicePlan
from engine.errors import SpeechError
from engine.hub import Progress
from engine.intake import Intake
from engine.keeping import Keeper, KeepPool
from engine.kernels import compile_kernels
from engine.listening import Listener
from engine.machine import available_memory
from engine.models import ModelSpec, get_model
from engine.outlet import Outlet
from engine.s3gen.renderer import Renderer, load_renderer
from engine.stream import SpeechStream
from engine.t3.backbone import KVCache
from engine.t3.decoder import Decoder
from engine.t3.model import T3, load_t3
from engine.text import load_text_front_end
from engine.types import (
    SAMPLE_RATE,
    Conditionals,
    ConversionRequest,
    EngineConfig,
    FloatArray,
    Speech,
    SpeechRequest,
    Voice,
    VoicePrompt,
)
from engine.utterance import Utterance, as_speech_error
from engine.voices import ConditionalsCache, PreparedVoices
from engine.watch import DeviceWatch
from engine.work import WorkStore

MAX_TEXT_POSITIONS = 640
"""Cache positions kept for a chunk's text: 280 characters are at most some 300 tokens, Cangjie more."""
MAX_NEW_TOKENS = 1000
"""Cache positions kept for a chunk's speech, 40 s: upstream's own bound."""
CONDITIONALS_CACHE_BYTES = 256 << 20
PREFIX_CACHE_SHARE = 0.05
"""Of the device's memory, for voices' keys and values."""
CPU_MEMORY_BYTES = 16 << 30
"""What a laptop is taken to have."""
MAX_ROWS = {"cuda": 64, "cpu": 8, "mps": 8}
"""Chunks decoded at once at most, by kind of device: beyond them a row costs as much as it brings."""
CACHE_SHARE = 0.4
"""Of the memory that is free after loading, for the rows' keys and values."""
PREFILL_BUDGET = {"cuda": 1024, "cpu": 64, "mps": 64}
"""Text tokens prefilled between two rounds of steps: about what a few steps cost."""


@dataclass(frozen=True)
class _Models:
    """What is loaded from a checkpoint to speak."""

    t3: T3
    renderer: Renderer

    def to(self, device: torch.device) -> None:
        for module in (self.t3, self.renderer.flow, self.renderer.vocoder):
            module.to(device)


class Engine:
    """Made by `load`; usable from any thread; closed by `close` or at the end of a `with`."""

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        plan: DevicePlan,
        models: _Models,
        watermarker: Watermarker | None,
    ) -> None:
        self.config, self._checkpoint, self._plan = config, checkpoint, plan
        self._spec, self._watermarker = checkpoint.spec, watermarker
        conditioner = LazyConditioner(
            lambda: Conditioner.load(self._spec, checkpoint.folder, checkpoint.fingerprint, plan.torch_device)
        )
        key = model_key(self._spec, checkpoint.fingerprint)
        conditionals = ConditionalsCache(conditioner.embed, CONDITIONALS_CACHE_BYTES)
        num_voice_positions = 2 + (self._spec.max_prompt_tokens if self._spec.backbone == "gpt2" else 32)
        length = num_voice_positions + MAX_TEXT_POSITIONS + MAX_NEW_TOKENS
        decoder = _make_decoder(config, plan, models.t3, length)
        voices = PreparedVoices(decoder.compute_prefix, plan.torch_device, _prefix_cache_bytes(plan))
        self._intake = Intake(
            self._spec,
            load_text_front_end(self._spec, checkpoint.folder),
            conditionals,
            builtin_conditionals(checkpoint.folder, self._spec, checkpoint.fingerprint),
            key,
            max_chunk_chars=config.max_chunk_chars,
            max_positions=length,
            num_voice_positions=num_voice_positions,
        )
        self._prepared = voices
        self._conversions = ConversionIntake(self._intake, lambda: Listener(conditioner.get().tokenizer))
        self._intake_pool = ThreadPoolExecutor(2, "intake")
        self._listening_pool = ThreadPoolExecutor(1, "listening")  # an hour's recording keeps no text waiting
        self._finish_pool = ThreadPoolExecutor(2, "finish")
        # These wait for a store, which may be across a network and hang: nobody else's work waits in them.
        self._resume_pool = ThreadPoolExecutor(4, "resume")
        self._keep_pool = KeepPool()
        self._watch = DeviceWatch.of(plan.torch_device)
        self._core = Core(
            self._spec,
            decoder,
            models.renderer,
            voices,
            self._watch,
            render_beside=plan.device_type == "cuda",
        )
        self._places = threading.Semaphore(config.max_queued)
        self._is_closed = self._is_abandoned = False

    @classmethod
    def load(cls, config: EngineConfig, *, progress: Progress | None = None) -> Engine:
        """Find, check and load a model, and be ready to speak.

        Args:
            progress: told of a download's bytes.

        Raises:
            SpeechError: model_unavailable, weights_missing, watermark_unavailable, invalid_request.
        """
        spec = get_model(config.model)
        checkpoint = find_checkpoint(
            spec,
            model_dir=config.model_dir,
            revision=config.model_revision,
            allow_download=config.allow_download,
            progress=progress,
        )
        plan, _ = devices.resolve(config.device, config.dtype, config.num_threads, rows=2 if spec.uses_cfg else 1)
        with ThreadPoolExecutor(1) as beside:  # half a second each, while the weights wait for the disk
            marking = beside.submit(Watermarker.load) if config.watermark else None
            compiling = beside.submit(compile_kernels) if plan.device_type == "cpu" else None
            beside.submit(lambda: checkpoint.fingerprint)  # kept by the checkpoint: some MiB read from all over it
            models = _load_models(checkpoint, plan)
            watermarker = marking.result() if marking else None
            if compiling:
                compiling.result()
        if plan.device_type == "mps":
            return cls._load_on_mps(config, checkpoint, plan, models, watermarker)
        return cls(config, checkpoint, plan, models, watermarker)

    @classmethod
    def _load_on_mps(
        cls,
        config: EngineConfig,
        checkpoint: Checkpoint,
        plan: DevicePlan,
        models: _Models,
        watermarker: Watermarker | None,
    ) -> Engine:
        """Move what was loaded on the CPU, and speak a word: what errs or gives NaN there goes back to the CPU."""
        models.to(plan.torch_device)
        trial = cls(config.replace(watermark=False), checkpoint, plan, models, None)
        with trial:
            outcome = devices.try_on_mps(lambda: trial.speak(SpeechRequest(text="One.", seed=1)).waveform)
        if not outcome.works:
            plan = devices.fall_back_to_cpu(plan, outcome)
            models.to(torch.device("cpu"))
        return cls(config, checkpoint, plan, models, watermarker)

    # ---------------------------------------------------------------------------------- speaking

    def submit(self, request: SpeechRequest) -> Future[Speech]:
        """Start speaking; many at once share the decoder's rows.

        Returns:
            A future that stays pending until its result is set: cancelling it works at any time, and frees
            what the request holds. It raises SpeechError.
        """
        return self._start(self._intake_pool, lambda future: self._intake.accept(request, future), Future())

    def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
        """Start speaking, and give the audio out as it becomes final.

        Early, the first audio is there after some 24 speech tokens, and a listener need not wait for anything else;
        joined, the pieces are close to what `speak` gives, but not the same: the model hears the end of a chunk while
        it speaks its beginning, which a stream cannot wait for. Nor can levels be matched or a chunk be decoded again
        once it was heard. Not early, pieces are some twenty seconds each and are what `speak` gives: for long texts,
        whose audio then never lies in memory as a whole.

        Args:
            early: as above.
            work: keeps speech tokens and, where not early, audio, so that a request that comes again, in this process
                or another, goes on from what was done and gives the same audio.

        Returns:
            The stream. It raises SpeechError in place of a piece; close it when it is not wanted any more.
        """
        future: Future[Speech] = Future()
        stream = SpeechStream(future, self._core.look)
        keeper = None if work is None else Keeper(work, self._keep_pool, self._made_by)
        accept = functools.partial(self._intake.accept, request, is_early=early, keeper=keeper)
        pool = self._intake_pool if keeper is None else self._resume_pool
        self._start(pool, accept, future, stream, keeper)
        return stream

    def submit_conversion(self, request: ConversionRequest) -> Future[Speech]:
        """Start saying a recording again in another voice.

        Returns:
            A future as `submit`'s. The speech is as long as the recording, its chunks are the pieces it was cut into.
        """
        submitted_s = time.perf_counter()

        def accept(future: Future[Speech]) -> Utterance:
            return self._conversions.accept(request, future, submitted_s, lambda: self._check_wanted(future))

        return self._start(self._listening_pool, accept, Future())

    def convert(
        self, audio: FloatArray, sample_rate: int, voice: Voice | None = None, *, seed: int | None = None
    ) -> Speech:
        """Say what a recording says in another voice, and wait. Every model can: none needs its T3 for it.

        Args:
            audio: float32 (T,) mono in [-1, 1], of any length.
            sample_rate: Hz.
            voice: whose; None for the model's built-in voice.
            seed: the same seed gives the same audio.

        Raises:
            SpeechError: reference_unreadable, reference_too_short, reference_silent, invalid_request,
                generation_failed, out_of_memory, cancelled.
        """
        request = ConversionRequest(audio=audio, sample_rate=sample_rate, voice=voice, seed=seed)
        return self.submit_conversion(request).result()

    def _start(
        self,
        pool: ThreadPoolExecutor,
        accept: Callable[[Future[Speech]], Utterance],
        future: Future[Speech],
        stream: SpeechStream | None = None,
        keeper: Keeper | None = None,
    ) -> Future[Speech]:
        if self._is_closed:
            raise SpeechError("cancelled", "the engine is closed")
        self._watch.check()
        self._count_in(future)
        try:
            pool.submit(self._take_in, accept, future, stream, keeper, time.perf_counter())
        except RuntimeError:  # closed since we looked
            future.cancel()
            raise SpeechError("cancelled", "the engine is closed") from None
        return future

    def _count_in(self, future: Future[Speech]) -> None:
        """Keep the number of requests inside bounded."""
        if not self._places.acquire(blocking=False):
            raise SpeechError("out_of_memory", f"{self.config.max_queued} requests wait already; try again later")
        future.add_done_callback(lambda _: self._places.release())

    def _check_wanted(self, future: Future[Speech]) -> None:
        if self._is_abandoned or future.cancelled():
            raise SpeechError("cancelled", "the request was cancelled")

    def _take_in(
        self,
        accept: Callable[[Future[Speech]], Utterance],
        future: Future[Speech],
        stream: SpeechStream | None,
        keeper: Keeper | None,
        submitted_s: float,
    ) -> None:
        if future.cancelled():
            return
        try:
            utterance = accept(future)
            utterance.submitted_s = submitted_s  # waiting for this thread was part of the queue
            self._core.submit(utterance, self._outlet(utterance, stream), keeper)
        except BaseException as error:
            self._watch.look(error)
            if future.set_running_or_notify_cancel():
                future.set_exception(as_speech_error(error))

    def _outlet(self, utterance: Utterance, stream: SpeechStream | None) -> Outlet:
        """What takes the utterance's audio: to the stream, or to its future."""
        marking = None
        if self._watermarker is not None:
            marking = self._watermarker.start(SAMPLE_RATE, early=utterance.is_early)
        return Outlet(
            utterance,
            utterance.joiner(),
            marking,
            stream,
            self._finish_pool,
            on_taken=self._core.look,
            on_error=self._watch.look,
            model=self.model,
            warnings=self._plan.warnings,
        )

    def speak(self, request: SpeechRequest) -> Speech:
        """Speak and wait.

        Raises:
            SpeechError: see its codes.
        """
        return self.submit(request).result()

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """A prompt's conditionals, computed once.

        Raises:
            SpeechError: reference_too_short, reference_silent, generation_failed once the device is lost.
        """
        self._watch.check()
        try:
            return self._intake.voices.get(prompt)
        except BaseException as error:
            self._watch.look(error)
            raise

    # ---------------------------------------------------------------------------------- about itself

    @property
    def is_lost(self) -> bool:
        """Whether the device failed for good: every request is refused, and only a new process speaks again."""
        return self._watch.is_lost

    @property
    def model(self) -> str:
        """Name of the model that speaks."""
        return self._spec.name

    @property
    def sample_rate(self) -> int:
        """Hz of the waveforms."""
        return SAMPLE_RATE

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes that the model speaks and that all is there for."""
        return self._intake.text.languages_ready()

    @property
    def min_reference_s(self) -> float:
        """A voice prompt must be longer than this, seconds."""
        return self._spec.min_reference_s

    def voice_key(self, prompt_key: str) -> str:
        """The key that the conditionals of a prompt have, from the prompt's own `key` (a hash of its audio).

        Another checkpoint or way of preparing voices gives another key, so that whoever keeps conditionals under it
        never finds those of another.
        """
        return key_of(prompt_key, self._intake.model_key)

    @property
    def _made_by(self) -> str:
        """What decides, beside a request, what comes of it."""
        plan = self._plan
        return f"{self._intake.model_key} {plan.dtype} {plan.flow_dtype}"

    @property
    def parameters(self) -> frozenset[str]:
        """Speech parameters that the model has."""
        return self._spec.parameters

    def stats(self) -> dict[str, Any]:
        """Device, caches and rows, as plain values."""
        return {
            "model": self.model,
            "model_dir": str(self._checkpoint.folder),
            "revision": self._checkpoint.revision,
            "fingerprint": self._checkpoint.fingerprint,
            "device": self._plan.device,
            "dtype": self._plan.dtype,
            "flow_dtype": self._plan.flow_dtype,
            "num_threads": self._plan.num_threads,
            "reasons": list(self._plan.reasons),
            "conditionals_cache": dataclasses.asdict(self._intake.voices.stats()),
            "prefix_cache": dataclasses.asdict(self._prepared.stats()),
            "core": dataclasses.asdict(self._core.stats()),
        }

    def free_bytes(self) -> dict[str, int]:
        """Memory that requests can still have, by place: the device's name, and "host" where the host says."""
        free = {} if (host := available_memory()) is None else {"host": host}
        if self._plan.device_type == "cuda":
            device = self._plan.torch_device
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free[self._plan.device] = torch.cuda.mem_get_info(device)[0] + unused
        return free

    def close(self, *, drain: bool = False) -> None:
        """Finish what was submitted (drain) or cancel it, and free the models."""
        if self._is_closed:
            return
        self._is_closed, self._is_abandoned = True, not drain
        self._intake_pool.shutdown(wait=True, cancel_futures=False)
        self._listening_pool.shutdown(wait=True, cancel_futures=False)
        self._resume_pool.shutdown(wait=drain, cancel_futures=False)
        self._core.close(drain=drain)
        self._finish_pool.shutdown(wait=True)
        self._keep_pool.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_models(checkpoint: Checkpoint, plan: DevicePlan) -> _Models:
    """Load to the plan's device; for mps to the CPU first, as plain matrices that can move on."""
    device = torch.device("cpu") if plan.device_type == "mps" else plan.torch_device
    pack = plan.device_type == "cpu"
    spec: ModelSpec = checkpoint.spec
    flow_dtype = torch.bfloat16 if plan.flow_dtype == "bfloat16" else torch.float32
    renderer = load_renderer(
        spec,
        checkpoint.path(spec.s3gen_file),
        device,
        flow_dtype,
        autocast=lambda: devices.autocast(plan),
        exact=devices.exact_float32,
        max_frames=60_000 if plan.device_type == "cuda" else 1,
        pack=pack,
    )
    t3 = load_t3(checkpoint.path(spec.t3_file), device, plan.torch_dtype, pack=pack)
    return _Models(t3, renderer)


def _make_decoder(config: EngineConfig, plan: DevicePlan, t3: T3, length: int) -> Decoder:
    """Rows of `length` positions, as many as asked for or as memory allows."""
    rows_per_chunk = 2 if t3.uses_guidance else 1
    row_bytes = length * KVCache.num_bytes_per_position(t3.shape, plan.cache_dtype)
    return Decoder(
        t3,
        num_rows=rows_per_chunk * (config.max_rows or choose_rows(plan, rows_per_chunk * row_bytes)),
        length=length,
        max_new_tokens=length,
        cache_dtype=plan.cache_dtype,
        prefill_budget=PREFILL_BUDGET[plan.device_type],
        use_graphs=config.use_graphs,
    )


def choose_rows(plan: DevicePlan, bytes_per_chunk: int) -> int:
    """Chunks decoded at once, from the memory that is free now."""
    if plan.device_type == "cuda":
        free = torch.cuda.mem_get_info(plan.torch_device)[0]
    else:
        free = available_memory() or CPU_MEMORY_BYTES
    return max(1, min(MAX_ROWS[plan.device_type], int(free * CACHE_SHARE) // bytes_per_chunk))


def _prefix_cache_bytes(plan: DevicePlan) -> int:
    total = CPU_MEMORY_BYTES
    if plan.device_type == "cuda":
        total = torch.cuda.get_device_properties(plan.torch_device).total_memory
    return int(total * PREFIX_CACHE_SHARE)
