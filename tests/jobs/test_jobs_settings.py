"""The environment is read once, strictly, and told apart from the local defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.settings import LOCAL_DEFAULTS, Settings, SettingsError, read_settings, settings_table


@pytest.fixture(autouse=True)
def _clean_environment(settings: Settings) -> None:
    """`settings` clears the variables."""


def test_nothing_set_gives_the_worker_defaults() -> None:
    settings = read_settings()
    assert (settings.model, settings.device, settings.max_text_chars) == ("turbo", "auto", 5_000)


def test_variables_are_read_and_empty_ones_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "nano")
    monkeypatch.setenv("MODEL_DIR", "/weights")
    monkeypatch.setenv("LOG_LEVEL", "warning")
    monkeypatch.setenv("MAX_CONCURRENCY", "")
    settings = read_settings()
    assert (settings.model, settings.model_dir, settings.log_level) == ("nano", Path("/weights"), "WARNING")
    assert settings.max_concurrency == Settings.model_fields["max_concurrency"].default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEVICE", "gpu"),
        ("DTYPE", "int8"),
        ("MAX_CONCURRENCY", "0"),
        ("MAX_CONCURRENCY", "many"),
        ("LOG_LEVEL", "loud"),
        ("STREAMING", "perhaps"),
        ("JOB_TIMEOUT_S", "-1"),
        ("VOICES_DIR", "s3://bucket/voices"),
        ("VOICES_CACHE_BYTES", "-1"),
        ("MAX_VOICES", "0"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        read_settings()


def test_a_secret_shows_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "hush")
    settings = read_settings()
    assert "hush" not in repr(settings)
    assert settings.unused == ["BUCKET_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("VOICES_URI", "s3://bucket/voices")
    assert read_settings().unused == []


def test_local_defaults_yield_to_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().for_local_test().model == LOCAL_DEFAULTS["model"] == "draft"
    monkeypatch.setenv("MODEL", "turbo")  # the worker's default, yet said explicitly
    assert read_settings().for_local_test().model == "turbo"


@pytest.mark.parametrize("uri", ["/data/voices", "/data/voices/", "file:///data/voices"])
def test_a_library_named_twice_alike_is_taken_and_two_libraries_are_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOICES_DIR", "/data/voices")
    assert read_settings().voices_location == "/data/voices"
    monkeypatch.setenv("VOICES_URI", uri)
    assert read_settings().voices_location == uri
    monkeypatch.setenv("VOICES_DIR", "/data/others")
    with pytest.raises(SettingsError, match="^Value error, VOICES_DIR and VOICES_URI"):
        read_settings()


@pytest.mark.parametrize(
    ("text", "wanted"), [("", ()), ("Anna", ("Anna",)), (" Anna ,, Zoë L.,", ("Anna", "Zoë L.")), ("20", 20)]
)
def test_voices_to_preload_are_names_or_a_number(text: str, wanted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELOAD_VOICES", text)
    assert read_settings().preloaded == wanted


def test_settings_are_frozen(settings: Settings) -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.model = "nano"


def test_the_table_has_a_row_for_each_setting() -> None:
    table = settings_table()
    assert all(f"| `{name.upper()}` |" in table for name in Settings.model_fields)


def test_the_readme_holds_the_table() -> None:
    assert settings_table() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_a_bucket_for_long_jobs_uses_the_credentials_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("WORK_DIR", "/data/work")
    assert read_settings().unused == ["BUCKET_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("WORK_DIR", "s3://bucket/work")
    assert read_settings().unused == []
