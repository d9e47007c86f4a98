"""A value for every tensor of a checkpoint.

Weights are drawn at the scale that keeps activations near one (1/sqrt(fan in)); what has a meaning of
its own (norms, running statistics, weight-norm magnitudes, F0) gets values that mean something. Each
tensor is drawn from a generator of its own, seeded by its name: the same seed gives the same tensor in
whatever order, on any machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.upstream import chatterbox

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Draw = Callable[[tuple[int, ...], Generator], Tensor]


def random_state(module: Any, seed: int) -> dict[str, Tensor]:
    """Draw a state dict for a module, of which only names and shapes are read.

    Args:
        module: an upstream module, on the meta device if nothing else is needed of it.
        seed: tensors of one seed and name are equal.

    Returns:
        Contiguous float32 tensors (int64 for batch counters) under the module's own names.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    state = {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}
    _match_weight_norms(state)
    return state


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw one tensor; its name decides what kind of value it holds."""
    draw = next((draw for pattern, draw in _RULES if pattern.search(name)), None) or _draw_by_rank(shape)
    return draw(shape, generator(name, seed))


def generator(name: str, seed: int) -> Generator:
    """A generator for the thing called `name`, independent of all others."""
    import torch

    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _normal(scale: float, mean: float = 0.0) -> Draw:
    def draw(shape: tuple[int, ...], source: Generator) -> Tensor:
        import torch

        return torch.empty(shape).normal_(mean, scale, generator=source)

    return draw


def _uniform(low: float, high: float) -> Draw:
    def draw(shape: tuple[int, ...], source: Generator) -> Tensor:
        import torch

        return torch.empty(shape).uniform_(low, high, generator=source)

    return draw


def _linear(shape: tuple[int, ...], source: Generator) -> Tensor:
    """(out, in, *kernel), scaled by the square root of the fan in."""
    return _normal(1 / math.sqrt(math.prod(shape[1:])))(shape, source)


def _transposed_linear(shape: tuple[int, ...], source: Generator) -> Tensor:
    """(in, out): GPT-2 stores its matrices this way round."""
    return _normal(1 / math.sqrt(shape[0]))(shape, source)


def _f0_weights(shape: tuple[int, ...], source: Generator) -> Tensor:
    return 20 * _linear(shape, source)


def _one(shape: tuple[int, ...], _: Generator) -> Tensor:
    import torch

    return torch.ones(shape, dtype=torch.long)


def _mel_filters(shape: tuple[int, ...], _: Generator) -> Tensor:
    """The speech tokenizer's filters are computed, not learned (upstream's S3Tokenizer)."""
    import librosa
    import torch

    filters = librosa.filters.mel(sr=chatterbox("models.s3tokenizer").S3_SR, n_fft=400, n_mels=shape[0])
    return torch.from_numpy(filters).float()


def _hann_window(shape: tuple[int, ...], _: Generator) -> Tensor:
    import torch

    return torch.hann_window(shape[0])


def _draw_by_rank(shape: tuple[int, ...]) -> Draw:
    return _normal(0.02) if len(shape) < 2 else _linear


_NORMS = r"(norm\w*|_ln|\bln_\w|bn\d|batchnorm|layernorm|shortcut\.1|block\.2|embed\.out\.1)\.weight$"

_RULES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), draw)
    for pattern, draw in (
        (r"num_batches_tracked$", _one),
        (r"running_mean$", _normal(0.1)),
        (r"running_var$", _uniform(0.5, 1.5)),
        (r"_mel_filters$", _mel_filters),
        (r"tokenizer\.window$", _hann_window),
        (r"similarity_weight$", _normal(0.0, 10.0)),
        (r"similarity_bias$", _normal(0.0, -5.0)),
        (r"\.alpha$", _uniform(0.5, 1.5)),  # Snake's frequency: divides, so never near zero
        (r"f0_predictor\.classifier\.weight$", _f0_weights),  # Hz: a voice between about 100 and 200
        (r"f0_predictor\.classifier\.bias$", _normal(0.0, 150.0)),
        (r"(pos_emb\.emb|wpe)\.weight$", _normal(0.1)),
        (r"(text_emb|speech_emb|embed_tokens|wte|input_embedding)\.weight$", _normal(0.5)),
        (r"(pre_attention_query|pos_bias_[uv])$", _normal(0.3)),
        (_NORMS, _normal(0.1, 1.0)),
        (r"\.c_(attn|proj|fc)\.weight$", _transposed_linear),
    )
)

_QUIET = re.compile(r"conv_post\.")
"""HiFT's last layer gives log-magnitudes: at full scale their exponent would clip all audio."""

_QUIET_GAIN = 0.05


def _match_weight_norms(state: dict[str, Tensor]) -> None:
    """Set each weight-norm magnitude (original0) to the norm of its direction (original1)."""
    for name in [name for name in state if name.endswith(".original0")]:
        direction = state[name.replace(".original0", ".original1")]
        magnitude = direction.flatten(1).norm(dim=1).reshape(state[name].shape)
        state[name] = magnitude * (_QUIET_GAIN if _QUIET.search(name) else 1.0)
