"""Which tokens of an utterance are rendered next when its audio is given out while it is being decoded.

A small group first, so that something is heard at once, then larger ones: each renders its pass anew up to there, which
costs the voice's prompt every time. What waits longer than that is rendered in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.models import ModelSpec
from engine.s3gen.streaming import StreamedPass
from engine.types import IntArray
from engine.utterance import Utterance

FIRST_GROUP_TOKENS = 24
"""Of them the last 9 wait for what follows (`engine.s3gen.streaming`): the first audio is 0.6 s."""
GROWTH = 2
MOST_GROUP_TOKENS = 200


@dataclass
class EarlyPass:
    """How far the pass has come that is being heard.

    Args:
        index: of the pass.
        heard: what the vocoder has spoken of it.
        num_tokens: that were rendered.
        group_tokens: how many more the next rendering waits for.
        is_rendering: whether one is under way.
        num_renderings: of all passes so far.
    """

    heard: StreamedPass
    index: int = 0
    num_tokens: int = 0
    group_tokens: int = FIRST_GROUP_TOKENS
    is_rendering: bool = False
    num_renderings: int = 0


@dataclass(frozen=True)
class Group:
    """What to render now.

    Args:
        tokens: int32 (N,): of the pass, up to here.
        is_last: whether the pass ends with them.
    """

    tokens: IntArray
    is_last: bool


def begin(utterance: Utterance, index: int = 0) -> EarlyPass:
    """Nothing heard yet of a pass."""
    return EarlyPass(StreamedPass(utterance.chunks[utterance.passes[index].start].seed), index)


def next_group(utterance: Utterance, early: EarlyPass, spec: ModelSpec) -> Group | None:
    """The tokens to render, or None while too few are there."""
    if early.is_rendering:
        return None
    chunks = [utterance.chunks[number] for number in utterance.passes[early.index]]
    num_done = next((i for i, chunk in enumerate(chunks) if not chunk.is_done), len(chunks))
    is_last = num_done == len(chunks)
    tokens = np.concatenate([chunk.rendered_tokens(spec) for chunk in chunks[: num_done + 1]])
    if not is_last and len(tokens) < early.num_tokens + early.group_tokens:
        return None
    return Group(tokens, is_last)


def start_rendering(utterance: Utterance, early: EarlyPass, group: Group, spec: ModelSpec) -> None:
    """From here on the group's tokens stay as they are."""
    early.is_rendering = True
    start = 0
    for number in utterance.passes[early.index]:
        chunk = utterance.chunks[number]
        if not chunk.is_done:
            chunk.num_given = len(group.tokens) - start
            return
        start += len(chunk.rendered_tokens(spec))


def finish_rendering(utterance: Utterance, early: EarlyPass, group: Group, heard: StreamedPass) -> EarlyPass | None:
    """The state after a rendering: of this pass, of the next, or None when all is heard."""
    more = min(early.group_tokens * GROWTH, MOST_GROUP_TOKENS)
    if not group.is_last:
        return EarlyPass(heard, early.index, len(group.tokens), more, num_renderings=early.num_renderings + 1)
    if early.index + 1 == len(utterance.passes):
        return None
    following = begin(utterance, early.index + 1)
    following.group_tokens, following.num_renderings = more, early.num_renderings + 1
    return following
