"""Reads a Dockerfile: its stages, their instructions, and the variables in them.

As much of the format as this project's Dockerfile uses (docs.docker.com, "Dockerfile reference"); what is not
understood is an error and never passed over.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

INSTRUCTIONS = frozenset({"ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "LABEL", "STOPSIGNAL", "CMD"})

_FLAG = re.compile(r"--([a-z]+)=(\S+)\s+")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")


class DockerfileError(ValueError):
    """The file says what this reader does not know, or what cannot be; the message names the line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        name: in capitals.
        flags: name and value, in order; a name may come twice.
        text: what follows, continued lines joined by a blank, variables as they stand.
        line: where it begins, from 1.
    """

    name: str
    flags: tuple[tuple[str, str], ...]
    text: str
    line: int

    def flag(self, name: str) -> str | None:
        return next((value for key, value in self.flags if key == name), None)


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next.

    Args:
        name: after AS; the last stage has none and is "".
        base: an earlier stage's name, or an image.
    """

    name: str
    base: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A whole file.

    Args:
        arguments: the ARGs before the first FROM, with their defaults.
        stages: in order; the last one is the image.
    """

    arguments: Mapping[str, str]
    stages: tuple[Stage, ...]

    def lineage(self, stage: Stage) -> tuple[Instruction, ...]:
        """A stage's instructions behind those of the stages it is built on."""
        base = next((other for other in self.stages if other.name == stage.base), None)
        return (*self.lineage(base), *stage.instructions) if base else stage.instructions

    @property
    def ends(self) -> tuple[Stage, ...]:
        """The stages that no other is built on."""
        return tuple(stage for stage in self.stages if stage.name not in {other.base for other in self.stages})

    @property
    def sources(self) -> frozenset[str]:
        """What is copied from the build's context; folders end with a slash."""
        copies = [each for stage in self.stages for each in stage.instructions if each.name == "COPY"]
        return frozenset(source for copy in copies if copy.flag("from") is None for source in copy.text.split()[:-1])


def parse(text: str) -> Dockerfile:
    """Read a Dockerfile.

    Raises:
        DockerfileError.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, *rest = instruction.text.split()
            if rest and (len(rest) != 2 or rest[0].upper() != "AS"):
                raise DockerfileError(f"line {instruction.line}: expected FROM image [AS name]")
            stages.append(Stage(rest[1] if rest else "", base, ()))
        elif not stages:
            arguments |= [parse_argument(instruction)]
        elif instruction.name in INSTRUCTIONS:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.instructions, instruction)))
        else:
            raise DockerfileError(f"line {instruction.line}: {instruction.name} is not known here")
    return Dockerfile(arguments, tuple(stages))


def parse_argument(instruction: Instruction) -> tuple[str, str]:
    """An ARG's name and default, which is "" where it has none."""
    if instruction.name != "ARG":
        raise DockerfileError(f"line {instruction.line}: only ARG may stand before the first FROM")
    name, _, default = instruction.text.partition("=")
    return name, default


def parse_pairs(instruction: Instruction, variables: Mapping[str, str]) -> dict[str, str]:
    """An ENV's names and values; all are made from the variables as they were before it."""
    pairs = [word.partition("=") for word in shlex.split(instruction.text)]
    if not all(name and equals for name, equals, _ in pairs):
        raise DockerfileError(f"line {instruction.line}: expected NAME=value ...")
    return {name: expand(value, variables) for name, _, value in pairs}


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put in $NAME, ${NAME}, ${NAME:-otherwise} and ${NAME:+instead}."""

    def value(match: re.Match[str]) -> str:
        plain, name, sign, word = match.groups()
        found = variables.get(plain or name, "")
        if sign is None:
            return found
        return (found or word) if sign == "-" else (word if found else "")

    return _VARIABLE.sub(value, text)


def _instructions(text: str) -> Iterator[Instruction]:
    for line, joined in _joined_lines(text.splitlines()):
        name, _, rest = joined.partition(" ")
        flags = []
        rest = rest.strip()
        while found := _FLAG.match(rest):
            flags.append((found[1], found[2]))
            rest = rest[found.end() :]
        yield Instruction(name.upper(), tuple(flags), rest, line)


def _joined_lines(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(number of the first line, text), without comments and blank lines, continued lines made one."""
    parts: list[str] = []
    start = 0
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        start = start if parts else number
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            yield start, " ".join(parts)
            parts = []
    if parts:
        raise DockerfileError(f"line {start}: the file ends in the middle of an instruction")
