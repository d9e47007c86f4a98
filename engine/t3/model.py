"""T3 as a module: what turns a voice and text into backbone inputs, and hidden states into logits.

The pass over the voice (speaker, prompt tokens, emotion) is separate from the pass over the text, so
that a voice's keys and values can be kept and used again. Inputs follow upstream's
`prepare_input_embeds`:

    llama   [speaker, 32 perceiver latents, emotion] [text + text position] [start + speech position 0] …
    gpt2    [speaker, prompt tokens]                 [text]                 [start] …

Llama models see the start token twice, both times at speech position 0; the first is part of the text
pass here, the second is the decoder's first step, as for every later token. With classifier-free
guidance a second row has its text token embeddings zeroed and keeps the text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.keymap import Key, load_keys, matrix_dtype, shapes_of
from engine.models import START_SPEECH_TOKEN
from engine.packed import HalfLinear, PackedLinear, can_pack, half_keys, halve_linears, pack_linears
from engine.t3.backbone import Backbone, BackboneShape, backbone_keys, project
from engine.weights import WeightFile, without_weights

SPEAKER_WIDTH = 256
PERCEIVER_HEADS = 4


class Perceiver(nn.Module):
    """Resamples the prompt's embeddings to 32 latents: cross-attention, then self-attention, one block."""

    def __init__(self, num_latents: int, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, num_latents, width))
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def _attend(self, latents: Tensor, context: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (PERCEIVER_HEADS, -1)).transpose(1, 2)

        latents_in, context_in = self.norm(latents), self.norm(context)
        attended = F.scaled_dot_product_attention(
            heads(self.query(latents_in)), heads(self.key(context_in)), heads(self.value(context_in))
        )
        return latents + self.out(attended.transpose(1, 2).flatten(2))

    def forward(self, prompt: Tensor) -> Tensor:
        latents = self._attend(self.latents.expand(prompt.shape[0], -1, -1), prompt)
        return self._attend(latents, latents)


class T3(nn.Module):
    """Text to speech tokens.

    Args:
        shape: sizes of the backbone.
        text_vocab_size, speech_vocab_size: rows of the embeddings.
        num_text_positions, num_speech_positions: rows of the learned input positions, 0 for gpt2.
        num_latents: perceiver latents, 0 for gpt2.
    """

    def __init__(
        self,
        shape: BackboneShape,
        *,
        text_vocab_size: int,
        speech_vocab_size: int,
        num_text_positions: int = 0,
        num_speech_positions: int = 0,
        num_latents: int = 0,
    ) -> None:
        super().__init__()
        width = shape.width
        self.shape = shape
        self.speech_vocab_size = speech_vocab_size
        self.backbone = Backbone(shape)
        self.text_embedding = nn.Embedding(text_vocab_size, width)
        self.speech_embedding = nn.Embedding(speech_vocab_size, width)
        self.text_positions = nn.Embedding(num_text_positions, width) if num_text_positions else None
        self.speech_positions = nn.Embedding(num_speech_positions, width) if num_speech_positions else None
        self.speaker = nn.Linear(SPEAKER_WIDTH, width)
        self.emotion = nn.Linear(1, width, bias=False) if num_latents else None
        self.perceiver = Perceiver(num_latents, width) if num_latents else None
        self.head: nn.Module = nn.Linear(width, speech_vocab_size, bias=shape.kind == "gpt2")

    @property
    def device(self) -> torch.device:
        return self.speaker.weight.device

    @property
    def uses_guidance(self) -> bool:
        """Whether the model was trained for classifier-free guidance."""
        return self.shape.kind == "llama"

    def embed_voice(self, speaker_embedding: Tensor, prompt_tokens: Tensor, exaggeration: float | None) -> Tensor:
        """Inputs for the voice part.

        Args:
            speaker_embedding: float32 (256,).
            prompt_tokens: int64 (N,).
            exaggeration: emotion intensity; None for models without it.

        Returns:
            float32 (1, positions, width).
        """
        speaker = self.speaker(speaker_embedding[None, None])
        prompt = self.speech_embedding(prompt_tokens[None]).float()
        if self.perceiver is None or self.emotion is None:
            return torch.cat((speaker, prompt), dim=1)
        assert exaggeration is not None and self.speech_positions is not None
        prompt = prompt + self.speech_positions.weight[: prompt.shape[1]].float()
        emotion = self.emotion(torch.full((1, 1, 1), exaggeration, device=self.device))
        return torch.cat((speaker, self.perceiver(prompt), emotion), dim=1)

    def embed_text(self, text_tokens: Tensor, *, is_unconditional: bool = False) -> Tensor:
        """Inputs for the text part: int64 (N,) to float32 (1, N or N + 1, width)."""
        text = self.text_embedding(text_tokens[None]).float()
        if self.text_positions is None or self.speech_positions is None:
            return text
        if is_unconditional:
            text = torch.zeros_like(text)
        text = text + self.text_positions.weight[: text.shape[1]].float()
        start = self.speech_embedding.weight[START_SPEECH_TOKEN].float() + self.speech_positions.weight[0].float()
        return torch.cat((text, start.expand(1, 1, -1)), dim=1)

    def embed_speech(self, tokens: Tensor, steps: Tensor) -> Tensor:
        """Inputs for one decoding step: int64 (rows,) tokens at speech positions `steps`, to (rows, 1, width)."""
        x = self.speech_embedding(tokens).float()
        if self.speech_positions is not None:
            x = x + self.speech_positions(steps).float()
        return x[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (…, width) to float32 (…, speech vocabulary)."""
        return project(hidden, self.head)


def read_t3_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `T3` from the shapes in a checkpoint, so that tiny and full sizes load alike."""
    kind = "gpt2" if "tfmr.wpe.weight" in shapes else "llama"
    stem, ffn = ("tfmr.h.", "mlp.c_fc.weight") if kind == "gpt2" else ("tfmr.layers.", "mlp.up_proj.weight")
    num_layers = 1 + max(int(key[len(stem) :].split(".")[0]) for key in shapes if key.startswith(stem))
    width = shapes["speech_emb.weight"][1]
    ffn_shape = shapes[f"{stem}0.{ffn}"]
    backbone = BackboneShape(
        kind=kind,
        num_layers=num_layers,
        width=width,
        ffn_width=ffn_shape[1] if kind == "gpt2" else ffn_shape[0],
        max_positions=shapes["tfmr.wpe.weight"][0] if kind == "gpt2" else 8192,
    )

    def rows(key: str) -> int:
        return shapes[key][0] if key in shapes else 0

    latents = shapes.get("cond_enc.perceiver.pre_attention_query", (0, 0))[1]
    return {
        "shape": backbone,
        "text_vocab_size": rows("text_emb.weight"),
        "speech_vocab_size": rows("speech_emb.weight"),
        "num_text_positions": rows("text_pos_emb.emb.weight"),
        "num_speech_positions": rows("speech_pos_emb.emb.weight"),
        "num_latents": latents,
    }


_TEXT_EMBEDDING = "text_emb.weight"
_PLAIN_KEYS = {
    "text_embedding.weight": _TEXT_EMBEDDING,
    "speech_embedding.weight": "speech_emb.weight",
    "text_positions.weight": "text_pos_emb.emb.weight",
    "speech_positions.weight": "speech_pos_emb.emb.weight",
    "speaker.weight": "cond_enc.spkr_enc.weight",
    "speaker.bias": "cond_enc.spkr_enc.bias",
    "emotion.weight": "cond_enc.emotion_adv_fc.weight",
    "perceiver.latents": "cond_enc.perceiver.pre_attention_query",
    "perceiver.norm.weight": "cond_enc.perceiver.attn.norm.weight",
    "perceiver.norm.bias": "cond_enc.perceiver.attn.norm.bias",
    "head.weight": "speech_head.weight",
    "head.bias": "speech_head.bias",
} | {
    f"perceiver.{ours}.{part}": f"cond_enc.perceiver.attn.{theirs}.{part}"
    for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "proj_out"))
    for part in ("weight", "bias")
}


