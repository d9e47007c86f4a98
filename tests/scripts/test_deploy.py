"""scripts/deploy.py as a person runs it, against a stand-in of RunPod's REST API over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.deploying.api import Api
from scripts.deploying.applying import ENDPOINTS, Deployments
from scripts.deploying.endpoint import create_body, deployed_fields, differences, wanted_fields
from scripts.deploying.files import DeployError, EndpointFile, read_file, warnings
from scripts.deploying.hiding import HIDDEN, Secrets, may_be_shown
from tests.scripts.runpod_api import DROP, KEY, LOSE, Platform, serve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "endpoint.toml"
BUCKET_SECRET, TOKEN = "wJalrXUtnFEMI+K7MDENG/bPx", "hf_abcdefghijklmnop"
PRIVATE_KEY = '-----BEGIN-----\nMIIEabcdef\tgh"ij\\kl\u00e9mn\U0001d11eop\nQRSTuvwxyz\n-----END-----'
"""As JSON writes none of it as it is."""
SECRETS = {"BUCKET_SECRET": BUCKET_SECRET, "HF_TOKEN": TOKEN, "PRIVATE_KEY": PRIVATE_KEY}
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

FILE = """
name = "tts"
image = "example.com/tts:1"
gpus = ["AMPERE_24", "ADA_24"]
min_cuda = "12.8"
container_disk_gb = 20
network_volume = "voices"
data_centers = ["EU-RO-1"]

[workers]
max = 5

[env]
MODEL = "turbo"
MAX_CONCURRENCY = 8
BUCKET_ACCESS_KEY_ID = "{{ RUNPOD_SECRET_bucket_id }}"
BUCKET_SECRET_ACCESS_KEY = "${BUCKET_SECRET}"

[other_env]
HF_TOKEN = "${HF_TOKEN}"
GCP_KEY = "${PRIVATE_KEY}"
"""


@pytest.fixture
def platform() -> Iterator[Platform]:
    with serve() as platform:
        platform.volumes.append({"id": "vol1", "name": "voices", "dataCenter": "EU-RO-1", "size": 50})
        yield platform


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, FILE)


def write(folder: Path, text: str) -> Path:
    path = folder / "endpoint.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def deploy(platform: Platform) -> Run:
    """Runs scripts/deploy.py in a process of its own, and looks through all that it prints for secrets."""

    def run(*arguments: object, key: str | None = KEY, **environment: str) -> Done:
        options = ("--api-url", platform.url, "--retry-wait", "0.01")
        command = [sys.executable, "scripts/deploy.py", *options, *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
        keys = {} if key is None else {"RUNPOD_API_KEY": key}
        env = {**kept, **keys, **SECRETS, **environment}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        printed = done.stdout + done.stderr
        for secret in (KEY, *SECRETS.values(), *environment.values(), "MIIE", "ij", "kl", "mn\\u", "op\\n", "QRST"):
            assert secret not in printed, f"a secret was printed: {secret}"
        assert "Traceback" not in printed, printed
        return done

    return run


def succeeded(done: Done) -> str:
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def failed(done: Done) -> str:
    """Of a command that could not do what was asked: its one line; warnings may stand before."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    *before, line = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(each.startswith("warning: ") for each in before), done.stderr
    return line


def read(
    text: str, folder: Path, environ: dict[str, str] | None = None, secrets: Secrets | None = None
) -> EndpointFile:
    return read_file(write(folder, text), SECRETS if environ is None else environ, secrets or Secrets())


# ------------------------------------------------------------------------------------------- applying


def test_an_endpoint_is_created_as_the_file_says(deploy: Run, platform: Platform, file: Path) -> None:
    told = succeeded(deploy("apply", file, "--yes"))
    assert "created tts (ep1)" in told and "https://api.runpod.ai/v2/ep1/run" in told
    (endpoint,) = platform.endpoints.values()
    assert endpoint["gpu"] == {
        "pools": ["AMPERE_24", "ADA_24"],
        "excludedTypes": [],
        "count": 1,
        "allowedCudaVersions": [],
        "minCudaVersion": "12.8",
    }
    assert endpoint["workers"] == {"min": 0, "max": 5, "idleTimeout": 5} and endpoint["timeout"] == 600_000
    assert endpoint["scaling"] == {"type": "QUEUE_DELAY", "queueDelay": 4} and endpoint["flashboot"] == "FLASHBOOT"
    assert (endpoint["networkVolumes"], endpoint["dataCenterIds"], endpoint["disk"]) == (["vol1"], ["EU-RO-1"], 20)
    assert endpoint["env"] == {
        "MODEL": "turbo",
        "MAX_CONCURRENCY": "8",
        "BUCKET_SECRET_ACCESS_KEY": BUCKET_SECRET,
        "HF_TOKEN": TOKEN,
        "GCP_KEY": PRIVATE_KEY,
        "BUCKET_ACCESS_KEY_ID": "{{ RUNPOD_SECRET_bucket_id }}",
    }
    assert [method for method, *_ in platform.writes()] == ["POST"]


