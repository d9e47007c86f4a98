"""eSpeak NG is told everything anew for each text: equal calls sound equal, whatever came between."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.espeak import EspeakLibrary, library
from engine.models import MODELS

pytest.importorskip("espeakng_loader", reason="the draft voice's extra is not installed")

TRILLS = "Rrr, perro! Сорок роз, regierung"
TEXTS = ("The quick brown fox. Is it so?", "Ha.", TRILLS, "42 [laugh] <b>x</b>", "今天天气很好", "")
LANGUAGES = ("en", "de", "es", "ru", "zh", "vi", "af", "sv", "hi", "ar")


@pytest.fixture(scope="module")
def espeak() -> EspeakLibrary:
    return library()


def test_a_process_has_one_library(espeak: EspeakLibrary) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(other is espeak for other in pool.map(lambda _: library(), range(32)))


@pytest.mark.parametrize("language", ["en", "es", "ru", "vi", "mi"])
def test_equal_calls_give_equal_samples_whatever_was_spoken_between(espeak: EspeakLibrary, language: str) -> None:
    chance = random.Random(language)
    first = {text: espeak.speak(text, language, 30).tobytes() for text in TEXTS}
    for _ in range(60):
        text = chance.choice(TEXTS)
        espeak.speak(
            chance.choice(TEXTS), chance.choice(LANGUAGES), chance.randrange(100), rate_wpm=chance.randrange(80, 451)
        )
        assert espeak.speak(text, language, 30).tobytes() == first[text], text


def test_another_process_gives_the_same_samples(espeak: EspeakLibrary) -> None:
    program = (
        "import hashlib; from engine.espeak import library; "
        f"print(hashlib.md5(library().speak({TRILLS!r}, 'ru').tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.md5(espeak.speak(TRILLS, "ru").tobytes()).hexdigest()


def test_threads_get_what_they_would_get_alone(espeak: EspeakLibrary) -> None:
    calls = [(text, language) for text in TEXTS for language in LANGUAGES]
    alone = [espeak.speak(*call).tobytes() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda call: espeak.speak(*call).tobytes(), calls)) == alone


@pytest.mark.parametrize(
    "markup",
    ["\x0199P\x01{}", "\x01+99S{}", "{}\0 and more", "{}\ue000", "{}\ud800"],
    ids=["pitch command", "speed command", "NUL", "private use", "lone surrogate"],
)
def test_no_character_of_a_text_is_a_command(espeak: EspeakLibrary, markup: str) -> None:
    plain = "".join(" " if character in "\x01\0\ue000\ud800" else character for character in markup)
    assert espeak.speak(markup.format("hello"), "en").tobytes() == espeak.speak(plain.format("hello"), "en").tobytes()


@pytest.mark.parametrize("text", ["<speak><break time='9s'/>hello</speak>", "[[h@l'oU]]"])
def test_markup_is_read_out_not_obeyed(espeak: EspeakLibrary, text: str) -> None:
    in_words = espeak.speak(text, "en").size
    assert in_words > espeak.speak("hello", "en").size * 1.5
    assert in_words < espeak.sample_rate * 9


def test_every_language_of_the_models_is_spoken(espeak: EspeakLibrary) -> None:
    for language in MODELS["multilingual"].languages:
        assert espeak.speak("1 2 3", language).size > espeak.sample_rate / 2, language


def test_a_voice_without_its_word_list_is_not_offered(espeak: EspeakLibrary) -> None:
    assert "en" in espeak.voices and "no" in espeak.voices
    assert "fo" not in espeak.voices  # the package carries Faroese's voice, not its dictionary


def test_nothing_is_printed(espeak: EspeakLibrary, capfd: pytest.CaptureFixture[str]) -> None:
    for language in espeak.voices:
        espeak.speak("1 2 3 hello", language)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_told_with_the_way_to_install_it() -> None:
    """In a process of its own: a second library here would not be a fresh one."""
    program = (
        "import sys; sys.modules['espeakng_loader'] = None\n"
        "from engine.errors import SpeechError\n"
        "from engine.espeak import library\n"
        "try: library()\n"
        "except SpeechError as error: print(error.code, error.message)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.startswith("model_unavailable") and "requirements-draft.txt" in told


def test_a_missing_shared_library_or_data_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    espeakng_loader = pytest.importorskip("espeakng_loader")
    empty = str(tmp_path_factory.mktemp("empty"))
    with pytest.raises(OSError, match="cannot open|no such file|not found"):
        EspeakLibrary(f"{empty}/libespeak-ng.so", espeakng_loader.get_data_path())


def test_a_data_folder_deep_in_the_tree_is_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own, as above. eSpeak cuts paths of 160 bytes and more."""
    espeakng_loader = pytest.importorskip("espeakng_loader")
    deep = tmp_path_factory.mktemp("deep") / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    (deep / "data").symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
    program = (
        "from engine.espeak import EspeakLibrary\n"
        f"library = EspeakLibrary({espeakng_loader.get_library_path()!r}, {str(deep / 'data')!r})\n"
        "print(library.speak('hello', 'en').size)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(told) > 5_000
