"""Looks after a voice library: `python scripts/voices.py --library voices add anna.wav --name Anna`.

The library is a folder or s3://bucket/prefix, from --library, VOICES_URI or VOICES_DIR; a bucket is reached as a
worker reaches it (BUCKET_ENDPOINT_URL and its keys, or what boto3 finds). Tables and progress are for people,
--json is for programs. What goes wrong is one line on standard error, and exit code 1.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402

from engine.errors import SpeechError  # noqa: E402
from scripts.voice_tools import showing  # noqa: E402
from scripts.voice_tools.adding import add_recording, recordings  # noqa: E402
from scripts.voice_tools.copying import (  # noqa: E402
    Step,
    carry_out,
    copy_conditionals,
    each_safely,
    export_voice,
    plan_sync,
    same_voices,
)
from scripts.voice_tools.opening import open_library, s3_options  # noqa: E402
from voice_library import LibraryError, Voice, VoiceLibrary  # noqa: E402
from voice_library.legacy import Imported, import_legacy  # noqa: E402
from voice_library.location import open_store  # noqa: E402
from voice_library.quality import MIN_REFERENCE_S  # noqa: E402

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


P = ParamSpec("P")
R = TypeVar("R")


class FileFormat(StrEnum):
    """Of exported audio."""

    FLAC = "flac"
    WAV = "wav"


@dataclass(frozen=True)
class Asked:
    """What was said before the command.

    Args:
        library: a location, or None for the environment's.
    """

    library: str | None

    def open(self) -> VoiceLibrary:
        return open_library(self.library)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
VoiceName = Annotated[str, typer.Argument(metavar="VOICE", help="Its id or name.", show_default=False)]


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """What a command cannot do is a line with its code, and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> R:
        try:
            return command(*args, **options)
        except (LibraryError, SpeechError) as error:
            fail(error)
            raise typer.Exit(1) from error

    return run


def fail(error: LibraryError | SpeechError, about: str = "") -> None:
    """Tell of an error in one line."""
    suggestions = getattr(error, "suggestions", ())
    near = f" (near: {', '.join(suggestions)})" if suggestions and "mean" not in error.message else ""
    showing.complain(" ".join(f"error: {about}{error.code}: {error.message}{near}".split()))


