"""What the other processes of the tests do: `python workers.py ROLE FOLDER ...`, as workers of a fleet would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, S3Options, VoiceLibrary

NUM_NAMES = 6
"""So few that writers meet each other's leftovers under every one."""


Work = Callable[[VoiceLibrary], None]


def add(library: VoiceLibrary) -> None:
    library.add("new", sound(1), RATE)


def add_with_id(library: VoiceLibrary) -> None:
    library.add("new", sound(1), RATE, voice_id="new-id")


def update(library: VoiceLibrary) -> None:
    library.update("old-id", description="changed")


def rename(library: VoiceLibrary) -> None:
    library.update("old-id", name="new")


def delete(library: VoiceLibrary) -> None:
    library.delete("old-id")


def put(library: VoiceLibrary) -> None:
    library.put_conditionals("old-id", "key", b"conditionals")


FULL_AFTER: dict[Work, tuple[int, ...]] = {
    add: (1, 300, 2_000),
    add_with_id: (1, 300, 2_000),
    update: (1, 300),
    rename: (1, 300),
    put: (1, 5),
}
"""Bytes that a file may grow to: less than the largest one that the work writes."""


def churn(library: VoiceLibrary, seed: int) -> None:
    """Add, change, rename, use and delete voices of few names until killed."""
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


def fill(library: VoiceLibrary) -> None:
    """Do every work on a disk that fills up; prints each and its outcome, and waits to be told to go on."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead of the process
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    for work, limits in FULL_AFTER.items():
        for num_bytes in limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, free[1]))
            try:
                work(library)
                outcome = "done"
            except LibraryError as error:
                outcome = error.code
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
            print(work.__name__, outcome, flush=True)
            sys.stdin.readline()


def spawn(folder: str) -> None:
    """Start and await writers on command. They are forked: a new interpreter for each would take minutes."""
    while command := sys.stdin.readline().split():
        if command[0] == "reap":
            print(os.waitstatus_to_exitcode(os.waitpid(int(command[1]), 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            try:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
                churn(VoiceLibrary.open(folder, refresh_s=0.0), int(command[1]))
            finally:
                os._exit(1)
        print(child, flush=True)


def start(role: str, uri: str, endpoint_url: str = "", *numbers: int) -> subprocess.Popen[str]:
    """A process in one of these roles; end it by closing its input."""
    command = [sys.executable, __file__, role, uri, endpoint_url, *map(str, numbers)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Give a process a line."""
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def ask(process: subprocess.Popen[str], line: str) -> str:
    """Give a process a line, and get the one it answers with."""
    tell(process, line)
    assert process.stdout is not None
    return process.stdout.readline()


def main() -> None:
    role, uri, endpoint_url, *numbers = sys.argv[1:]
    s3 = S3Options(endpoint_url, "us-east-1", "id", "secret") if endpoint_url else None
    library = VoiceLibrary.open(uri, s3=s3, refresh_s=0.0)
    roles: dict[str, Callable[..., None]] = {
        "race": race,
        "fill": fill,
        "spawn": lambda _: spawn(uri),
    }
    roles[role](library, *map(int, numbers))
    library.close()


if __name__ == "__main__":
    main()
