"""A book's parts joined: one M4B with chapter marks where PyAV is installed, always a playlist, and subtitles.

M4B is what audiobook players read; AAC needs an encoder, and no permissive pip package has one without FFmpeg.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from scripts.batch import files

M4B, LIST_SUFFIX = ".m4b", ".m3u8"
SUBTITLES = (".srt", ".vtt")
_BIT_RATE = 64_000
"""Of AAC in mono: transparent for speech at 24 kHz, some 29 MB an hour."""

_AAC_RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_TIME = re.compile(r"(?:(\d+):)?([0-5]\d):([0-5]\d)([,.])(\d{3})")


class JoinError(Exception):
    """Parts that cannot be joined; they are there one by one."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Joining was given up because the run is to end."""


@dataclass(frozen=True)
class AudioPart:
    """A part of a book.

    Args:
        path: of its audio.
        title: of the chapter that begins with it; None where it goes on with one.
        duration_s: as its result says.
        sample_rate: Hz, as its result says.
    """

    path: Path
    title: str | None
    duration_s: float
    sample_rate: int


def can_join() -> bool:
    """Whether there is an encoder."""
    return importlib.util.find_spec("av") is not None


def joined_suffix() -> str:
    """What a book becomes here."""
    return M4B if can_join() else LIST_SUFFIX


def join_book(
    parts: Sequence[AudioPart],
    target: Path,
    about: Mapping[str, str],
    is_stopping: Callable[[], bool],
    *,
    replaces: bool = False,
) -> Path:
    """Join parts. Blocks.

    Args:
        parts: in order.
        target: where to, without suffix.
        about: title and author.
        is_stopping: asked now and then.
        replaces: whether what lies there is of an earlier time.

    Returns:
        The M4B; the playlist where there is no encoder. What is there is whole.

    Raises:
        JoinError: a part cannot be read.
        Stopped: as asked.
    """
    durations_s = _durations_s(parts)
    subtitles = _joined_subtitles(parts, durations_s)
    for suffix in SUBTITLES:
        path = target.with_name(target.name + suffix)
        if suffix in subtitles:
            files.write_text(path, subtitles[suffix])
        elif replaces:
            path.unlink(missing_ok=True)
    playlist = target.with_name(target.name + LIST_SUFFIX)
    files.write_text(playlist, _playlist(parts, durations_s, target.parent, about))
    if not can_join():
        return playlist
    path = target.with_name(target.name + M4B)
    import av

    with files.writing(path):
        try:
            _write_m4b(parts, durations_s, files.temporary(path), about, is_stopping)
        except av.FFmpegError as error:
            raise JoinError(f"{path.name} cannot be written: {error}") from error
    files.finish(path)
    return path


def _durations_s(parts: Sequence[AudioPart]) -> list[float]:
    """Of each part as it will sound, to the sample where it can be looked at."""
    if not can_join():
        return [part.duration_s for part in parts]
    import av

    durations = []
    for part in parts:
        try:
            with av.open(str(part.path)) as container:
                length = container.duration
        except av.FFmpegError as error:
            raise JoinError(f"{part.path.name} cannot be read: {error}") from error
        durations.append(part.duration_s if length is None else length / av.time_base)
    return durations


def _write_m4b(
    parts: Sequence[AudioPart],
    durations_s: Sequence[float],
    path: Path,
    about: Mapping[str, str],
    is_stopping: Callable[[], bool],
) -> None:
    import av

    rate = parts[0].sample_rate if parts[0].sample_rate in _AAC_RATES_HZ else 48_000
    with av.open(str(path), "w", format="ipod") as book:
        book.metadata.update(_tags(about))
        stream: Any = book.add_stream("aac", rate=rate, layout="mono")
        stream.bit_rate = _BIT_RATE
        book.set_chapters([*_chapters(parts, durations_s)])
        num_samples = 0
        for part in parts:
            for frame in _frames(part, rate):
                if is_stopping():
                    raise Stopped
                frame.pts, frame.time_base = num_samples, Fraction(1, rate)
                num_samples += frame.samples
                book.mux(stream.encode(frame))
        book.mux(stream.encode(None))


