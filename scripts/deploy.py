"""Deploys by file: `python scripts/deploy.py apply endpoint.toml --dry-run`.

A TOML file (`init` writes one) says what a RunPod serverless endpoint should be; `apply` creates it or changes what
differs, and does nothing when nothing differs. The key is RUNPOD_API_KEY, from the environment only. Secrets are
${NAME} of your environment or {{ RUNPOD_SECRET_name }} of RunPod's, and are never shown. What goes wrong is one line
on standard error, and exit code 1. How it is built: `scripts/deploying/__init__.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402
from rich.text import Text  # noqa: E402

from scripts.console import complain, print_json, say, table  # noqa: E402
from scripts.deploying.api import API_URL, Api, Json  # noqa: E402
from scripts.deploying.applying import Deployments, Plan  # noqa: E402
from scripts.deploying.endpoint import Change, deployed_fields  # noqa: E402
from scripts.deploying.files import DeployError, EndpointFile, read_file, warnings  # noqa: E402
from scripts.deploying.hiding import HIDDEN, Secrets, may_be_shown  # noqa: E402

EXAMPLE = ROOT / "examples" / "endpoint.toml"
KEY_VARIABLE = "RUNPOD_API_KEY"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

FilePath = Annotated[Path, typer.Argument(metavar="FILE", help="Of the endpoint.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EndpointId = Annotated[str | None, typer.Option("--id", help="Which endpoint, where several have the file's name.")]


@dataclass(frozen=True)
class Asked:
    """What was said before the command, and the secrets that were met."""

    api_url: str
    retry_wait_s: float
    secrets: Secrets

    def read(self, path: Path) -> EndpointFile:
        return read_file(path, os.environ, self.secrets)

    @contextlib.contextmanager
    def connect(self, endpoint_id: str | None) -> Iterator[Deployments]:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            raise DeployError(f"{KEY_VARIABLE} is not set; make a key in RunPod's console under Settings, API keys")
        self.secrets.add(key)
        with Api(self.api_url, key, self.retry_wait_s) as api:
            yield Deployments(api, self.secrets, endpoint_id)

    @contextlib.contextmanager
    def tells_errors(self) -> Iterator[None]:
        """What cannot be done is one line without secrets, and exit code 1; so is what cannot be printed."""
        try:
            if sys.stdout is None:
                raise DeployError("standard output is closed")
            yield
            sys.stdout.flush()
        except DeployError as error:
            self._complain(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            # what is still to be printed goes nowhere, or Python would fail over it again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._complain(str(error))
            raise typer.Exit(1) from None

    def _complain(self, why: str) -> None:
        complain(" ".join(self.secrets.hide(f"error: {why}").split()))


@app.callback()
def main(
    context: typer.Context,
    api_url: Annotated[str, typer.Option(metavar="URL", help="Of RunPod's REST API v2.")] = API_URL,
    retry_wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Before a second try; doubles for each further one.")
    ] = 1.0,
) -> None:
    """Keep RunPod serverless endpoints as files say."""
    context.obj = Asked(api_url, retry_wait, Secrets())


@app.command()
def init(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to.")] = Path("endpoint.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write an example file, to be edited."""
    with context.obj.tells_errors():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w" if force else "x", encoding="utf-8") as opened:
                opened.write(EXAMPLE.read_text(encoding="utf-8"))
        except FileExistsError:
            raise DeployError(f"{file} is there already; --force replaces it") from None
        except OSError as error:
            raise DeployError(f"{file}: {error.strerror}") from error
        say(f"wrote {file}: set name and image, then python scripts/deploy.py apply {file} --dry-run")


@app.command()
def apply(
    context: typer.Context,
    file: FilePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    yes: Yes = False,
    endpoint_id: EndpointId = None,
    as_json: AsJson = False,
) -> None:
    """Create the endpoint, or change what differs from the file."""
    asked: Asked = context.obj
    with asked.tells_errors():
        wanted = asked.read(file)
        with asked.connect(endpoint_id) as deployments:
            plan = deployments.plan(wanted)
            for warning in warnings(wanted, plan.execution_timeout_s):
                complain(f"warning: {asked.secrets.hide(warning)}")
            if not as_json:
                show_plan(plan, asked.secrets)
            endpoint = plan.deployed
            has_work = plan.deployed is None or bool(plan.changes)
            if has_work and not dry_run:
                _ask(f"{'Create' if plan.deployed is None else 'Change'} {wanted.name}?", yes)
                endpoint = deployments.apply(plan)
        if as_json:
            print_json(plan_json(plan, endpoint, asked.secrets, was_applied=has_work and not dry_run))
        elif has_work and not dry_run and endpoint is not None:
            done = "created" if plan.deployed is None else "changed"
            say(f"{done} {wanted.name} ({endpoint['id']}){_where_to_run(endpoint)}")


