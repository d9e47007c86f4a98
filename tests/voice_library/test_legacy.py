"""Libraries of the older kind come over with their ids, names and audio, and nothing in them ever runs."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.voice_library.recordings import RATE_HZ, FloatArray, silence, speech
from voice_library import VoiceLibrary
from voice_library.errors import LibraryError
from voice_library.legacy import Imported, ImportReport, import_legacy
from voice_library.pickles import PickleError, read_pickle, to_array, to_number

MODULE_PAIRS = ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"numpy._core.numeric", b"numpy.core.numeric"))


@functools.cache
def _recording() -> FloatArray:
    return speech(6.0)


@pytest.fixture
def recording() -> FloatArray:
    return _recording().copy()


class LegacyFolder:
    """A library of the older kind, being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("embeddings", "metadata"):
            (path / name).mkdir(parents=True)

    def put(self, voice_id: str, content: object, **facts: Any) -> None:
        self.put_bytes(voice_id, pickle.dumps(content))
        if facts:
            (self.path / "metadata" / f"{voice_id}.json").write_text(json.dumps(facts))

    def put_bytes(self, voice_id: str, data: bytes) -> None:
        (self.path / "embeddings" / f"{voice_id}.pkl.gz").write_bytes(gzip.compress(data, 1))

    def write_json(self, name: str, content: object) -> None:
        (self.path / name).write_text(json.dumps(content))


@pytest.fixture
def legacy(tmp_path: Path) -> LegacyFolder:
    return LegacyFolder(tmp_path / "legacy")


@pytest.fixture
def library(tmp_path: Path) -> VoiceLibrary:
    return VoiceLibrary.open(tmp_path / "library")


def as_dict(audio: np.ndarray, **changes: Any) -> dict[str, Any]:
    return {"audio": audio, "sample_rate": RATE_HZ, "duration": audio.size / RATE_HZ, "format": "float32", **changes}


def run_import(legacy: LegacyFolder, library: VoiceLibrary, **options: Any) -> dict[str, Imported]:
    return {voice.legacy_id: voice for voice in import_legacy(legacy.path, library, **options).voices}


# ---------------------------------------------------------------------------------- what comes over


def test_ids_names_facts_and_audio_are_kept(legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray) -> None:
    legacy.put("anna_01", as_dict(recording), voice_name="Anna Müller", language="de", tags=["calm"], gender="female")
    done = run_import(legacy, library)["anna_01"]
    assert (done.outcome, done.voice_id, done.name) == ("imported", "anna_01", "Anna Müller")
    voice = library.get("anna_01")
    assert (voice.language, voice.gender, voice.tags) == ("de", "female", ("calm",))
    audio, rate = library.get_audio("anna_01")
    assert rate == RATE_HZ and audio.size == recording.size
    assert np.abs(audio - recording).max() <= 2.0**-23, "only rounded to 24 bits"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy_major", [1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_and_numpy_are_read_exactly(protocol: int, numpy_major: int, order: Any) -> None:
    array = np.asarray(np.arange(24, dtype=np.float32).reshape(4, 6), order=order)
    facts = {"audio": array, "rate": np.int64(24_000), "duration": np.float64(1.5), "more": [1, (2, None, True)]}
    data = pickle.dumps(OrderedDict(facts) if protocol % 2 else facts, protocol=protocol)
    if numpy_major == 1:
        data = with_module_names_of_numpy_1(data)
    content = read_pickle(data)
    assert np.array_equal(to_array(content["audio"]), array)
    assert (to_number(content["rate"]), to_number(content["duration"])) == (24_000, 1.5)
    assert content["more"] == [1, (2, None, True)]


def with_module_names_of_numpy_1(data: bytes) -> bytes:
    """numpy 2's pickles with the names that numpy 1 writes: a letter shorter, wherever the name's length stands."""
    for new, old in MODULE_PAIRS:
        data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(b"c" + new, b"c" + old)
    if b"\x95" not in data[:12]:
        return data
    header, body = data[:2], data[11:]  # protocol, then a frame's opcode and length
    return header + b"\x95" + struct.pack("<Q", len(body)) + body