def _frames(part: AudioPart, rate: int) -> Iterator[Any]:
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    try:
        with av.open(str(part.path)) as container:
            if not container.streams.audio:
                raise JoinError(f"{part.path.name} holds no audio")
            for frame in container.decode(audio=0):
                yield from resampler.resample(frame)
            yield from resampler.resample(None)
    except av.FFmpegError as error:
        raise JoinError(f"{part.path.name} cannot be read: {error}") from error


def _tags(about: Mapping[str, str]) -> dict[str, str]:
    names = {"title": ("title", "album"), "author": ("artist", "album_artist")}
    tags = {tag: about[name] for name, all_tags in names.items() if name in about for tag in all_tags}
    return {**tags, "genre": "Audiobook"}


def _chapters(parts: Sequence[AudioPart], durations_s: Sequence[float]) -> Iterator[Any]:
    starts = [(sum(durations_s[:index]), part.title) for index, part in enumerate(parts) if part.title is not None]
    ends = [start_s for start_s, _ in starts[1:]] + [sum(durations_s)]
    for index, ((start_s, title), end_s) in enumerate(zip(starts, ends, strict=True)):
        yield {
            "id": index,
            "start": round(start_s * 1000),
            "end": round(end_s * 1000),
            "time_base": Fraction(1, 1000),
            "metadata": {"title": title},
        }


def _playlist(parts: Sequence[AudioPart], durations_s: Sequence[float], folder: Path, about: Mapping[str, str]) -> str:
    lines = ["#EXTM3U", *(f"#PLAYLIST:{_line(about[name])}" for name in ("title",) if name in about)]
    for part, duration_s in zip(parts, durations_s, strict=True):
        lines.append(f"#EXTINF:{duration_s:.3f},{_line(part.title or part.path.stem)}")
        lines.append(part.path.relative_to(folder).as_posix())
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------- subtitles


def _joined_subtitles(parts: Sequence[AudioPart], durations_s: Sequence[float]) -> dict[str, str]:
    """By suffix, where every part has them."""
    joined = {}
    for suffix in SUBTITLES:
        paths = [part.path.with_suffix(suffix) for part in parts]
        if all(path.is_file() for path in paths):
            texts = [path.read_text(encoding="utf-8") for path in paths]
            joined[suffix] = join_subtitles(texts, durations_s, suffix)
    return joined


def join_subtitles(texts: Sequence[str], durations_s: Sequence[float], suffix: str) -> str:
    """Subtitles of parts as those of the whole: times shifted, cues of .srt numbered anew."""
    cues: list[str] = []
    start_s = 0.0
    for text, duration_s in zip(texts, durations_s, strict=True):
        for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
            lines = block.strip("\n").split("\n")
            times = next((index for index, line in enumerate(lines) if " --> " in line), None)
            if times is None:
                continue
            shifted = _TIME.sub(lambda match, by_s=start_s: _shifted(match, by_s), lines[times])
            number = [str(len(cues) + 1)] if suffix == ".srt" else lines[:times]
            cues.append("\n".join([*number, shifted, *lines[times + 1 :]]))
        start_s += duration_s
    head = ["WEBVTT"] if suffix == ".vtt" else []
    return "\n\n".join([*head, *cues]) + "\n"


def _shifted(match: re.Match[str], by_s: float) -> str:
    hours, minutes, seconds, point, milliseconds = match.groups()
    total_ms = (int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)) * 1000 + int(milliseconds)
    whole_s, rest_ms = divmod(total_ms + round(by_s * 1000), 1000)
    return f"{whole_s // 3600:02d}:{whole_s // 60 % 60:02d}:{whole_s % 60:02d}{point}{rest_ms:03d}"