def test_applying_twice_changes_nothing(deploy: Run, platform: Platform, file: Path) -> None:
    succeeded(deploy("apply", file, "--yes"))
    platform.endpoints["ep1"]["gpu"]["pools"].reverse()  # an order that means nothing
    before, writes = json.dumps(platform.endpoints), len(platform.writes())
    assert "nothing to do" in succeeded(deploy("apply", file))
    assert json.dumps(platform.endpoints) == before and len(platform.writes()) == writes


def test_drift_is_shown_and_then_undone(deploy: Run, platform: Platform, tmp_path: Path) -> None:
    file = write(tmp_path, FILE.replace("[workers]", "exclude_gpus = []\n[workers]"))
    succeeded(deploy("apply", file, "--yes"))
    endpoint = platform.endpoints["ep1"]
    as_it_was = json.dumps(endpoint, sort_keys=True)
    endpoint["workers"]["max"] = 50
    endpoint["gpu"]["excludedTypes"] = ["NVIDIA L4"]
    endpoint["env"] |= {"MODEL": "nano", "BUCKET_SECRET_ACCESS_KEY": "rotated-by-hand", "EXTRA_TOKEN": "left-behind"}
    dry = deploy("apply", file, "--dry-run", ROTATED="rotated-by-hand", BEHIND="left-behind")
    rows = {line.split("│")[1].strip(): line for line in succeeded(dry).splitlines() if line.startswith("│")}
    assert set(rows) == {
        *("workers.max", "exclude_gpus", "env.MODEL", "env.BUCKET_SECRET_ACCESS_KEY", "env.EXTRA_TOKEN"),
    }
    assert "50" in rows["workers.max"] and "5" in rows["workers.max"]
    assert "nano" in rows["env.MODEL"] and "turbo" in rows["env.MODEL"]
    assert rows["env.BUCKET_SECRET_ACCESS_KEY"].count(HIDDEN) == 2 and rows["env.EXTRA_TOKEN"].count(HIDDEN) == 1
    assert not [write for write in platform.writes() if write[0] == "PATCH"], "nothing is sent by a dry run"

    succeeded(deploy("apply", file, "--yes"))
    assert json.dumps(endpoint, sort_keys=True) == as_it_was
    (_, _, body) = platform.writes()[-1]
    assert body is not None and set(body) == {"workers", "gpu", "env"}, "what is as it should be is not sent"


def test_what_the_file_leaves_out_stays_as_it_is(deploy: Run, platform: Platform, tmp_path: Path) -> None:
    endpoint = platform.add(
        dataCenterIds=["US-KS-2"],
        networkVolumes=["vol9"],
        disk=77,
        workers={"min": 2, "max": 9, "idleTimeout": 60},
        scaling={"type": "QUEUE_DELAY", "queueDelay": 7},
        timeout=1_000_000,
        flashboot="OFF",
        gpu={"pools": ["AMPERE_24"], "excludedTypes": ["NVIDIA L4"], "count": 4, "minCudaVersion": "12.4"},
    )
    before = json.dumps(endpoint)
    assert "nothing to do" in succeeded(deploy("apply", write(tmp_path, minimal('name = "tts"')), "--yes"))
    assert json.dumps(endpoint) == before
    with connected(platform) as deployments:  # of what is sent whole, the file says one thing
        text = minimal('name = "tts"\n[workers]\nmax = 6').replace('"AMPERE_24"', '"ADA_24"')
        deployments.apply(deployments.plan(read(text, tmp_path)))
    after = json.dumps(endpoint | {"workers": endpoint["workers"] | {"max": 9}}).replace("ADA_24", "AMPERE_24")
    assert after == before and endpoint["workers"]["max"] == 6
    succeeded(
        deploy("apply", write(tmp_path, minimal('name = "tts"\nnetwork_volume = ""\ndata_centers = []')), "--yes")
    )
    assert (endpoint["dataCenterIds"], endpoint["networkVolumes"], endpoint["disk"]) == ([], [], 77)


