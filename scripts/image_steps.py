"""Performs the Dockerfile's own steps without a container engine: `scripts/image_steps.py --build-arg PLATFORM=cpu`.

Each stage gets an empty folder in place of / and a fresh virtual environment in place of the image's Python, and no
more files than .dockerignore lets through. Then the image's command runs in it: a job for the draft voice, which the
image does not have, must fail cleanly, and a job for a tiny random checkpoint must give audio. So a file that is not
copied, a package that is not installed or a pin that cannot be had is found before an image is built. What needs root
(the user, owners) and what says nothing here (labels, the signal) is left out and named.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402

from scripts.image.context import context_files, read_patterns  # noqa: E402
from scripts.image.dockerfile import (  # noqa: E402
    Dockerfile,
    DockerfileError,
    Instruction,
    Stage,
    expand,
    parse,
    parse_argument,
    parse_pairs,
)

NEEDS_ROOT = ("useradd",)
"""A RUN that begins with one of these is left out."""

_INHERITED = re.compile(r"PATH|HOME|LANG|LC_\w+|TMPDIR|PIP_\w+|SSL_CERT_\w+|(?:https?|no|all)_proxy", re.IGNORECASE)
_QUICK = {"PIP_NO_COMPILE": "1", "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "60"}
"""Compiling the packages takes half as long again and finds nothing; an index that is not there is told soon."""

_TINY = """
import sys
from engine.random_checkpoint import PlantedSpeech, write_checkpoint
write_checkpoint(sys.argv[1], "turbo", plan=PlantedSpeech(tokens=tuple(range(100, 140))))
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StepError(Exception):
    """A step of the image failed; the message names it."""