@app.command()
def show(context: typer.Context, file: FilePath, endpoint_id: EndpointId = None, as_json: AsJson = False) -> None:
    """Show what is deployed under the file's name."""
    asked: Asked = context.obj
    with asked.tells_errors():
        name = asked.read(file).name
        with asked.connect(endpoint_id) as deployments:
            endpoint = deployments.must_find(name)
        fields = shown_fields(deployed_fields(endpoint), asked.secrets)
        if as_json:
            print_json({"id": endpoint["id"], "name": name, "fields": fields})
            return
        rows = [
            ("id", endpoint["id"]),
            *((field, in_words(value)) for field, value in fields.items() if value not in ((), [], None)),
        ]
        table(name, ("", "deployed"), rows)


@app.command()
def delete(context: typer.Context, file: FilePath, yes: Yes = False, endpoint_id: EndpointId = None) -> None:
    """Delete the endpoint of the file's name: its workers, its queue and its history."""
    asked: Asked = context.obj
    with asked.tells_errors():
        name = asked.read(file).name
        with asked.connect(endpoint_id) as deployments:
            endpoint = deployments.must_find(name)
            _ask(f"Delete {name} ({endpoint['id']}), with all its jobs?", yes)
            deployments.delete(endpoint)
        say(f"deleted {name} ({endpoint['id']})")


def _ask(question: str, yes: bool) -> None:
    """Go on after a yes only; where nobody can be asked, it has to be said beforehand."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise DeployError(f"{question} Nobody is there to ask: say --yes")
    if not typer.confirm(question):
        raise typer.Exit(1)


def _where_to_run(endpoint: Json) -> str:
    run = (endpoint.get("requestUrls") or {}).get("run")
    return f": {run}" if run else ""


# ------------------------------------------------------------------------------------- what is shown


def show_plan(plan: Plan, secrets: Secrets) -> None:
    """The changes in colour: what is new in green, what goes in red."""
    name = plan.file.name
    if plan.deployed is None:
        rows = [(change.field, Text(_shown(change, change.wanted, secrets), "green")) for change in plan.changes]
        table(f"{name}: not deployed, to be created", ("", "file"), [row for row in rows if row[1].plain])
    elif not plan.changes:
        say(f"{name} ({plan.deployed['id']}): as in the file, nothing to do")
    else:
        title = f"{name} ({plan.deployed['id']}): {len(plan.changes)} to be changed"
        table(title, ("", "deployed", "file"), [_change_row(change, secrets) for change in plan.changes])


def _change_row(change: Change, secrets: Secrets) -> Sequence[str | Text]:
    before, after = (_shown(change, value, secrets) for value in (change.deployed, change.wanted))
    return change.field, Text(before or "–", "red"), Text(after or "–", "green")


def _shown(change: Change, value: Any, secrets: Secrets) -> str:
    return in_words(shown_fields({change.field: value}, secrets)[change.field])


def shown_fields(fields: dict[str, Any], secrets: Secrets) -> dict[str, Any]:
    """Fields without secrets, which only variables can hold."""

    def shown(field: str, value: Any) -> Any:
        if not field.startswith("env.") or value is None:
            return value
        return secrets.hide(value) if may_be_shown(field.removeprefix("env."), value) else HIDDEN

    return {field: shown(field, value) for field, value in fields.items()}


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def plan_json(plan: Plan, endpoint: Json | None, secrets: Secrets, *, was_applied: bool) -> dict[str, Any]:
    changes = [
        {
            "field": change.field,
            "deployed": shown_fields({change.field: change.deployed}, secrets)[change.field],
            "wanted": shown_fields({change.field: change.wanted}, secrets)[change.field],
        }
        for change in plan.changes
    ]
    action = "create" if plan.deployed is None else "update" if plan.changes else "nothing"
    return {
        "name": plan.file.name,
        "id": None if endpoint is None else endpoint["id"],
        "action": action,
        "applied": was_applied,
        "changes": changes,
    }


if __name__ == "__main__":
    app()
