"""The one door to chatterbox-tts and perth, with the traps of their installation handled here.

Two things stand in the way of importing them beside a current torch:

- torchaudio's wheel on PyPI is built for CUDA and for one torch release; beside any other torch its
  native library fails to load and `import torchaudio` raises. Chatterbox, s3tokenizer and perth use
  only its pure Python parts (`transforms`, `compliance.kaldi`). `_use_pure_python_torchaudio` answers
  torchaudio's own question "is the native extension here?" with no, which it supports. torch itself
  is not touched.
- perth imports librosa, most of scipy and pkg_resources (gone from setuptools 81) for what is not
  needed here: seconds of every start. `perth_network` takes its trained network without the rest.

Importing chatterbox costs seconds (transformers, diffusers, librosa), so nothing here runs at import:
the functions are called when a part is first needed, and Python's own module cache makes the second
call free.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

from engine.errors import SpeechError


def _use_pure_python_torchaudio() -> None:
    """Tell torchaudio that its native extension is not installed, before its first import."""
    if "torchaudio" in sys.modules:
        return
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
    extension._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
    extension.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
    sys.modules["torchaudio._extension"] = extension


_IMPORTING = threading.Lock()
"""The warning filters belong to the process: two threads must not put them aside at the same time."""


def _import(name: str) -> Any:
    with _IMPORTING:
        if name in sys.modules:
            return sys.modules[name]
        _use_pure_python_torchaudio()
        with warnings.catch_warnings():  # deprecations inside the packages are not ours to print
            warnings.simplefilter("ignore")
            return importlib.import_module(name)


def chatterbox(module: str = "") -> Any:
    """Import `chatterbox` or one of its modules: `chatterbox("models.s3gen")`.

    Raises:
        SpeechError: model_unavailable when chatterbox-tts or something it imports is not installed.
    """
    name = f"chatterbox.{module}" if module else "chatterbox"
    try:
        return _import(name)
    except ImportError as error:
        raise SpeechError(
            "model_unavailable", f"chatterbox-tts cannot be imported ({error}); run `make setup`", "model"
        ) from error


_PERTH = "_perth_implicit"
"""The name under which perth's network package is imported, beside perth's own."""


def perth_network(module: str = "") -> Any:
    """Import perth's implicit network, or one of its modules (`perth_network("model.encoder")`), by itself: perth's own
    `__init__` imports librosa, most of scipy and pkg_resources for what is not needed here, which takes seconds.

    Raises:
        SpeechError: watermark_unavailable.
    """
    try:
        with _IMPORTING:
            if _PERTH not in sys.modules:
                _import_as(_PERTH, _perth_folder() / "perth_net_implicit" / "__init__.py")
        return _import(f"{_PERTH}.{module}") if module else sys.modules[_PERTH]
    except (ImportError, OSError) as error:
        raise SpeechError("watermark_unavailable", f"resemble-perth cannot be imported: {error}") from error


def perth_weights() -> Path:
    """The folder with the implicit network's weights and settings.

    Raises:
        SpeechError: watermark_unavailable.
    """
    try:
        return _perth_folder() / "pretrained" / "implicit"
    except ImportError as error:
        raise SpeechError("watermark_unavailable", f"resemble-perth cannot be imported: {error}") from error


def _perth_folder() -> Path:
    spec = importlib.util.find_spec("perth")  # finds it, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("it is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "perth_net"


def _import_as(name: str, file: Path) -> None:
    """Import the package whose `__init__` is `file` under another name, so that the packages around it are not run."""
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
