"""Several worker processes at once on one folder and on one bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.voice_library import workers
from voice_library import S3Options, VoiceLibrary

NUM_PROCESSES = 4
NUM_NAMES = 8


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_every_name_has_one_winner_whose_audio_is_kept(
    place: str, tmp_path: Path, bucket: str, s3_options: S3Options
) -> None:
    uri, endpoint_url = (
        (str(tmp_path), "") if place == "folder" else (f"s3://{bucket}/v", s3_options.endpoint_url or "")
    )
    processes = [workers.start("race", uri, endpoint_url, number, NUM_NAMES) for number in range(NUM_PROCESSES)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        workers.tell(process, "go")
    for process in processes:
        outputs.append(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    won = [tuple(line.split()) for output in outputs for line in output.splitlines()]
    assert sorted(name for name, _ in won) == sorted(map(str, range(NUM_NAMES)))
    with VoiceLibrary.open(uri, s3=s3_options) as library:
        assert library.check() == []
        kept = {(voice.name.removeprefix("name "), voice.audio_hash) for voice in library.list().voices}
        assert kept == set(won)
