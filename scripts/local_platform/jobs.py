"""One job on the platform, and what a request for one may say."""

from __future__ import annotations

import asyncio
import collections
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from scripts.local_platform.limits import Limits
from scripts.local_platform.pulse import Pulse
from scripts.local_platform.spool import Kept

if TYPE_CHECKING:
    from scripts.local_platform.endpoint import Worker

MAX_TTL_S = 7 * 86_400.0


class Refused(Exception):  # noqa: N818 - an answer, more than an error
    """A request that is answered with an HTTP error.

    Args:
        status: of HTTP.
        message: for the client.
        retry_after_s: when it may be better, or None.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class Status(StrEnum):
    """Of a job, as clients see it."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


MAY_BE_RETRIED = frozenset({Status.FAILED, Status.TIMED_OUT})


@dataclass(frozen=True)
class Asked:
    """A request for a job, checked.

    Args:
        fields: all that was sent, for the worker.
        execution_timeout_s, ttl_s: the policy's, or the endpoint's.
        webhook: to be told at the end.
    """

    fields: Mapping[str, Any]
    execution_timeout_s: float
    ttl_s: float
    webhook: str | None

    @classmethod
    def parse(cls, body: bytes, limits: Limits) -> Asked:
        """What JSON asks for.

        Raises:
            Refused: 400.
        """
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("input") is None:
            raise Refused(400, 'expected a JSON object with "input"')
        policy = fields.get("policy") or {}
        webhook = fields.get("webhook") or None
        if not isinstance(policy, dict):
            raise Refused(400, "policy: expected an object")
        if not (webhook is None or (isinstance(webhook, str) and webhook.startswith(("http://", "https://")))):
            raise Refused(400, "webhook: expected an http:// or https:// URL")
        times_s = (
            _seconds(policy, "executionTimeout", limits.execution_timeout_s, limits.min_execution_timeout_s),
            _seconds(policy, "ttl", limits.ttl_s, limits.min_ttl_s),
        )
        return cls(fields, *times_s, webhook)


def _seconds(policy: Mapping[str, Any], name: str, default_s: float, least_s: float) -> float:
    value = policy.get(name)
    if value is None:
        return default_s
    if isinstance(value, bool) or not isinstance(value, int | float) or not least_s <= value / 1000 <= MAX_TTL_S:
        raise Refused(400, f"policy.{name}: expected {least_s * 1000:.0f} to {MAX_TTL_S * 1000:.0f} milliseconds")
    return float(value) / 1000


@dataclass(eq=False)
class Job:
    """A job from its request until its result is forgotten.

    Args:
        id: unique.
        asked: without the fields, which are in `request`.
        is_sync: whether it came by /runsync.
        request: as a worker gets it, JSON; None once nobody can need it again.
        status: as clients see it.
        worker: who has it.
        losses: how many workers were lost with it.
        answer: what the worker ended it with, JSON members without braces.
        digest: of the post that ended it.
        pieces: of its stream, JSON each, that no client took yet.
        progress: what the worker told last.
        changed: beats with every change.
        timers: what is to happen to it, and when.
    """

    id: str
    asked: Asked
    is_sync: bool
    request: Kept | None
    status: Status = Status.IN_QUEUE
    worker: Worker | None = None
    losses: int = 0
    answer: Kept | None = None
    digest: bytes | None = None
    pieces: collections.deque[Kept] = field(default_factory=collections.deque)
    progress: Any = None
    queued_s: float = field(default_factory=time.monotonic)
    taken_s: float | None = None
    listed_s: float = 0.0  # when a ping of its worker named it last
    ended_s: float | None = None
    changed: Pulse = field(default_factory=Pulse)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status not in (Status.IN_QUEUE, Status.IN_PROGRESS)

    def told(self) -> bytes:
        """The answer of /status, JSON."""
        told: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.taken_s is not None:
            told["delayTime"] = round((self.taken_s - self.queued_s) * 1000)
            if self.ended_s is not None:
                told["executionTime"] = round((self.ended_s - self.taken_s) * 1000)
        if self.worker is not None:
            told["workerId"] = self.worker.pod_id
        if self.status is Status.IN_PROGRESS and self.progress is not None:
            told["output"] = self.progress
        return _with_members(told, self.answer.read() if self.answer is not None else b"")

    def told_briefly(self) -> bytes:
        """Its id and status, JSON."""
        return _with_members({"id": self.id, "status": self.status}, b"")

    def forget_run(self) -> None:
        """Nothing is left of a run that is to be repeated."""
        self.worker = self.taken_s = self.ended_s = self.progress = self.answer = self.digest = None
        self.pieces.clear()


def as_json(value: Any) -> bytes:
    """Compact, and ASCII: a client's lone surrogate would not be UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def members(fields: Mapping[str, Any]) -> bytes:
    """The inside of a JSON object."""
    return as_json(fields)[1:-1]


def _with_members(fields: Mapping[str, Any], more: bytes) -> bytes:
    """A JSON object with members that are JSON already: a result is not decoded for every question about it."""
    encoded = as_json(fields)
    return encoded[:-1] + b"," + more + b"}" if more else encoded