def test_gpus_that_are_excluded_stay_so_when_something_else_of_them_changes(platform: Platform, tmp_path: Path) -> None:
    endpoint = platform.add(gpu={"pools": ["AMPERE_24", "ADA_24"], "excludedTypes": ["NVIDIA L4"], "count": 4})
    with connected(platform) as deployments:
        file = read(FILE.replace("[workers]", 'exclude_gpus = ["NVIDIA L4"]\n[workers]'), tmp_path)
        deployments.apply(deployments.plan(file))
    assert endpoint["gpu"]["excludedTypes"] == ["NVIDIA L4"] and endpoint["gpu"]["minCudaVersion"] == "12.8"


def test_one_scaler_replaces_the_other(deploy: Run, platform: Platform, tmp_path: Path) -> None:
    endpoint = platform.add()
    by_count = minimal('name = "tts"\n[scaler]\ntype = "request_count"\nvalue = 2')
    succeeded(deploy("apply", write(tmp_path, by_count), "--yes"))
    assert (
        endpoint["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 2} and "idleTimeout" not in endpoint["workers"]
    )
    for left_out in ("", "[scaler]\ntype = 'request_count'", "[scaler]\ntype = 'request_count'\nvalue = 2"):
        with connected(platform) as deployments:
            assert deployments.plan(read(minimal(f'name = "tts"\n{left_out}'), tmp_path)).changes == ()
    succeeded(deploy("apply", write(tmp_path, minimal('name = "tts"\n[scaler]\ntype = "queue_delay"')), "--yes"))
    assert endpoint["scaling"] == {"type": "QUEUE_DELAY", "queueDelay": 4} and endpoint["workers"]["idleTimeout"] == 5


def test_what_is_said_twice_counts_once(platform: Platform, tmp_path: Path) -> None:
    endpoint = platform.add()
    text = minimal('name = "tts"').replace('["AMPERE_24"]', '["AMPERE_24", "AMPERE_24"]')
    with connected(platform) as deployments:
        assert deployments.plan(read(text, tmp_path)).changes == ()
        deployments.apply(deployments.plan(read(text.replace("AMPERE_24", "ADA_24"), tmp_path)))
    assert endpoint["gpu"]["pools"] == ["ADA_24"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[workers]\nmin = 4", r"workers\.min \(4\) is over workers\.max \(3\)"),
        ("execution_timeout_s = 300", r"JOB_TIMEOUT_S: 600 s are over execution_timeout_s \(300 s\)"),
        ("[workers]\nidle_timeout_s = 9", "takes no workers.idle_timeout_s"),
    ],
)
def test_what_does_not_go_with_what_is_left_out_is_refused(
    platform: Platform, tmp_path: Path, said: str, told: str
) -> None:
    platform.add(scaling={"type": "REQUEST_COUNT", "requestCount": 4}, timeout=300_000)
    file = read(minimal('name = "tts"\n' + said.replace("execution_timeout_s = 300", "")), tmp_path)
    with connected(platform) as deployments, pytest.raises(DeployError, match=told):
        deployments.plan(file)
    assert not platform.writes()


def minimal(more: str) -> str:
    return f"{more}\n[env]\n[other_env]\n".replace(
        'name = "tts"', 'name = "tts"\nimage = "example.com/tts:1"\ngpus = ["AMPERE_24"]', 1
    )


def test_a_worker_without_a_gpu_is_another_family(tmp_path: Path, platform: Platform) -> None:
    text = 'name = "tts"\nimage = "i"\ncpus = ["cpu5c-4", "cpu3g-8"]\nmin_cuda = "12.8"'
    with pytest.raises(DeployError, match="are for gpus"):
        read(text, tmp_path)
    file = read(text.replace('min_cuda = "12.8"', ""), tmp_path)
    body = create_body(file, wanted_fields(file, None))
    assert body["cpu"] == [{"id": "cpu5c", "vcpuCount": 4}, {"id": "cpu3g", "vcpuCount": 8}] and "gpu" not in body
    platform.add()
    with connected(platform) as deployments, pytest.raises(DeployError, match="GPU endpoint into a CPU one"):
        deployments.plan(file)


