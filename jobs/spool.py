"""Audio too long for memory: spooled while it is spoken, then levelled and encoded block by block.

Both the spool and the encoded file are temporary files without a name, so whatever ends the process, they are gone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.audio.mastering import FileEncoder, LevelMeter, Limiter, Resampler
from engine.types import FloatArray
from jobs import delivery
from jobs.audio_file import AudioFile
from jobs.delivery import Encoded
from jobs.errors import JobError
from jobs.schema import SpeechInput

BLOCK_S = 20.0
"""Audio that is mastered at a time: short enough to be interrupted, long enough to cost nothing more."""


class Spool:
    """One job's audio. Blocks: for one thread after another, never the event loop.

    Where no level is asked for, audio is encoded as it comes and never spooled.

    Args:
        request: the job, whose output has been checked.
        sample_rate: Hz of the audio that comes.
        folder: where the temporary files are; None, or one that cannot be written to, means the system's.

    Every method raises JobError storage_failed where a file cannot be written.
    """

    def __init__(self, request: SpeechInput, sample_rate: int, folder: Path | None) -> None:
        self._request, self._folder = request, folder
        self.sample_rate = sample_rate
        self._level = delivery.Level.of(request)
        self._meter = None if self._level.mode == "none" else LevelMeter(sample_rate)
        self._files = contextlib.ExitStack()
        self._samples: BinaryIO | None = None
        self._chain: _Chain | None = None
        self._num_samples = self._num_mastered = 0

    @property
    def duration_s(self) -> float:
        """Seconds of audio so far."""
        return self._num_samples / self.sample_rate

    @property
    def num_encoded_bytes(self) -> int:
        """Size of the encoded file so far."""
        return 0 if self._chain is None else self._chain.num_bytes

    def push(self, waveform: FloatArray) -> None:
        """Add the next float32 (T,)."""
        self._num_samples += waveform.size
        with _reported():
            if self._meter is None:
                self._mastering().push(waveform)
                self._num_mastered += waveform.size
                return
            self._meter.push(waveform)
            if self._samples is None:
                self._samples = self._new_file()
            self._samples.write(np.ascontiguousarray(waveform, "<f4").data)

    def master(self) -> bool:
        """Encode one more block of what was spooled; False once all of it is."""
        if self._num_mastered == self._num_samples:
            return False
        assert self._samples is not None
        num_samples = min(round(BLOCK_S * self.sample_rate), self._num_samples - self._num_mastered)
        with _reported():
            self._samples.seek(self._num_mastered * 4)
            block = np.frombuffer(self._samples.read(num_samples * 4), "<f4")
            assert block.size == num_samples, (block.size, num_samples)
            self._mastering().push(block)
        self._num_mastered += num_samples
        return True

    def finish(self) -> Encoded:
        """The whole, once all is mastered; its audio must be opened before this is closed."""
        assert self._num_mastered == self._num_samples, (self._num_mastered, self._num_samples)
        with _reported():
            chain = self._mastering()
            chain.finish()
            audio = AudioFile.of_temporary(chain.file)
        return Encoded(
            audio=audio,
            format=self._request.output_format,
            sample_rate=self._request.sample_rate or self.sample_rate,
            duration_s=self.duration_s,
            master_s=chain.master_s,
            encode_s=chain.encode_s,
            warnings=self._level.warnings(chain.reached_lufs),
        )

    def close(self) -> None:
        """Remove what there is."""
        self._files.close()

    def _mastering(self) -> _Chain:
        if self._chain is None:
            self._chain = _Chain(self._request, self.sample_rate, self._level, self._meter, self._new_file())
        return self._chain

    def _new_file(self) -> BinaryIO:
        """A temporary file that has no name, or loses it at once."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                return self._files.enter_context(tempfile.TemporaryFile(dir=self._folder))
        return self._files.enter_context(tempfile.TemporaryFile())


class _Chain:
    """What samples go through on their way into the file: gain, rate, limiter, format.

    Args:
        request: the job.
        sample_rate: Hz of the samples.
        level: what is asked for.
        meter: has heard all samples; None where no level is asked for.
        file: where the encoded audio goes.
    """

    def __init__(
        self, request: SpeechInput, sample_rate: int, level: delivery.Level, meter: LevelMeter | None, file: BinaryIO
    ) -> None:
        rate = request.sample_rate or sample_rate
        self.file = file
        self.master_s = self.encode_s = 0.0
        self._gain = np.float32(1.0 if meter is None else 10 ** (meter.gain_db(level.mode, level.lufs) / 20))
        self._limiter = Limiter(rate) if level.mode in ("rms", "loudness") else None  # a new rate has new peaks
        self._behind = LevelMeter(rate) if level.mode == "loudness" else None
        self._resampler = None if rate == sample_rate else Resampler(sample_rate, rate)
        self._encoder = FileEncoder(file, rate, request.output_format, title=request.title)

    @property
    def num_bytes(self) -> int:
        """Size of the file so far."""
        return os.fstat(self.file.fileno()).st_size

    @property
    def reached_lufs(self) -> float | None:
        """Loudness of what went into the file; None where none was asked for."""
        return None if self._behind is None else self._behind.lufs()

    def push(self, samples: FloatArray) -> None:
        """Take the next float32 (T,)."""
        started_s = time.perf_counter()
        samples = samples * self._gain
        if self._resampler is not None:
            samples = self._resampler.push(samples)
        self._limit(samples, started_s)

    def finish(self) -> None:
        """Write what is still inside, and complete the file."""
        started_s = time.perf_counter()
        if self._resampler is not None:
            self._limit(self._resampler.finish(), started_s)
            started_s = time.perf_counter()
        if self._limiter is not None:
            self._out(self._limiter.finish(), started_s)
            started_s = time.perf_counter()
        self._encoder.finish()
        self.file.flush()
        self.encode_s += time.perf_counter() - started_s

    def _limit(self, samples: FloatArray, started_s: float) -> None:
        self._out(samples if self._limiter is None else self._limiter.push(samples), started_s)

    def _out(self, samples: FloatArray, started_s: float) -> None:
        if self._behind is not None:
            self._behind.push(samples)
        mastered_s = time.perf_counter()
        self._encoder.push(samples)
        self.file.flush()  # a full disk is told here, and the size is known
        self.master_s += mastered_s - started_s
        self.encode_s += time.perf_counter() - mastered_s


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise JobError("storage_failed", f"the audio cannot be written to a temporary file: {reason}") from error