@dataclass
class Room:
    """Where one stage is performed.

    Args:
        root: the folder that stands for /.
        variables: ARG and ENV, paths of the image already under `root`.
        workdir: the current folder, as the image names it.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    workdir: PurePosixPath = PurePosixPath("/")
    command: tuple[str, ...] = ()

    def place(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / str(self.workdir / path).lstrip("/")

    @property
    def python_home(self) -> Path:
        return self.root / ".venv"

    @property
    def environment(self) -> dict[str, str]:
        """Of a step: the image's variables, and of this machine's what pip and a shell need."""
        kept = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
        own = {"PATH": f"{self.python_home / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
        # The base interpreter is this machine's: no bytecode is written into it.
        own |= {"PYTHONPYCACHEPREFIX": str(self.root / ".pycache"), "VIRTUAL_ENV": str(self.python_home)}
        return _QUICK | kept | own | self.variables

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the current folder and keep what it prints."""
        return subprocess.run(
            command,
            cwd=self.place("."),
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@app.command(help=__doc__)
def main(
    build_args: Annotated[
        list[str] | None, typer.Option("--build-arg", metavar="NAME=VALUE", help="As of docker build.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the stages go, and stay; else they are removed.")
    ] = None,
) -> None:
    """Perform the steps, then try the image's command."""
    arguments = dict(each.partition("=")[::2] for each in build_args or ())
    try:
        with _folder(into) as folder:
            image = perform(parse((ROOT / "Dockerfile").read_text(encoding="utf-8")), arguments, folder)
            try_image(image)
    except (StepError, DockerfileError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def perform(dockerfile: Dockerfile, arguments: Mapping[str, str], folder: Path) -> Room:
    """Perform every stage that is not only the ground of others.

    Returns:
        The last stage's room.

    Raises:
        StepError: naming the step and what it said.
    """
    files = [str(path) for path in context_files(ROOT, read_patterns((ROOT / ".dockerignore").read_text()))]
    rooms: dict[str, Room] = {}
    for stage in dockerfile.ends:
        rooms[stage.name] = room = Room(folder / (stage.name or "image"))
        room.root.mkdir(parents=True)
        for instruction in dockerfile.lineage(stage):
            _perform_one(instruction, room, rooms, files, {**dockerfile.arguments, **arguments}, stage)
    return rooms[dockerfile.stages[-1].name]


def try_image(image: Room) -> None:
    """Run the image's command: a job that must fail cleanly, and one that must speak.

    Raises:
        StepError.
    """
    job = json.dumps({"id": "try", "input": {"text": "Hello from the image.", "output_format": "flac"}})
    command = [*image.command, "--test_input", job]
    result = _result(_timed("speak as draft", lambda: image.run(command, MODEL="draft", HF_HUB_OFFLINE="1")))
    if result.get("error_code") != "model_unavailable":
        raise StepError(f"MODEL=draft: expected model_unavailable, got {result}")
    weights = str(image.place("/weights"))
    _succeeded("write weights", _timed("write tiny weights", lambda: image.run(["python", "-c", _TINY, weights])))
    done = _timed("speak as turbo", lambda: image.run(command, MODEL="turbo", MODEL_DIR=weights, HF_HUB_OFFLINE="1"))
    result = _result(_succeeded("speak as turbo", done))
    if not image.place(result["audio"]).is_file() or not result["watermarked"]:
        raise StepError(f"MODEL=turbo: expected watermarked audio, got {result}")


def _perform_one(
    instruction: Instruction,
    room: Room,
    rooms: Mapping[str, Room],
    files: list[str],
    arguments: Mapping[str, str],
    stage: Stage,
) -> None:
    text = instruction.text
    if instruction.name == "ARG":
        name, default = parse_argument(instruction)
        room.variables.setdefault(name, arguments.get(name, default))
    elif instruction.name == "ENV":
        room.variables |= {
            name: _placed(room, value) for name, value in parse_pairs(instruction, room.variables).items()
        }
    elif instruction.name == "WORKDIR":
        room.workdir /= expand(text, room.variables)
        room.place(".").mkdir(parents=True, exist_ok=True)
    elif instruction.name == "COPY":
        _copy(instruction, room, rooms, files)
    elif instruction.name == "CMD":
        room.command = tuple(json.loads(text))
    elif instruction.name == "RUN" and text.split()[0] not in NEEDS_ROOT:
        label = f"{stage.name or 'image'}: {text}"
        _succeeded(f"line {instruction.line}", _timed(label, lambda: _run_shell(instruction, room)))
    else:
        _tell(f"{stage.name or 'image'}: left out: {instruction.name} {text}")


def _run_shell(instruction: Instruction, room: Room) -> subprocess.CompletedProcess[str]:
    paths = [word for word in shlex.split(instruction.text) if re.match(r"/\w", word)]
    if paths:
        raise StepError(
            f"line {instruction.line}: {', '.join(paths)}: name it through a variable, so that it can be moved"
        )
    if re.search(r"\b(pip|python)\b", instruction.text) and not room.python_home.exists():
        venv.create(room.python_home, with_pip=True, symlinks=True)
    return room.run(["/bin/sh", "-ec", instruction.text])


def _copy(instruction: Instruction, room: Room, rooms: Mapping[str, Room], files: list[str]) -> None:
    *sources, target = expand(instruction.text, room.variables).split()
    origin = instruction.flag("from")
    for source in sources:
        if origin is not None:
            _copy_between(rooms[origin].place(source), room.place(target), target)
        else:
            _copy_from_context(source, files, room.place(target), instruction)


def _copy_between(source: Path, target: Path, name: str) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target / source.name if name.endswith("/") else target)


def _copy_from_context(source: str, files: list[str], target: Path, instruction: Instruction) -> None:
    """A file goes into the target, of a folder what is in it does."""
    inside = [
        (path, PurePosixPath(path).relative_to(source)) for path in files if path.startswith(source.rstrip("/") + "/")
    ]
    alone = [(source, PurePosixPath(PurePosixPath(source).name))] if source in files else []
    if not (inside or alone):
        raise StepError(f"line {instruction.line}: {source} is not there, or .dockerignore keeps it out")
    for path, name in (*inside, *alone):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, place)


def _placed(room: Room, value: str) -> str:
    """A variable's value; a path of the image is one below the stage's folder, which is made."""
    if not value.startswith("/"):
        return value
    room.place(value).mkdir(parents=True, exist_ok=True)
    return str(room.place(value))


def _timed(label: str, run: Any) -> subprocess.CompletedProcess[str]:
    start_s = time.perf_counter()
    done: subprocess.CompletedProcess[str] = run()
    _tell(f"{time.perf_counter() - start_s:6.1f} s  {label}")
    return done


def _succeeded(label: str, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        output = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise StepError(f"{label}: exit status {done.returncode}\n{output}")
    return done


def _result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise StepError(f"the command gave no result:\n{done.stdout}{done.stderr}") from error
    return result


@contextmanager
def _folder(into: Path | None) -> Iterator[Path]:
    if into is not None:
        yield into.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="image-steps-") as name:
        yield Path(name)


def _tell(line: str) -> None:
    typer.echo(line if len(line) <= 160 else f"{line[:157]}...")


if __name__ == "__main__":
    app()