# ---------------------------------------------------------------------------------- what goes wrong there


def test_a_lost_answer_is_looked_up_and_not_repeated(deploy: Run, platform: Platform, file: Path) -> None:
    platform.faults["POST"] = [LOSE]
    assert "created tts (ep1)" in succeeded(deploy("apply", file, "--yes"))
    assert len(platform.endpoints) == 1 and len(platform.writes()) == 1


def test_what_is_listed_late_is_not_created_again(platform: Platform, tmp_path: Path) -> None:
    platform.faults["POST"] = [LOSE]
    platform.hides_new_for = 2
    with connected(platform) as deployments:
        deployments.apply(deployments.plan(read(FILE, tmp_path)))
    assert len(platform.endpoints) == 1


def test_a_creation_that_did_not_happen_is_repeated(platform: Platform, tmp_path: Path) -> None:
    platform.faults["POST"] = [429, 429]
    with connected(platform) as deployments:
        assert deployments.apply(deployments.plan(read(FILE, tmp_path)))["id"] == "ep1"
    assert len(platform.endpoints) == 1 and len(platform.writes()) == 3


@pytest.mark.parametrize("fault", [DROP, LOSE, 503])
def test_a_creation_that_may_have_happened_is_not_repeated(
    platform: Platform, tmp_path: Path, fault: int | str
) -> None:
    platform.faults["POST"], platform.hides_new_for = [fault], 9
    with connected(platform) as deployments:
        with pytest.raises(DeployError, match="it may have been created, and be listed later"):
            deployments.apply(deployments.plan(read(FILE, tmp_path)))
        assert len(platform.writes()) == 1
        platform.hides_new_for = 0  # it is listed at last, if it exists
        deployments.apply(deployments.plan(read(FILE, tmp_path)))
    assert len(platform.endpoints) == 1


def test_a_look_that_fails_does_not_hide_that_something_may_have_been_created(
    platform: Platform, tmp_path: Path
) -> None:
    with connected(platform) as deployments:
        plan = deployments.plan(read(FILE, tmp_path))
        platform.faults |= {"POST": [LOSE], "GET": [503] * 9}
        with pytest.raises(DeployError, match="no answer .*503.*it may have been created"):
            deployments.apply(plan)


@pytest.mark.parametrize("named", ["tts -fb", " tts ", "tts -fb -fb"])
def test_a_name_as_the_console_writes_it_is_found_again(platform: Platform, tmp_path: Path, named: str) -> None:
    file = read(FILE.replace('"tts"', f'"{named}"'), tmp_path)
    with connected(platform) as deployments:
        for _ in range(2):
            deployments.apply(deployments.plan(file))
        platform.endpoints["ep1"]["name"] = "tts -fb"
        assert deployments.plan(file).changes == ()
    assert len(platform.endpoints) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *({"endpoints": ["x"]}, {"endpoints": {"a": 1}}, {"endpoints": 5}, {}, {"endpoints": [{"name": "tts"}]}),
        *({"endpoints": [{"id": "../pods/x", "name": "tts"}]}, {"endpoints": [{"id": "e", "name": "tts", "gpu": [1]}]}),
        *(
            {"endpoints": [{"id": "e", "name": "tts", field: value}]}
            for field, value in (
                *(("timeout", "soon"), ("cpu", ["cpu5c"]), ("env", [{"key": "A", "value": "hunter22"}])),
                *(("networkVolumes", [{"id": "v"}, {"id": "w"}]), ("requestUrls", "x"), ("workers", {"min": "two"})),
            )
        ),
    ],
)
def test_an_answer_of_another_shape_is_told_and_nothing_is_written(
    platform: Platform, tmp_path: Path, answer: dict[str, object]
) -> None:
    text = minimal('name = "tts"')
    platform.answer = lambda method, path, body: (200, answer)  # type: ignore[method-assign]
    with connected(platform) as deployments, pytest.raises(DeployError, match="not what RunPod's REST API") as error:
        deployments.plan(read(text, tmp_path))
    assert not platform.writes() and "hunter22" not in str(error.value)


