"""A T3 whose greedy decode gives known speech tokens, whatever the text and the voice.

Random weights never say "stop", so tests of endings, of lengths and of runaway decoding need a model that
does as it is told. With the output projections of all attention and MLP blocks at zero, the residual
stream is the input embedding; with the positions at zero too, it is the last token's embedding alone. The
embeddings of the planted tokens are orthogonal, and the head's row of each token points at its
predecessor: start → first → … → last → stop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.models import START_SPEECH_TOKEN, STOP_SPEECH_TOKEN
from engine.random_checkpoint.values import generator

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 100.0
"""Logit of the planted token; all others are 0. Enough for temperature 5, or a repetition penalty of 5."""

_SILENCED = re.compile(
    r"^tfmr\..*\.(o_proj|down_proj|c_proj)\.(weight|bias)$|^tfmr\.wpe\.weight$|^speech_pos_emb\.|^speech_head\."
)
_FINAL_NORM = re.compile(r"^tfmr\.(norm|ln_f)\.(weight|bias)$")


@dataclass(frozen=True)
class PlantedSpeech:
    """What a planted T3 says.

    Args:
        tokens: distinct speech tokens, fewer than the backbone is wide minus one (tiny Turbo: 126).
        ends: whether stop follows the last token; otherwise the first does, and so on for ever.
    """

    tokens: tuple[int, ...]
    ends: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        assert self.tokens, "expected at least one token"
        assert len(set(self.tokens)) == len(self.tokens), "expected distinct tokens"
        assert not {START_SPEECH_TOKEN, STOP_SPEECH_TOKEN} & set(self.tokens), "start and stop are implied"


def plant(state: dict[str, Tensor], plan: PlantedSpeech, seed: int) -> None:
    """Change a T3 state dict in place so that it says `plan`."""
    for name, tensor in state.items():
        if _SILENCED.search(name):
            tensor.zero_()
        elif _FINAL_NORM.search(name):
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    embedding, head = state["speech_emb.weight"], state["speech_head.weight"]  # (vocab, width) both
    chain = (START_SPEECH_TOKEN, *plan.tokens)
    directions = _orthogonal_rows(len(chain), embedding.shape[1], seed)
    embedding[list(chain)] = directions
    followers = (*plan.tokens, STOP_SPEECH_TOKEN if plan.ends else plan.tokens[0])
    for direction, follower in zip(directions, followers, strict=True):
        head[follower] += direction * (MARGIN / embedding.shape[1])


def _orthogonal_rows(num_rows: int, width: int, seed: int) -> Tensor:
    """(num_rows, width) orthogonal rows of mean 0 and mean square 1, which both final norms leave as they are."""
    import torch

    assert num_rows < width, f"at most {width - 2} tokens can be planted in a width of {width}"
    matrix = torch.randn(width, num_rows + 1, generator=generator("planted", seed))
    matrix[:, 0] = 1.0  # the other columns come out orthogonal to it: of mean 0
    return torch.linalg.qr(matrix).Q[:, 1:].T * width**0.5
