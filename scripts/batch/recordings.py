"""Recordings that rows bring along: looked at before anything is sent, files of this machine put in."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jobs.compat import FIELD_ALIASES
from jobs.errors import JobError
from jobs.guarded import AddressRefused, check_url
from jobs.reference import given, scheme_of

MAX_BYTES = 7_000_000
"""As base64 it still goes into a request to /run, of which 10 MB are taken (docs.runpod.io)."""

_FIELDS = ("reference_audio", "input_audio", "target_audio")
_FETCHED = ("https", "s3")


class Recordings:
    """Files that were read before are not read again."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def put_in(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a job with `file:PATH` replaced by what the file holds, base64.

        Raises:
            JobError: for what is no recording: reference_unreadable, reference_too_long, download_refused.
        """
        ours = dict(fields)
        for name, value in fields.items():
            if FIELD_ALIASES.get(name, name) in _FIELDS and isinstance(value, str):
                ours[name] = self._checked(value, name)
            elif name == "segments" and isinstance(value, list):
                ours[name] = [self.put_in(each) if isinstance(each, dict) else each for each in value]
        return ours

    def _checked(self, source: str, field: str) -> str:
        scheme = scheme_of(source)
        if scheme == "https":
            try:
                check_url(source.strip())
            except AddressRefused as error:
                raise JobError("download_refused", f"{field}: {error}", field) from error
        if scheme in _FETCHED:
            return source
        if scheme != "file":
            given(source, field, MAX_BYTES)
            return source
        if source not in self._files:
            data = given(source, field, MAX_BYTES, local_files=True)
            self._files[source] = base64.b64encode(data).decode("ascii")
        return self._files[source]
