"""Fetches a model's weights, and no more than that: `python scripts/download_models.py turbo`.

Into the Hugging Face cache, where a worker looks, or with --to into a folder for MODEL_DIR. Every file is compared
with what the hub says of its content; a download that was cut off is gone on with when the command is given again.
Beside the weights lies a manifest of the repository, the commit and the files' sizes and hashes, which --check
compares a folder with. A token for the hub is taken from HF_TOKEN or, in an image's build, from the secret hf_token.
What goes wrong is one line on standard error, and exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402

from engine.checkpoint import OPTIONAL_FILES, default_cache_dirs, find_checkpoint  # noqa: E402
from engine.errors import SpeechError  # noqa: E402
from engine.hub import Listing, RemoteFile, download, download_bar, download_to_cache, list_files  # noqa: E402
from engine.manifest import (  # noqa: E402
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    verify_manifest,
    write_manifest,
)
from engine.models import MODELS, ModelSpec, get_model  # noqa: E402

SECRET = Path("/run/secrets/hf_token")
"""Where a build mounts `--secret id=hf_token` (docs.docker.com, "Build secrets")."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help=f"{', '.join(MODELS)}.", show_default=False)
    ] = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch; empty for the default branch.")] = "",
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Put the files there, not into the cache.")
    ] = None,
    list_models: Annotated[bool, typer.Option("--list", help="List the models and the files they need.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="FOLDER", help="Compare a folder, or the snapshots of a cache, with manifests."
        ),
    ] = None,
) -> None:
    """Do what the options say."""
    if sum((bool(models), list_models, check is not None)) != 1:
        raise typer.BadParameter("give the names of models, or --list, or --check FOLDER")
    try:
        if list_models:
            print_models()
        elif check is not None:
            check_folders(check)
        else:
            specs = [get_model(name) for name in dict.fromkeys(models or ())]
            _refuse_mixtures(specs, revision, to)
            for spec in specs:
                fetch_model(spec, revision or None, to, read_token(os.environ), dry_run=dry_run)
    except (SpeechError, OSError) as error:
        message = f"{error.code}: {error.message}" if isinstance(error, SpeechError) else str(error)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from error


def fetch_model(spec: ModelSpec, revision: str | None, to: Path | None, token: str | None, *, dry_run: bool) -> None:
    """Fetch one model's files and write down what they are.

    Raises:
        SpeechError: weights_missing, for a repository without them, or a folder that holds another's.
        ConnectionError: as `engine.hub`.
        OSError: as the file system says.
    """
    listing = _needed_files(spec, revision, token)
    if to is not None:
        _refuse_another(to, listing)
    cache = default_cache_dirs(os.environ)[0]
    if dry_run:
        _print_plan(spec, listing, to or _snapshot(cache, listing))
        return
    with download_bar(spec.name) as progress:
        if to is None:
            folder = download_to_cache(listing, revision, cache, progress, token)
        else:
            folder = to
            download(listing, lambda file: to / file.name, progress, token)
    record(folder, listing)
    found = find_checkpoint(  # as a worker will
        spec,
        model_dir=to,
        revision=revision if to is None else None,
        allow_download=False,
        cache_dirs=(cache,),
    )
    size = f"{len(listing.files)} files, {listing.num_bytes / 1e9:.2f} GB"
    typer.echo(f"{spec.name}: {size} of {listing.repository} at {listing.commit} in {found.folder}")


def record(folder: Path, listing: Listing) -> Manifest:
    """Write the folder's manifest, or add files to it."""
    files = {file.name: FileRecord(file.size, file.sha256 or sha256_of(folder / file.name)) for file in listing.files}
    former = read_manifest(folder) or Manifest(listing.repository, listing.commit, {})
    manifest = former.with_files(files)
    write_manifest(folder, manifest)
    return manifest


def check_folders(folder: Path) -> None:
    """Compare with every manifest in a folder or, where it is a cache, in its snapshots.

    Raises:
        SpeechError: weights_missing, for the first folder that differs, or when there is no manifest.
    """
    folders = [path.parent for pattern in ("", "models--*/snapshots/*/") for path in folder.glob(pattern + MANIFEST)]
    if not folders:
        raise SpeechError("weights_missing", f"{folder}: no {MANIFEST} there", "check")
    for each in sorted(folders):
        manifest = verify_manifest(each, hashes=True)
        assert manifest is not None, f"{each}: the manifest is gone"
        typer.echo(f"{each}: {len(manifest.files)} files as in {manifest.repository} at {manifest.revision}")


def print_models() -> None:
    """One line per model: its name, its repository, the files without which it does not speak."""
    for spec in MODELS.values():
        typer.echo(f"{spec.name:16} {spec.repo_id:28} {' '.join(spec.required_files)}")


def read_token(env: Mapping[str, str], secret: Path = SECRET) -> str | None:
    """The hub's token, if one was given."""
    if token := env.get("HF_TOKEN", "").strip():
        return token
    return (secret.read_text(encoding="utf-8").strip() or None) if secret.is_file() else None


def _needed_files(spec: ModelSpec, revision: str | None, token: str | None) -> Listing:
    listing = list_files(spec.repo_id, revision, (*spec.required_files, *OPTIONAL_FILES), token)
    missing = set(spec.required_files) - {file.name for file in listing.files}
    if missing:
        names = ", ".join(sorted(missing))
        raise SpeechError("weights_missing", f"{spec.name}: {spec.repo_id} at {listing.commit} lacks {names}", "model")
    return listing


def _refuse_mixtures(specs: Sequence[ModelSpec], revision: str, to: Path | None) -> None:
    repositories = sorted({spec.repo_id for spec in specs})
    if len(repositories) > 1 and (revision or to is not None):
        option = "--revision" if revision else "--to"
        raise typer.BadParameter(f"{option} is for models of one repository, got {', '.join(repositories)}")


def _refuse_another(folder: Path, listing: Listing) -> None:
    """Files of two commits in one folder would be no model anybody knows."""
    manifest = read_manifest(folder)
    if manifest is not None and (manifest.repository, manifest.revision) != (listing.repository, listing.commit):
        held = f"{manifest.repository} at {manifest.revision}"
        raise SpeechError("weights_missing", f"{folder} holds {held}; name another folder", "to")


def _print_plan(spec: ModelSpec, listing: Listing, folder: Path) -> None:
    missing = [file for file in listing.files if not _is_there(folder, file)]
    num_bytes = sum(file.size for file in missing)
    typer.echo(f"{spec.name}: {listing.repository} at {listing.commit}, {num_bytes / 1e9:.2f} GB to fetch to {folder}")
    for file in listing.files:
        state = "to fetch" if file in missing else "there"
        typer.echo(f"  {file.size:>13,}  {state:8}  {file.name}")


def _is_there(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _snapshot(cache: Path, listing: Listing) -> Path:
    return cache / f"models--{listing.repository.replace('/', '--')}" / "snapshots" / listing.commit


if __name__ == "__main__":
    app()