@app.callback()
def main(
    context: typer.Context,
    library: Annotated[
        str | None,
        typer.Option("--library", "-l", metavar="WHERE", help="Folder or s3://bucket/prefix [VOICES_URI, VOICES_DIR]."),
    ] = None,
) -> None:
    """Look after a voice library."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")  # of damage that the library meets
    context.obj = Asked(library)


@app.command("import-legacy")
@reports_errors
def import_legacy_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="With voice_catalog.json, embeddings/ and metadata/.")],
    trim: Annotated[bool, typer.Option(help="Keep the best 10 to 15 s of each recording, not all of it.")] = False,
) -> None:
    """Bring over a library of gzipped pickles, which are read as data: nothing in them runs."""
    with context.obj.open() as library, showing.progress("importing") as step:

        def on_voice(_: Imported) -> None:
            step()

        report = import_legacy(
            folder, library, trim=trim, on_found=lambda count: step(0, total=count), on_voice=on_voice
        )
    showing.print_import(report)
    if report.count("refused") or report.problems:
        raise typer.Exit(1)


@app.command()
@reports_errors
def add(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of the voice; else the file's name.")] = None,
    voice_id: Annotated[str | None, typer.Option("--id", help="Of the voice; else made of its name.")] = None,
    language: Annotated[str | None, typer.Option(help="Such as de or pt-BR.")] = None,
    gender: Annotated[str | None, typer.Option(help="In your words.")] = None,
    description: Annotated[str, typer.Option(help="Free text.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; may be given several times.")] = None,
    consent: Annotated[str, typer.Option(help="How the speaker agreed.")] = "",
    source: Annotated[str | None, typer.Option(help="Where the recording is from; else the file's name.")] = None,
    min_s: Annotated[
        float, typer.Option("--min-seconds", min=1.0, help="The recording must be longer; Turbo needs 5.")
    ] = MIN_REFERENCE_S,
) -> None:
    """Add recordings as voices: judged, trimmed, and the best 10 to 15 s of them kept."""
    found = recordings(files)
    if len(found) > 1 and (name or voice_id):
        raise LibraryError("invalid_request", f"--name and --id are for one recording, got {len(found)}", "name")
    about: dict[str, Any] = {"language": language, "gender": gender, "description": description, "tags": tag or ()}
    about |= {"consent": consent, "voice_id": voice_id} | ({"source": source} if source is not None else {})
    num_failed = 0
    with context.obj.open() as library, showing.progress("adding", len(found)) as step:
        for path in found:
            try:
                added = add_recording(library, path, name=name, min_s=min_s, about=about)
                _tell_added(added.voice, added.warnings)
            except (LibraryError, SpeechError) as error:
                fail(error, f"{path.name}: ")
                num_failed += 1
            step()
    if num_failed:
        raise typer.Exit(1)


def _tell_added(voice: Voice, warnings: tuple[str, ...]) -> None:
    part = voice.quality["part"]
    kept = f"{voice.duration_s:.1f} s, from {part['start_s']:.1f} to {part['end_s']:.1f} of {part['of_s']:.1f}"
    snr = voice.quality.get("snr_db")
    noise = "" if snr is None else f", {snr:.0f} dB above its noise"
    showing.say(f"added {voice.name} as {voice.voice_id}: {kept}{noise}")
    for warning in warnings:
        showing.complain(f"warning: {voice.name}: {warning}")


@app.command("list")
@reports_errors
def list_command(
    context: typer.Context,
    language: Annotated[str | None, typer.Option(help="Only this language.")] = None,
    gender: Annotated[str | None, typer.Option(help="Only this gender.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    text: Annotated[str | None, typer.Option(help="Only with this in id, name, description or tags.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="Leave out the first.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many.")] = None,
    as_json: AsJson = False,
) -> None:
    """List voices."""
    with context.obj.open() as library:
        page = library.list(language=language, gender=gender, tag=tag, text=text, offset=offset, limit=limit)
    if as_json:
        showing.print_json({"total": page.total, "voices": [voice.to_dict() for voice in page.voices]})
    else:
        showing.print_voices(page.voices, page.total)


@app.command()
@reports_errors
def show(context: typer.Context, voice: VoiceName, as_json: AsJson = False) -> None:
    """Show all that is known of a voice."""
    with context.obj.open() as library:
        found = library.find(voice)
    if as_json:
        showing.print_json(found.to_dict())
    else:
        showing.print_voice(found)


@app.command()
@reports_errors
def play(context: typer.Context, voice: VoiceName) -> None:
    """Play a voice's recording."""
    with context.obj.open() as library:
        found = library.find(voice)
        audio, rate = library.get_audio(found.voice_id)
    try:
        import sounddevice  # type: ignore[import-not-found, unused-ignore]  # an extra of a person's own machine
    except (ImportError, OSError) as error:  # OSError: its PortAudio is missing
        instead = f"`export {found.voice_id} --to FOLDER` writes a file instead"
        showing.complain(f"error: playing needs `pip install sounddevice`; {instead}")
        raise typer.Exit(1) from error
    showing.say(f"{found.name}, {found.duration_s:.1f} s")
    sounddevice.play(audio, rate, blocking=True)


@app.command()
@reports_errors
def rename(
    context: typer.Context, voice: VoiceName, name: Annotated[str, typer.Argument(help="The new name.")]
) -> None:
    """Give a voice another name; its id stays."""
    with context.obj.open() as library:
        renamed = library.update(library.find(voice).voice_id, name=name)
    showing.say(f"{renamed.voice_id} is now called {renamed.name}")


@app.command()
@reports_errors
def delete(
    context: typer.Context,
    voices: Annotated[list[str], typer.Argument(metavar="VOICE...", help="Ids or names.", show_default=False)],
    yes: Yes = False,
) -> None:
    """Delete voices, with all that belongs to them."""
    with context.obj.open() as library:
        ids = [_deletable(library, voice) for voice in voices]
        _ask(f"Delete {', '.join(ids)}?", yes)
        for voice_id in ids:
            library.delete(voice_id)
            showing.say(f"deleted {voice_id}")


