"""From a parsed job to one that can be run: where its audio may go, and its seed.

A platform that loses sight of a worker runs the job again, elsewhere. So that it gives the same audio then, a job that
names no seed gets one that follows from its `idempotency_key`, else from the platform's id of it; only where there is
neither is it drawn. (`long_form` has a fixed one, since it goes on from what other jobs kept.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

from engine.types import DRAWN_SEED_BITS
from jobs import delivery
from jobs.bucket import given_bucket
from jobs.context import JobContext
from jobs.s3_config import FIELD as S3_CONFIG
from jobs.schema import AudioInput, JobInput, LongForm, ParsedJob


@contextlib.contextmanager
def prepared(parsed: ParsedJob, context: JobContext) -> Iterator[tuple[JobInput, JobContext]]:
    """A job as it is run, and its surroundings, for as long as it runs.

    Args:
        parsed: the job.
        context: the worker's surroundings, whose bucket is the deployment's.

    Raises:
        JobError: invalid_request, where the audio cannot be delivered as asked.
    """
    context = context.with_warnings(parsed.warnings)
    request = parsed.request
    if not isinstance(request, AudioInput):
        yield request, context
        return
    with contextlib.ExitStack() as held:
        if context.feed is not None:
            context = dataclasses.replace(context, bucket=None)
            if parsed.s3_config is not None:
                why = f"{S3_CONFIG} was ignored: this worker gives its audio in pieces (STREAMING)"
                context = context.with_warnings((*context.warnings, why))
        elif parsed.s3_config is not None:
            bucket = given_bucket(parsed.s3_config, context.settings)
            held.callback(bucket.close)
            context = dataclasses.replace(context, bucket=bucket)
            if "delivery" not in request.model_fields_set:  # whoever brings a bucket wants it used
                request = request.model_copy(update={"delivery": "s3"})
        delivery.check_destination(request, context)
        yield _seeded(request, context.job_id), context


def _seeded(request: AudioInput, job_id: str | None) -> AudioInput:
    if request.seed is not None or isinstance(request, LongForm):
        return request
    kind, origin = ("key", request.idempotency_key) if request.idempotency_key is not None else ("job", job_id)
    return request if origin is None else request.model_copy(update={"seed": derived_seed(kind, origin)})


def derived_seed(kind: str, origin: str) -> int:
    """The seed of whatever is called so, as short as one that is drawn."""
    digest = hashlib.blake2b(origin.encode("utf-8", "surrogatepass"), digest_size=8, person=kind.encode()).digest()
    return int.from_bytes(digest, "big") % (1 << DRAWN_SEED_BITS)