def test_a_bare_array_is_audio_at_24_khz(legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray) -> None:
    legacy.put("bare", recording)
    assert run_import(legacy, library)["bare"].outcome == "imported"
    assert library.get_audio("bare")[1] == 24_000


@pytest.mark.parametrize(
    "convert",
    [
        lambda audio: audio.astype(np.float64),
        lambda audio: audio.astype(">f4"),
        lambda audio: (audio * 32768).astype(np.int16),
        lambda audio: audio[None],
        lambda audio: audio[:, None],
    ],
    ids=["float64", "big-endian", "int16", "(1, T)", "(T, 1)"],
)
def test_audio_of_other_number_types_and_shapes_is_the_same_audio(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray, convert: Callable[[FloatArray], np.ndarray]
) -> None:
    legacy.put("v", as_dict(convert(recording)))
    assert run_import(legacy, library)["v"].outcome == "imported"
    assert np.abs(library.get_audio("v")[0] - recording).max() <= 2.0**-14


def test_the_catalogue_and_the_name_mapping_give_names_where_there_is_no_metadata(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    for number, voice_id in enumerate(("listed", "mapped", "nameless")):
        legacy.put(voice_id, as_dict(recording + np.float32(number * 1e-3)))
    legacy.write_json("voice_catalog.json", {"voices": {"listed": {"name": "From Catalogue", "language": "fr"}}})
    legacy.write_json("name_mapping.json", {"From Mapping": "mapped", "another": "listed"})
    done = run_import(legacy, library)
    assert [done[each].name for each in ("listed", "mapped", "nameless")] == [
        "From Catalogue",
        "From Mapping",
        "nameless",
    ]
    assert library.get("listed").language == "fr"
    assert "was also called another" in done["listed"].notes


def test_running_it_twice_imports_nothing_twice(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    legacy.put("one", as_dict(recording))
    legacy.put("two words!", as_dict(recording[::-1].copy()))
    first, second = run_import(legacy, library), run_import(legacy, library)
    assert {voice.outcome for voice in first.values()} == {"imported"}
    assert {voice.outcome for voice in second.values()} == {"skipped"}
    assert library.list().total == 2


def test_an_id_that_is_no_path_gets_a_safe_one_and_the_report_says_so(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    legacy.put("ana maría", as_dict(recording))
    done = run_import(legacy, library)["ana maría"]
    assert done.outcome == "imported" and done.voice_id != "ana maría"
    assert library.get(done.voice_id).name == "ana maría"
    assert any(done.voice_id in note for note in done.notes)


def test_ids_that_climb_out_of_the_folder_lead_nowhere(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    outside = legacy.path.parent / "outside.pkl.gz"
    outside.write_bytes(gzip.compress(pickle.dumps(as_dict(recording))))
    legacy.write_json("voice_catalog.json", {"../../outside": {"name": "out"}, "../outside": {"name": "../../out"}})
    legacy.write_json("name_mapping.json", {"x": "../../outside", "y": str(outside)})
    assert {voice.outcome for voice in run_import(legacy, library).values()} == {"refused"}
    assert library.list().total == 0


def test_a_fact_that_the_library_does_not_take_is_left_out_rather_than_the_voice(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    legacy.put("v", as_dict(recording), name="V", language="not a language", created="yesterday", tags=["kept"])
    done = run_import(legacy, library)["v"]
    assert done.outcome == "imported" and library.get("v").tags == ("kept",)
    assert sum("left out" in note for note in done.notes) == 2


def test_a_long_recording_is_kept_whole_unless_it_is_to_be_trimmed(tmp_path: Path, legacy: LegacyFolder) -> None:
    legacy.put("long", as_dict(speech(30.0)))
    for trim, expected_s in ((False, (30.0, 30.0)), (True, (10.0, 15.0))):
        library = VoiceLibrary.open(tmp_path / f"library-{trim}")
        run_import(legacy, library, trim=trim)
        assert expected_s[0] <= library.get("long").duration_s <= expected_s[1]


# ---------------------------------------------------------------------------------- what is refused


class Calls:
    """Asks whoever unpickles it to call something."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def malicious(marker: Path) -> dict[str, bytes]:
    """Pickles that write the marker file when they are unpickled, or do worse."""
    command = f"touch {marker}"
    program = f"open({str(marker)!r}, 'w').close()"
    stolen = io.BytesIO()
    np.save(stolen, np.zeros(2))
    named = {
        "os.system": pickle.dumps(Calls(os.system, command)),
        "subprocess": pickle.dumps(Calls(subprocess.check_call, ["touch", str(marker)])),
        "eval": pickle.dumps(Calls(eval, program)),
        "exec": pickle.dumps(Calls(exec, program)),
        "inside the dict": pickle.dumps({"audio": Calls(os.system, command), "sample_rate": 24_000}),
        "beside the audio": pickle.dumps({"audio": np.zeros(9, np.float32), "format": Calls(os.system, command)}),
        "in an object array": pickle.dumps({"audio": np.array([Calls(os.system, command)], dtype=object)}),
        "a numpy function": pickle.dumps(Calls(np.save, str(marker), np.zeros(1))),
        "numpy fromfile": pickle.dumps(Calls(np.fromfile, "/etc/passwd")),
        "getattr": pickle.dumps(Calls(getattr, "", "format")),
        "protocol 0": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "an instance": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.",
        "an extension code": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02U\x01aQ.",
        "an out-of-band buffer": b"\x80\x05\x97.",
        "calling what a call gave": b"\x80\x02cnumpy\ndtype\n)R)R.",
        "state onto a name": b"\x80\x02cnumpy\ndtype\n}b.",
    }
    return {name: bytes(data) for name, data in named.items()}


@pytest.mark.parametrize("kind", malicious(Path("x")))
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray, kind: str
) -> None:
    marker = legacy.path / "it-ran"
    legacy.put_bytes("evil", malicious(marker)[kind])
    legacy.put("good", as_dict(recording))
    done = run_import(legacy, library)
    assert not marker.exists()
    assert done["evil"].outcome == "refused" and done["evil"].why
    assert done["good"].outcome == "imported", "one bad voice never stops the rest"


def test_the_attacks_would_work_on_an_ordinary_unpickler(tmp_path: Path) -> None:
    for kind in ("os.system", "eval", "in an object array", "protocol 0", "beside the audio"):
        marker = tmp_path / kind.replace(" ", "-")
        file = tmp_path / "attack.pkl"
        file.write_bytes(malicious(marker)[kind])
        program = f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"
        subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
        assert marker.exists(), f"{kind}: the test above proves nothing"


def nested_keys() -> bytes:
    """A tuple of itself twice, fifty times over, as a key: whoever hashes it never ends."""
    return b"\x80\x02}K\x00" + b"".join(b"2\x86" for _ in range(50)) + b"Ns."


def nested_by_memo() -> bytes:
    levels = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(50))
    return b"\x80\x02}K\x00q\x00" + levels + b"Ns."


def nested_name() -> bytes:
    levels = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(50))
    return b"\x80\x04K\x00q\x00" + levels + b"h\x32h\x32\x93."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x04\x96" + struct.pack("<Q", (1 << 64) - 1) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        b"\x80\x02" + b"]" * 200_000 + b"." * 5,
        b"\x80\x02" + b"(" * 9_000 + b"l" * 9_000 + b".",
        nested_keys(),
        nested_by_memo(),
        nested_name(),
        b"",
        b"\x80",
        b"not a pickle",
    ],
    ids=["memo", "bytes", "bytearray", "frame", "steps", "depth", "dup", "keys", "name", "empty", "cut", "text"],
)
def test_protocol_tricks_end_at_once_and_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PickleError):
            to_array(read_pickle(data))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_refused_without_being_unpacked(legacy: LegacyFolder, library: VoiceLibrary) -> None:
    zeros = gzip.compress(bytes(16 << 20), 9)
    (legacy.path / "embeddings" / "bomb.pkl.gz").write_bytes(zeros * 64)  # a gibibyte, in members
    tracemalloc.start()
    try:
        done = run_import(legacy, library)["bomb"]
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()
    assert done.outcome == "refused" and "unpacks to more" in done.why


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"sample_rate": 24_000}, "no array"),
        ({"audio": [0.1, 0.2]}, "no array"),
        ("text", "no array"),
        (as_dict(np.zeros((2, 200_000), np.float32)), "channel"),
        (as_dict(np.zeros(200_000, np.complex64)), "plain numbers"),
        (as_dict(np.zeros(200_000, "S4")), "plain numbers"),
        (as_dict(np.zeros(200_000, [("a", "f4")])), "plain numbers"),
        (as_dict(np.full(200_000, np.nan, np.float32)), "NaN"),
        (as_dict(_recording(), sample_rate=0), "sample rate"),
        (as_dict(_recording(), sample_rate=float("nan")), "sample rate"),
        (as_dict(_recording(), sample_rate="24000"), "sample rate"),
        (as_dict(silence(6.0)), "reference_silent"),
        (as_dict(_recording()[:100]), "reference_too_short"),
        (as_dict(np.zeros(0, np.float32)), "reference_too_short"),
    ],
)
def test_what_is_not_a_recording_is_refused_with_the_reason(
    legacy: LegacyFolder, library: VoiceLibrary, content: object, reason: str
) -> None:
    legacy.put("v", content)
    done = run_import(legacy, library)["v"]
    assert done.outcome == "refused" and reason in done.why


def test_an_array_that_claims_more_data_than_it_has_is_refused(legacy: LegacyFolder, library: VoiceLibrary) -> None:
    array = np.arange(7, dtype=np.float32)
    reduced: Any = array.__reduce__()
    rebuild, args, state = reduced

    class Lies:
        def __reduce__(self) -> Any:
            return rebuild, args, (state[0], (1 << 40,), *state[2:])

    legacy.put("v", {"audio": Lies()})
    assert "shape is not that of its data" in run_import(legacy, library)["v"].why


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
def test_a_damaged_file_is_refused_and_the_others_are_imported(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray, damage: str
) -> None:
    legacy.put("bad", as_dict(recording))
    legacy.put("good", as_dict(recording))
    path = legacy.path / "embeddings" / "bad.pkl.gz"
    data = path.read_bytes()
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    path.write_bytes({"cut": data[:-1000], "flipped": flipped, "not gzip": b"junk", "empty": b""}[damage])
    done = run_import(legacy, library)
    assert (done["bad"].outcome, done["good"].outcome) == ("refused", "imported")


def test_json_that_cannot_be_read_is_a_problem_and_stops_nothing(
    legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray
) -> None:
    legacy.put("v", as_dict(recording))
    (legacy.path / "voice_catalog.json").write_text("{damaged")
    (legacy.path / "name_mapping.json").write_text("[" * 100_000)
    (legacy.path / "metadata" / "v.json").write_bytes(b"\xff\xfe\x00")
    report: ImportReport = import_legacy(legacy.path, library)
    assert report.count("imported") == 1
    assert len(report.problems) == 2 and any("v.json" in note for note in report.voices[0].notes)


def test_a_name_that_is_taken_is_reported(legacy: LegacyFolder, library: VoiceLibrary, recording: FloatArray) -> None:
    legacy.put("a", as_dict(recording), name="Same")
    legacy.put("b", as_dict(recording), name="Same")
    done = run_import(legacy, library)
    assert (done["a"].outcome, done["b"].outcome) == ("imported", "refused")
    assert "voice_exists" in done["b"].why


def test_a_folder_of_another_kind_is_an_error(tmp_path: Path, library: VoiceLibrary) -> None:
    with pytest.raises(LibraryError, match="not a library of the older kind"):
        import_legacy(tmp_path, library)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_as_data_or_refused(data: bytes) -> None:
    for pickled in (data, b"\x80\x04" + data):
        try:
            to_array(read_pickle(pickled))
        except PickleError:
            continue


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_pickle_with_one_byte_changed_is_read_as_data_or_refused(position: int, value: int) -> None:
    data = bytearray(pickle.dumps(as_dict(np.arange(4, dtype=np.float32))))
    data[position % len(data)] = value
    try:
        content = read_pickle(bytes(data))
        to_array(content["audio"] if isinstance(content, dict) and "audio" in content else content)
    except PickleError:
        pass