def _deletable(library: VoiceLibrary, voice: str) -> str:
    """The id; also that of a damaged voice, which no search finds."""
    try:
        return library.find(voice).voice_id
    except LibraryError:
        if voice not in {problem.voice_id for problem in library.stats().problems}:
            raise
        return voice


def _ask(question: str, yes: bool) -> None:
    """Go on after a yes only; where nobody can be asked, it has to be said beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise LibraryError("invalid_request", f"{question} Nobody is there to ask: say --yes", "yes")
    if not typer.confirm(question):
        raise typer.Exit(1)


@app.command()
@reports_errors
def export(
    context: typer.Context,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where the files go.")],
    voices: Annotated[
        list[str] | None, typer.Argument(metavar="[VOICE]...", help="Ids or names; all if none is given.")
    ] = None,
    file_format: Annotated[FileFormat, typer.Option("--format", help="Of the audio, 24 bit.")] = FileFormat.FLAC,
) -> None:
    """Write voices as audio files, each with its metadata as JSON."""
    num_failed = 0
    with context.obj.open() as library:
        chosen = [library.find(voice) for voice in voices] if voices else library.list().voices
        with showing.progress("exporting", len(chosen)) as step:
            for voice in chosen:
                try:
                    export_voice(library, voice, to, file_format.value)
                except LibraryError as error:
                    fail(error, f"{voice.voice_id}: ")
                    num_failed += 1
                step()
    showing.say(f"{len(chosen) - num_failed} voices written to {to}")
    if num_failed:
        raise typer.Exit(1)


@app.command()
@reports_errors
def sync(
    source: Annotated[str, typer.Argument(help="Library to copy from: a folder or s3://bucket/prefix.")],
    target: Annotated[str, typer.Argument(help="Library to copy to.")],
    delete: Annotated[bool, typer.Option("--delete", help="Also delete what the source does not have.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Yes = False,
) -> None:
    """Make one library like another. Voices that are the same in both are neither read nor written."""
    with open_library(source) as giver, open_library(target) as taker:
        if delete:
            _refuse_blind_deletion(giver, source)
        steps = plan_sync(giver, taker, delete=delete)
        for step in steps if dry_run else ():
            showing.say(f"would {step.action} {step.voice.voice_id} ({step.voice.name})")
        num_deleted = sum(step.action == "delete" for step in steps)
        if num_deleted and not dry_run:
            _ask(f"Delete {num_deleted} voices from {target}?", yes)
        num_failed = 0 if dry_run else _carry_out_all(steps, giver, taker)
        stores = [open_store(each, s3_options())[0] for each in (source, target)]
        num_copied = copy_conditionals(same_voices(giver, taker), *stores, dry_run=dry_run)
    if not dry_run:
        same = f"{len(steps) - num_failed} voices changed, {num_copied} conditionals copied"
        showing.say(f"{same}, {num_failed} failed" if num_failed else same)
    if num_failed:
        raise typer.Exit(1)


def _refuse_blind_deletion(source: VoiceLibrary, where: str) -> None:
    """A source that is empty or damaged says nothing about what should not be in the target."""
    num_problems = len(source.stats().problems)
    if num_problems or not source.list().total:
        why = f"holds {num_problems} damaged voices" if num_problems else "is empty"
        raise LibraryError("invalid_request", f"--delete: the source {where} {why}; nothing was done", "delete")


def _carry_out_all(steps: list[Step], source: VoiceLibrary, target: VoiceLibrary) -> int:
    """Returns how many failed."""
    with showing.progress("copying", len(steps)) as tick:

        def do(step: Step) -> None:
            carry_out(step, source, target)
            tick()

        def on_error(step: Step, error: LibraryError) -> None:
            fail(error, f"{step.action} {step.voice.voice_id}: ")
            tick()

        return len(steps) - each_safely(steps, do, on_error)


@app.command()
@reports_errors
def check(context: typer.Context, as_json: AsJson = False) -> None:
    """Read and verify everything; exit code 1 when anything is damaged."""
    with context.obj.open() as library:
        problems = list(library.check())
        total = library.list().total
    if as_json:
        content = [{"voice_id": each.voice_id, "what": each.what} for each in problems]
        showing.print_json({"voices": total, "problems": content})
    elif problems:
        showing.print_problems(problems)
    else:
        showing.say(f"{total} voices, all sound")
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
