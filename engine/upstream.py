"""The one door to chatterbox-tts and perth, with the traps of their installation handled here.

Two things stand in the way of importing them beside a current torch:

- torchaudio's wheel on PyPI is built for CUDA and for one torch release; beside any other torch its
  native library fails to load and `import torchaudio` raises. Chatterbox, s3tokenizer and perth use
  only its pure Python parts (`transforms`, `compliance.kaldi`). `_use_pure_python_torchaudio` answers
  torchaudio's own question "is the native extension here?" with no, which it supports. torch itself
  is not touched.
- perth imports pkg_resources, gone from setuptools 81, and swallows the ImportError:
  `perth.PerthImplicitWatermarker` is then None. requirements.txt pins setuptools; here the None is
  turned into a `watermark_unavailable` error, so that audio can never go out unmarked.

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


def perth() -> Any:
    """Import perth with a working watermarker.

    Raises:
        SpeechError: watermark_unavailable.
    """
    try:
        module = _import("perth")
    except ImportError as error:
        raise SpeechError("watermark_unavailable", f"resemble-perth cannot be imported: {error}") from error
    if getattr(module, "PerthImplicitWatermarker", None) is None:
        reason = "" if importlib.util.find_spec("pkg_resources") else "; install setuptools<81"
        raise SpeechError("watermark_unavailable", f"perth has no watermarker{reason}")
    return module