def test_deployed_variables_need_not_be_text(platform: Platform, tmp_path: Path) -> None:
    platform.add(env={"A": None, "B": 5, "MODEL": "turbo"})
    with connected(platform) as deployments:
        changes = deployments.plan(read(minimal('name = "tts"'), tmp_path)).changes
    assert [(change.field, change.deployed) for change in changes] == [
        *(("env.A", ""), ("env.B", "5"), ("env.MODEL", "turbo")),
    ]


def test_a_creation_that_is_answered_without_an_id_is_looked_up(platform: Platform, tmp_path: Path) -> None:
    as_it_is = platform.create
    platform.create = lambda body: (201, {"ok": as_it_is(body) is None})  # type: ignore[method-assign]
    with connected(platform) as deployments:
        assert deployments.apply(deployments.plan(read(FILE, tmp_path)))["id"] == "ep1"
    assert len(platform.endpoints) == 1


@pytest.mark.parametrize("errors", [5, "text", {"a": 1}, [None, {"b": 2}]])
def test_an_error_of_any_shape_is_told(platform: Platform, errors: object) -> None:
    platform.answer = lambda method, path, body: (400, {"detail": ["no"], "errors": errors})  # type: ignore[method-assign]
    with Api(platform.url, KEY) as api, pytest.raises(DeployError, match=r"400: \['no'\]"):
        api.get("/serverless/x")


@pytest.mark.parametrize(
    ("command", "redirection", "told"),
    [
        ("apply", "<&-", "say --yes"),
        ("show", ">&-", "standard output is closed"),
        ("show", ">/dev/full", "No space left"),
        ("show --json", ">/dev/full", "No space left"),
    ],
)
def test_streams_that_are_closed_or_full_are_told_in_one_line(
    platform: Platform, file: Path, command: str, redirection: str, told: str
) -> None:
    platform.add()
    line = f"{sys.executable} scripts/deploy.py --api-url {platform.url} {command} {file} {redirection}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, "RUNPOD_API_KEY": KEY, **SECRETS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told in failed(done) and not platform.writes()


@pytest.mark.parametrize("fault", [DROP, LOSE, 429, 500])
def test_reads_changes_and_deletions_are_repeated(platform: Platform, tmp_path: Path, fault: int | str) -> None:
    platform.add()
    platform.faults |= {"GET": [fault], "PATCH": [fault], "DELETE": [fault]}
    with connected(platform) as deployments:
        deployments.delete(deployments.apply(deployments.plan(read(FILE, tmp_path))))
    assert platform.endpoints == {}


def test_a_platform_that_stays_ill_is_told_in_one_line(deploy: Run, platform: Platform, file: Path) -> None:
    platform.faults["GET"] = [429] * 9
    assert "too many requests (429); tried 5 times" in failed(deploy("apply", file, "--yes"))
    platform.faults = {"POST": [400]}
    line = failed(deploy("apply", file, "--yes"))
    assert "told to fail" in line and HIDDEN in line, "the platform's words, without the secrets that it repeats"


def test_a_key_that_is_refused_is_told_and_not_shown(deploy: Run, file: Path) -> None:
    assert "RUNPOD_API_KEY was refused (401" in failed(deploy("show", file, key="rpa_ANOTHERKEY_987"))
    assert "RUNPOD_API_KEY is not set" in failed(deploy("show", file, key=None))


def test_a_change_that_the_platform_does_not_keep_is_told(platform: Platform, tmp_path: Path) -> None:
    platform.add()
    platform.update = lambda endpoint, body: (200, endpoint)  # type: ignore[method-assign]  # takes it, and forgets it
    with connected(platform) as deployments, pytest.raises(DeployError, match=r"not as in the file: .*workers\.max"):
        deployments.apply(deployments.plan(read(FILE, tmp_path)))


def test_a_key_is_sent_over_https_only() -> None:
    with pytest.raises(DeployError, match="https"):
        Api("http://api.example.com/v2", KEY)


def test_what_is_no_key_is_told_and_not_shown(deploy: Run, file: Path, platform: Platform) -> None:
    """The HTTP library's own error would hold it, written in another way than the one that is hidden."""
    done = deploy("show", file, key="rpa_HALF\nrpa_OTHER")
    assert "no key has" in failed(done) and "rpa_" not in done.stdout + done.stderr
    assert not platform.requests


