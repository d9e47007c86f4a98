"""The house keeps its shape: imports run one way, light rooms stay light, every room says why it exists.

Read from the source with ast, function-level imports included, so that a lazy import cannot hide a
dependency that runs the wrong way.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "handler": {"jobs"},
    "jobs": {"engine", "voice_library"},
    "engine": set(),
    "voice_library": set(),
    "scripts": {"jobs", "engine", "voice_library"},
    "tests": {"handler", "scripts", "jobs", "engine", "voice_library"},
}
"""Which of the house's own packages a package may import, beside itself."""

ENGINE_ORDER = (
    *(
        "errors",
        "serialization",
        "types",
        "models",
        "stream",
        "work",
        "kernels",
        "machine",
        "device",
        "upstream",
        "noise",
        "weights",
        "keymap",
        "packed",
        "manifest",
        "hub",
        "checkpoint",
    ),
    *("text", "random_tokenizers", "random_checkpoint", "conditioning", "listening", "t3", "s3gen", "guard", "audio"),
    *(
        "espeak",
        "draft",
        "scheduler",
        "utterance",
        "watch",
        "keeping",
        "voices",
        "intake",
        "conversion",
        "outlet",
        "early",
    ),
    *("rendering", "core", "engine"),
)
"""The rooms of the engine from the ground up: each may import only itself and rooms before it."""

WITHOUT_TORCH = ("engine", "engine.errors", "engine.types", "engine.models", "engine.scheduler")
"""What can be imported, or planned with, in a process that never loads torch."""

TEXT_SUFFIXES = {".py", ".md", ".txt", ".toml", ".json", ".yaml", ".yml", ".sh", ""}


def source_files(root: Path) -> list[Path]:
    """All Python files of the house, tests included."""
    files = [path for name in MAY_IMPORT for path in (root / name).rglob("*.py")]
    return sorted([*files, *root.glob("*.py")])


def module_name(path: Path, root: Path) -> str:
    """`engine/t3/decoder.py` is engine.t3.decoder, `engine/t3/__init__.py` is engine.t3."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, wherever in it; `from a import b` gives a.b."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            literals = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from ((node.lineno, name) for name in literals if isinstance(name, str))


def why_not(importer: str, imported: str) -> str | None:
    """Why a module may not import another, or None if it may."""
    package, target = importer.split(".")[0], imported.split(".")[0]
    if target not in MAY_IMPORT:
        return None
    if package != target:
        return None if target in MAY_IMPORT.get(package, set()) else f"{package} may not import {target}"
    if package != "engine" or importer == "engine":
        return None
    return _why_not_inside_engine(importer.split(".")[1], imported.removeprefix("engine.").split(".")[0])


def _why_not_inside_engine(room: str, other: str) -> str | None:
    unplaced = [name for name in (room, other) if name not in ENGINE_ORDER]
    if unplaced:
        return f"{unplaced[0]} is not a room of the engine; give it its place in ENGINE_ORDER"
    if ENGINE_ORDER.index(other) > ENGINE_ORDER.index(room):
        return f"engine.{other} stands above engine.{room}"
    return None


def violations(root: Path) -> list[str]:
    """Imports that run the wrong way, each as file:line, what and why."""
    return [
        f"{path.relative_to(root)}:{line} imports {imported}: {reason}"
        for path in source_files(root)
        for line, imported in imports(path, root)
        if (reason := why_not(module_name(path, root), imported))
    ]


def loads_torch(module: str) -> bool:
    """Whether a fresh process that imports a module has loaded torch."""
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_every_room_of_the_engine_has_its_place_in_the_order() -> None:
    rooms = {path.relative_to(ROOT / "engine").parts[0].removesuffix(".py") for path in (ROOT / "engine").rglob("*.py")}
    assert rooms - {"__init__"} <= set(ENGINE_ORDER)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_a_light_room_does_not_load_torch(module: str) -> None:
    if not list(ROOT.glob(module.replace(".", "/") + "*")):
        pytest.skip(f"{module} is not built yet")
    assert not loads_torch(module)


def test_the_scheduler_never_imports_torch() -> None:
    path = ROOT / "engine" / "scheduler.py"
    assert not path.exists() or "torch" not in {name.split(".")[0] for _, name in imports(path, ROOT)}


def test_every_module_says_why_it_exists() -> None:
    silent = [str(p.relative_to(ROOT)) for p in source_files(ROOT) if not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_every_package_has_an_init_that_can_say_why_it_exists() -> None:
    packages = {path.parent for path in source_files(ROOT)} - {ROOT}
    bare = [p for p in packages if p.relative_to(ROOT).parts[0] != "tests" and not (p / "__init__.py").exists()]
    assert bare == []


def test_no_file_holds_a_path_of_one_persons_machine() -> None:
    personal = re.compile(rf"(?<![\w.])/(?:home|Users)/\w+/|{re.escape(str(ROOT))}/")
    hidden = {".git", ".venv", "out", "__pycache__", ".cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    files = [p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts) and p.suffix in TEXT_SUFFIXES]
    found = [str(p) for p in files if p.is_file() and personal.search(p.read_text(encoding="utf-8", errors="ignore"))]
    assert found == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine/guard.py", "import jobs.schema"),
        ("engine/guard.py", "def late() -> None:\n    from voice_library import store"),
        ("engine/errors.py", "from engine.types import Speech"),
        ("engine/t3/decoder.py", "from ..s3gen import flow"),
        ("engine/text/__init__.py", "from engine import engine"),
        ("engine/hub.py", "import importlib\nimportlib.import_module('engine.checkpoint')"),
        ("engine/attic.py", "from engine import types"),
        ("voice_library/store.py", "from engine.types import VoicePrompt"),
        ("jobs/tts.py", "import handler"),
        ("jobs/tts.py", "from scripts import speak"),
        ("scripts/speak.py", "import tests.conftest"),
        ("handler.py", "import engine"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_found(tmp_path: Path, file: str, source: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine/t3/decoder.py", "from engine.t3 import backbone\nfrom . import sampling\nfrom ..types import Speech"),
        ("engine/__init__.py", "from engine.engine import Engine"),
        ("jobs/tts.py", "from engine import SpeechRequest\nimport voice_library\nfrom jobs import schema"),
        ("scripts/speak.py", "import jobs, engine, voice_library, torch"),
    ],
)
def test_an_import_that_runs_the_right_way_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    assert violations(tmp_path) == []
