"""Which files a build may see: the folder, less what .dockerignore keeps out.

The rules are those of docs.docker.com, "Build context", ".dockerignore files": patterns as in a shell, `**` for any
number of folders, a match of a folder counts for all in it, `!` lets in again, and the last pattern that matches wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Pattern:
    """One line of .dockerignore.

    Args:
        text: without `!` and outer slashes.
        lets_in: whether it began with `!`.
    """

    text: str
    lets_in: bool

    def matches(self, path: PurePosixPath) -> bool:
        """Whether it names the path or a folder that it is in."""
        expression = re.compile(_expression(self.text))
        return any(expression.fullmatch(str(each)) for each in (path, *path.parents) if str(each) != ".")

    def may_match_in(self, folder: PurePosixPath) -> bool:
        """Whether it could name something in a folder."""
        return self.text.startswith((f"{folder}/", "*")) or self.matches(folder)


def read_patterns(text: str) -> tuple[Pattern, ...]:
    """The patterns of a .dockerignore, in order."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return tuple(Pattern(line.removeprefix("!").strip("/"), line.startswith("!")) for line in lines)


def context_files(root: Path, patterns: tuple[Pattern, ...]) -> Iterator[PurePosixPath]:
    """The files that a build in `root` may copy, relative to it; folders that are kept out are not entered."""
    for folder, names, files in os.walk(root):
        inside = PurePosixPath(Path(folder).relative_to(root))
        names[:] = sorted(name for name in names if _is_entered(inside / name, patterns))
        yield from (inside / name for name in sorted(files) if is_let_in(inside / name, patterns))


def is_let_in(path: PurePosixPath, patterns: tuple[Pattern, ...]) -> bool:
    """Whether the build sees a path."""
    matching = [pattern for pattern in patterns if pattern.matches(path)]
    return matching[-1].lets_in if matching else True


def _is_entered(folder: PurePosixPath, patterns: tuple[Pattern, ...]) -> bool:
    return is_let_in(folder, patterns) or any(each.lets_in and each.may_match_in(folder) for each in patterns)


def _expression(pattern: str) -> str:
    parts = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return "".join(parts.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
