"""What the other processes of the tests do: `python workers.py ROLE FOLDER ...`, as workers of a fleet would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, S3Options, VoiceLibrary

NUM_NAMES = 6
"""So few that writers meet each other's leftovers under every one."""


def churn(library: VoiceLibrary, seed: int) -> None:
    """Add, change, rename, use and delete voices of few names until killed; says so at every step begun."""
    while True:
        name = f"voice {seed % NUM_NAMES}"
        try:
            voice = library.add(name, sound(seed % NUM_NAMES, 400), RATE, description=str(seed))
            library.put_conditionals(voice.voice_id, "key", b"conditionals")
            library.update(voice.voice_id, description="changed")
            library.update(voice.voice_id, name=f"renamed {seed % NUM_NAMES}")
        except LibraryError as error:
            if error.code not in ("voice_exists", "voice_not_found"):
                raise
        for name in (f"renamed {seed % NUM_NAMES}", f"voice {(seed + 2) % NUM_NAMES}"):
            try:
                library.delete(library.find(name).voice_id)
            except LibraryError as error:
                if error.code != "voice_not_found":
                    raise
        print("step", flush=True)
        seed += 1


def race(library: VoiceLibrary, number: int, num_names: int) -> None:
    """Add voices of the same names as everybody else; prints each that this process won."""
    print("ready", flush=True)
    sys.stdin.readline()
    for name in range(num_names):
        try:
            voice = library.add(f"name {name}", sound(100 * number + name), RATE)
            print(name, voice.audio_hash, flush=True)
        except LibraryError as error:
            if error.code != "voice_exists":
                raise


def main() -> None:
    role, uri, endpoint_url, *numbers = sys.argv[1:]
    s3 = S3Options(endpoint_url, "us-east-1", "id", "secret") if endpoint_url else None
    library = VoiceLibrary.open(uri, s3=s3, refresh_s=0.0)
    roles: dict[str, Callable[..., None]] = {"churn": churn, "race": race}
    roles[role](library, *map(int, numbers))
    library.close()


if __name__ == "__main__":
    main()