def t3_keys(shape: BackboneShape, present: Container[str]) -> Iterator[Key]:
    """Parameters of `T3`. Upstream's text head and gpt2's unused token embedding stay in the file."""
    for key in backbone_keys(shape):
        yield key._replace(ours=f"backbone.{key.ours}")
    for ours, theirs in _PLAIN_KEYS.items():
        if theirs in present:
            yield Key(ours, (theirs,))


def load_t3(path: Path, device: torch.device, dtype: torch.dtype, *, pack: bool = True) -> T3:
    """Load T3 from upstream's file.

    Args:
        dtype: of the backbone, the head and the embeddings; norms and what runs once per voice stay float32.
            float16 is for CPUs that `engine.kernels` run on.
        pack: lay the matrices out for the CPU; the model then stays on it.

    Raises:
        SpeechError: weights_missing when the file does not fit.
    """
    with WeightFile(path) as weights:
        shapes = shapes_of(weights)
        with without_weights():
            model = T3(**read_t3_arguments(shapes))
        if pack and dtype == torch.float16:
            halve_linears(model.backbone)
            model.head = HalfLinear(cast(nn.Linear, model.head))
        keys = list(half_keys(model, t3_keys(model.shape, shapes)))
        if device.type == "cpu" and dtype != torch.bfloat16:
            # The text embedding is a tenth of the weights, and a text reads a few hundred of its rows: it stays in
            # the mapped file, and only the rows that are read come into memory.
            model.text_embedding.weight = nn.Parameter(weights.tensor(_TEXT_EMBEDDING), requires_grad=False)
            keys = [key for key in keys if key.theirs != (_TEXT_EMBEDDING,)]
        load_keys(model, weights, keys, device=device, dtype_for=_dtype_for(model, dtype))
    if pack and device.type == "cpu" and dtype == torch.float32 and can_pack():
        pack_linears(model.backbone)
        model.head = PackedLinear(cast(nn.Linear, model.head))
    model.backbone.finish_loading(device)
    return model


def _dtype_for(model: T3, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Voices are embedded once and kept: their part is exact whatever the dtype."""
    of_matrices = matrix_dtype(model, dtype)

    def dtype_for(name: str) -> torch.dtype:
        if name.startswith(("speaker.", "emotion.", "perceiver.")):
            return torch.float32
        return torch.float16 if name.endswith(".tiles") else of_matrices(name)

    return dtype_for
