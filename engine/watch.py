"""Whether the device still works. Some errors on a GPU (an illegal address, a failed assertion, a lost bus) spoil its
context: from then on every call of the process fails, and only a new process helps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from engine.errors import SpeechError
from engine.utterance import is_out_of_memory

_log = logging.getLogger(__name__)


class DeviceWatch:
    """Looks at the device after each error that may have spoiled it. Thread-safe.

    Args:
        try_device: does something small on the device and waits for it; raises where the device no longer works.
    """

    def __init__(self, try_device: Callable[[], None]) -> None:
        self._try_device = try_device
        self._lock = threading.Lock()
        self._is_lost = False

    @classmethod
    def of(cls, device: torch.device) -> DeviceWatch:
        """On a CPU nothing is ever lost."""
        return cls(lambda: _add_on(device) if device.type == "cuda" else None)

    @property
    def is_lost(self) -> bool:
        """Whether only a new process can speak again."""
        return self._is_lost

    def look(self, error: BaseException) -> bool:
        """Whether the device is lost, now that something failed; a refusal and a lack of memory spoil nothing."""
        if isinstance(error, SpeechError) or is_out_of_memory(error):
            return self._is_lost
        with self._lock:
            if not self._is_lost and (problem := self._problem()) is not None:
                self._is_lost = True
                _log.error("the device no longer works, only a new process helps: %s", problem)
        return self._is_lost

    def check(self) -> None:
        """Refuse work that could only fail.

        Raises:
            SpeechError: generation_failed, once the device is lost.
        """
        if self._is_lost:
            raise lost()

    def _problem(self) -> BaseException | None:
        try:
            self._try_device()
        except Exception as error:
            return None if is_out_of_memory(error) else error
        return None


def lost() -> SpeechError:
    """What every request is told that was under way, or comes, when the device is lost."""
    return SpeechError("generation_failed", "the device failed and its process must be replaced; send this again")


def _add_on(device: torch.device) -> None:
    assert torch.ones(2, device=device).sum().item() == 2.0
