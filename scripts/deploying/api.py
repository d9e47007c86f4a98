"""Requests to RunPod's REST API v2.

What only reads, and what may be done twice (PATCH, DELETE), is repeated when the platform is busy (429), ill (5xx) or
silent. A creation is repeated only where it is known that it did not happen, which is after 429 and where nobody was
reached. After any other failure what it should have made is looked for; if that finds nothing, it may still turn up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
import tenacity

from scripts.addresses import checked_key, checked_url, is_this_machine
from scripts.deploying.files import DeployError

API_URL = "https://api.runpod.io/v2"
TIMEOUT_S = 60.0
ATTEMPTS = 5
LONGEST_WAIT_S = 30.0
LOOKS = 5
"""For what a creation without an answer may have made: it can take a moment to be listed."""

Json = dict[str, Any]
_ID = re.compile(r"[\w-]+")


class OddAnswerError(DeployError):
    """The answer to a request that worked is not of the shape that RunPod documents."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: the answer is not what RunPod's REST API v2 gives; is --api-url right?")


class LaterError(Exception):
    """Did not work this time.

    Args:
        why: in words.
        wait_s: how long the platform asks to wait, if it does.
        was_refused: whether it is known that nothing was done.
    """

    def __init__(self, why: str, wait_s: float | None = None, *, was_refused: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.was_refused = was_refused


class Api:
    """A connection with a key.

    Args:
        url: of the API, without a slash at the end.
        key: RUNPOD_API_KEY.
        wait_s: before something is tried again, the first time; twice as long each further time.

    Raises:
        DeployError: for an address that would show the key on its way, and a key that is none.
    """

    def __init__(self, url: str, key: str, wait_s: float = 1.0) -> None:
        base_url = _checked("--api-url", checked_url, url).rstrip("/")
        key = _checked("RUNPOD_API_KEY", checked_key, key)
        self._wait_s = wait_s
        self._client = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
            follow_redirects=False,  # the key is for this host
            trust_env=not is_this_machine(url),  # no proxy stands before it, and none is shown the key
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def all_of(self, path: str, key: str) -> list[Json]:
        """All of a collection; `key` is what the answer calls it.

        Raises:
            DeployError: also for an answer without it: it is not known that there is nothing.
        """
        content = self._repeated("GET", path)
        found = [] if key in content and content[key] is None else content.get(key)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise OddAnswerError(f"GET {path}")
        return found

    def get(self, path: str) -> Json:
        return self._repeated("GET", path)

    def update(self, path: str, body: Json) -> Json:
        return self._repeated("PATCH", path, body)

    def delete(self, path: str) -> None:
        """Delete; what is not there is deleted."""
        self._repeated("DELETE", path, none_is_fine=True)

    def create(self, path: str, body: Json, find: Callable[[], Json | None]) -> Json:
        """Create once.

        Args:
            find: looks for what should have been created, when the answer was lost.

        Raises:
            DeployError: also when it is not known whether it was created.
        """
        for attempt in self._attempts():
            with attempt:
                try:
                    made = self._request("POST", path, body)
                    if _ID.fullmatch(str(made.get("id", ""))):
                        return made
                    raise OddAnswerError(f"POST {path}")
                except (LaterError, OddAnswerError) as error:
                    if isinstance(error, LaterError) and error.was_refused:
                        raise
                    return self._look(find, str(error))
        raise AssertionError("unreachable")

    def _look(self, find: Callable[[], Json | None], why: str) -> Json:
        """What a creation without an answer made."""
        looks = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(LOOKS),
            wait=self._wait,
            retry=tenacity.retry_if_result(lambda found: found is None),
            retry_error_callback=lambda state: None,
        )
        try:
            found = looks(find)
        except DeployError as error:
            found, why = None, f"{why}; {error}"
        if found is None:
            raise DeployError(f"{why}; it may have been created, and be listed later: look, or run this again, then")
        return found

    def _repeated(self, method: str, path: str, body: Json | None = None, *, none_is_fine: bool = False) -> Json:
        for attempt in self._attempts():
            with attempt:
                return self._request(method, path, body, none_is_fine=none_is_fine)
        raise AssertionError("unreachable")

    def _attempts(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(LaterError),
            retry_error_callback=self._give_up,
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked_s = error.wait_s if isinstance(error, LaterError) else None
        growing_s = self._wait_s * 2.0 ** (state.attempt_number - 1)
        return min(growing_s if asked_s is None else asked_s, LONGEST_WAIT_S)

    def _give_up(self, state: tenacity.RetryCallState) -> Any:
        error = state.outcome.exception() if state.outcome is not None else None
        raise DeployError(f"{error}; tried {state.attempt_number} times") from error

    def _request(self, method: str, path: str, body: Json | None = None, *, none_is_fine: bool = False) -> Json:
        """One try.

        Raises:
            LaterError: when it may work later.
            DeployError: when it will not.
        """
        what = f"{method} {path}"
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.RequestError as error:
            why = str(error) or type(error).__name__
            was_refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)  # nothing was sent
            raise LaterError(f"{what}: no answer ({why})", was_refused=was_refused) from error
        if answer.status_code == 429:
            raise LaterError(f"{what}: too many requests (429)", _asked_to_wait(answer), was_refused=True)
        if answer.status_code >= 500:
            raise LaterError(f"{what}: {self._told(answer)}", _asked_to_wait(answer))
        if answer.status_code == 404 and none_is_fine:
            return {}
        if answer.status_code in (401, 403):
            raise DeployError(f"{what}: RUNPOD_API_KEY was refused ({self._told(answer)})")
        if not answer.is_success:
            raise DeployError(f"{what}: {self._told(answer)}")
        return self._content(answer, what)

    def _content(self, answer: httpx.Response, what: str) -> Json:
        if not answer.content:
            return {}
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise OddAnswerError(what)
        return content

    def _told(self, answer: httpx.Response) -> str:
        """The status with RunPod's words, which may repeat what was sent: whoever prints them hides secrets."""
        try:
            content = answer.json()
        except ValueError:
            content = None
        words = [str(answer.status_code)]
        if isinstance(content, dict):
            errors = content.get("errors")
            told = [content.get("detail") or content.get("title"), *(errors if isinstance(errors, list) else [errors])]
            words += [str(each) for each in told if each]
        return ": ".join(words)


def _checked(name: str, check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise DeployError(f"{name}: {error}") from None


def _asked_to_wait(answer: httpx.Response) -> float | None:
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None