def test_a_key_for_this_machine_is_not_shown_to_a_proxy(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nobody is
    with Api(platform.url, KEY, wait_s=0.001) as api:
        assert api.all_of(ENDPOINTS, "endpoints") == []


@contextlib.contextmanager
def connected(platform: Platform) -> Iterator[Deployments]:
    """Without the command line, which takes a second."""
    with Api(platform.url, KEY, wait_s=0.001) as api:
        yield Deployments(api, Secrets())


# ------------------------------------------------------------------------------- the other commands


def test_what_is_deployed_is_shown_without_secrets(deploy: Run, platform: Platform, file: Path) -> None:
    assert "no endpoint is called 'tts'" in failed(deploy("show", file))
    succeeded(deploy("apply", file, "--yes"))
    shown = succeeded(deploy("show", file))
    assert "turbo" in shown and "{{ RUNPOD_SECRET_bucket_id }}" in shown and HIDDEN in shown
    fields = json.loads(succeeded(deploy("show", file, "--json")))["fields"]
    assert fields["env.HF_TOKEN"] == HIDDEN and fields["workers.max"] == 5 and fields["gpus"] == ["AMPERE_24", "ADA_24"]


def test_an_address_with_a_password_or_a_query_is_not_shown(deploy: Run, platform: Platform, tmp_path: Path) -> None:
    addresses = 'VOICES_URI = "https://h/x?token=hunter22"\nBUCKET_ENDPOINT_URL = "https://u:p/hunter22@h/x"'
    path = write(tmp_path, minimal('name = "tts"').replace("[env]", f"[env]\n{addresses}"))
    shown = deploy("apply", path, "--dry-run")
    assert succeeded(shown).count(HIDDEN) == 2 and "hunter22" not in shown.stdout + shown.stderr


def test_nothing_is_written_without_a_yes(deploy: Run, platform: Platform, file: Path) -> None:
    assert "say --yes" in failed(deploy("apply", file)) and platform.endpoints == {}
    platform.add()
    assert "say --yes" in failed(deploy("delete", file)) and len(platform.endpoints) == 1
    assert "deleted tts (ep1)" in succeeded(deploy("delete", file, "--yes")) and platform.endpoints == {}


def test_of_several_endpoints_of_a_name_one_has_to_be_chosen(deploy: Run, platform: Platform, file: Path) -> None:
    platform.add()
    platform.add(name="tts -fb")  # as the console calls one with FlashBoot
    assert "2 endpoints are called 'tts' (ep1, ep2); say which with --id" in failed(deploy("delete", file, "--yes"))
    succeeded(deploy("delete", file, "--yes", "--id", "ep2"))
    assert list(platform.endpoints) == ["ep1"]


def test_changes_are_told_to_programs_as_json(deploy: Run, platform: Platform, file: Path) -> None:
    platform.add(env={"HF_TOKEN": "hf_the_old_one"})
    content = json.loads(succeeded(deploy("apply", file, "--dry-run", "--json", OLD="hf_the_old_one")))
    changes = {change["field"]: change for change in content["changes"]}
    assert (content["action"], content["id"], content["applied"]) == ("update", "ep1", False)
    assert changes["env.HF_TOKEN"] == {"field": "env.HF_TOKEN", "deployed": HIDDEN, "wanted": HIDDEN}
    assert changes["workers.max"] == {"field": "workers.max", "deployed": 3, "wanted": 5}


def test_an_example_is_written_and_is_a_good_file(deploy: Run, platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.toml"
    succeeded(deploy("init", path, key=None))
    assert path.read_text(encoding="utf-8") == EXAMPLE.read_text(encoding="utf-8")
    assert "--force" in failed(deploy("init", path)) and succeeded(deploy("init", path, "--force"))
    done = deploy("apply", path, "--dry-run")
    assert "to be created" in succeeded(done) and done.stderr == "", "without a warning"


def test_all_that_the_example_mentions_exists(tmp_path: Path) -> None:
    """Each line that is commented out can be put to use."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(
        line.removeprefix("# ") if " = " in line and not line.startswith("#  ") else line for line in lines
    )
    text = text.replace('cpus = ["cpu5c-4"]', "").replace("VOICES_URI = ", "PRELOAD_VOICES = ")
    file = read(text, tmp_path, {"BUCKET_ACCESS_KEY_ID": "AKIA"})
    assert file.exclude_gpus and file.network_volume and file.data_centers and file.other_env and file.registry


# --------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('image = "example.com/tts:1"', "", "image: Field required"),
        ("max = 5", "maximum = 5", "workers.maximum: unknown, did you mean workers.max?"),
        ("container_disk_gb", "container_disc_gb", "container_disc_gb: unknown, did you mean container_disk_gb?"),
        ("max = 5", "max = 5\nmin = 9", "workers: min (9) is over max (5)"),
        ('min_cuda = "12.8"', 'min_cuda = "12.8"\ncuda = ["12.9"]', "expected either cuda or min_cuda"),
        ('gpus = ["AMPERE_24", "ADA_24"]', "", "expected either gpus"),
        ("[workers]", '[scaler]\ntype="request_count"\n[workers]\nidle_timeout_s = 9', "RunPod takes none"),
        ("[workers]", '[scaler]\ntype="request_count"\nvalue=1.5\n[workers]', "expected a whole number"),
        (
            "MAX_CONCURRENCY",
            "MAX_CONCURENCY",
            "env.MAX_CONCURENCY: no setting of the worker, did you mean MAX_CONCURRENCY?",
        ),
        ("MAX_CONCURRENCY", "FAVOURITE_COLOUR", "belongs into [other_env]"),
        ("HF_TOKEN =", "LOG_LEVEL =", "other_env.LOG_LEVEL: a setting of the worker, it belongs into [env]"),
        ("MAX_CONCURRENCY = 8", "MAX_CONCURRENCY = 0", "MAX_CONCURRENCY: Input should be greater than or equal to 1"),
        ('MODEL = "turbo"', 'MODEL = "turbot"', "MODEL: expected one of turbo"),
        ("[workers]", "execution_timeout_s = 300\n[workers]", "JOB_TIMEOUT_S: 600 s are over"),
        ("${BUCKET_SECRET}", "${NOT_SET}", "BUCKET_SECRET_ACCESS_KEY: ${NOT_SET} is not set"),
        ("{{ RUNPOD_SECRET_bucket_id }}", "{{ RUNPOD_SECRET_bucket-id }}", "a secret does not belong into a file"),
        ("max = 5", "max = = 5", "Invalid value"),
        ("max = 5", "max = true", "workers.max: Input should be a valid integer"),
        ("[workers]", "[scaler]\nvalue = inf\n[workers]", "scaler.value: Input should be a finite number"),
        ("example.com/tts:1", "${IMAGE}", "image: ${NAME} is for [env] and [other_env]"),
        ('name = "tts"', 'name = "  "', "name: String should have at least 1 character"),
    ],
)
def test_a_mistake_in_the_file_is_told_by_name(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in FILE
    text = FILE.replace(old, new, 1)
    with pytest.raises(DeployError) as error:
        read(text, tmp_path)
    assert told in str(error.value), error.value


@pytest.mark.parametrize("place", ['BUCKET_SECRET_ACCESS_KEY = "${BUCKET_SECRET}"', 'HF_TOKEN = "${HF_TOKEN}"'])
def test_a_secret_in_the_file_is_refused_and_not_repeated(deploy: Run, tmp_path: Path, place: str) -> None:
    name = place.split()[0]
    path = write(tmp_path, FILE.replace(place, f'{name} = "in-the-clear"'))
    line = failed(deploy("apply", path, "--dry-run", CLEAR="in-the-clear"))
    assert f"{name}: a secret does not belong into a file" in line


def test_a_network_volume_is_found_by_name_and_must_be_where_workers_may_be(platform: Platform, tmp_path: Path) -> None:
    with connected(platform) as deployments:
        assert deployments.plan(read(FILE, tmp_path)).wanted["network_volumes"] == ("vol1",)
        with pytest.raises(DeployError, match=r"none is called 'voces'; there are: voices \(vol1\)"):
            deployments.plan(read(FILE.replace('"voices"', '"voces"'), tmp_path))
        with pytest.raises(DeployError, match="is in EU-RO-1, which data_centers leaves out"):
            deployments.plan(read(FILE.replace('["EU-RO-1"]', '["US-KS-2"]'), tmp_path))


def test_what_is_probably_not_meant_is_warned_of(tmp_path: Path) -> None:
    text = FILE.replace('network_volume = "voices"', "").replace("[env]", '[env]\nVOICES_DIR = "/runpod-volume/v"')
    (told,) = warnings(read(text, tmp_path), 600)
    assert "VOICES_DIR" in told and "without a network_volume" in told
    (told,) = warnings(read(FILE.replace("[env]", "[env]\nJOB_TIMEOUT_S = 60"), tmp_path), 600)
    assert "after 60 s, the endpoint 600 s" in told
    assert list(warnings(read(FILE, tmp_path), 600)) == []


def test_the_settings_of_this_environment_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_TIMEOUT_S", "9999")
    monkeypatch.setenv("VOICES_DIR", "/here")
    assert list(warnings(read(FILE, tmp_path), 600)) == []


def test_a_variable_is_shown_only_if_it_is_known_to_be_no_secret() -> None:
    assert may_be_shown("MODEL", "turbo") and may_be_shown("HF_TOKEN", "{{ RUNPOD_SECRET_hf }}")
    for name, value in (
        *(("BUCKET_SECRET_ACCESS_KEY", "x"), ("BUCKET_ACCESS_KEY_ID", "x"), ("HF_TOKEN", "x"), ("COLOUR", "x")),
        *(("VOICES_URI", "https://user:word@host/x"), ("MODEL_X", "{{ RUNPOD_SECRET_a }} and more")),
        *(("VOICES_URI", "https://h/x?token=word"), ("BUCKET_ENDPOINT_URL", "https://u:p/word@h")),
    ):
        assert not may_be_shown(name, value), name
    assert may_be_shown("VOICES_URI", "s3://bucket/voices") and may_be_shown("VOICES_URI", "https://host:8443/x")


@pytest.mark.parametrize(
    "variable",
    [
        'DATABASE_URL = "postgres://user:hunter22@host/x"',
        'PGPASS = "hunter22"',
        'WORD = "hunter"\nPIN = "7"',
        'COLOUR = "a rather long one, hunter, of words"',
    ],
)
def test_what_tables_hide_is_hidden_in_errors_too(platform: Platform, tmp_path: Path, variable: str) -> None:
    platform.faults["POST"], secrets = [400], Secrets()
    text = minimal('name = "tts"').replace("[other_env]", f"[other_env]\n{variable}")
    with connected(platform) as deployments, pytest.raises(DeployError) as error:
        deployments.apply(deployments.plan(read(text, tmp_path, secrets=secrets)))
    told = secrets.hide(str(error.value))
    assert "hunter" not in told and '"7"' not in told and "example.com/tts:1" in told, told


def test_a_secret_is_hidden_in_each_way_of_writing_it() -> None:
    secrets = Secrets([PRIVATE_KEY, "postgres://user:pass-word@host/x"])
    once, plain = json.dumps(PRIVATE_KEY), json.dumps(PRIVATE_KEY, ensure_ascii=False)
    for text in (PRIVATE_KEY, once, plain, json.dumps(once), json.dumps(plain), repr(PRIVATE_KEY), ascii(PRIVATE_KEY)):
        hidden = secrets.hide(f"got {text} here")
        assert hidden.translate(str.maketrans("", "", "\\\"'")) == f"got {HIDDEN} here", hidden
    assert secrets.hide("line 2 is QRSTuvwxyz; pass-word") == f"line 2 is {HIDDEN}; {HIDDEN}"


def test_a_word_is_hidden_only_where_its_variable_is_named(tmp_path: Path) -> None:
    secrets = Secrets()
    read(FILE.replace("[other_env]", '[other_env]\nMODE = "turbo"'), tmp_path, secrets=secrets)
    assert secrets.hide("turbo") == "turbo" and secrets.hide("MODEL: turbo") == "MODEL: turbo"
    assert secrets.hide('{"MODE": "turbo"}') == f'{{"MODE": "{HIDDEN}"}}'


def test_what_was_created_from_a_file_does_not_differ_from_it(platform: Platform, tmp_path: Path) -> None:
    for change in (
        "",
        'cuda = ["12.9", "12.8"]',
        'exclude_gpus = ["NVIDIA L4"]',
        'registry = "reg1"',
        "flashboot = false",
        "gpus_per_worker = 2",
    ):
        text = FILE.replace('min_cuda = "12.8"', change)
        file = read(text, tmp_path)
        wanted = wanted_fields(file, "vol1")
        status, endpoint = platform.create(create_body(file, wanted))
        assert status == 201 and differences(deployed_fields(endpoint), wanted) == [], change
