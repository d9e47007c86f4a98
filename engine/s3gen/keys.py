"""How S3Gen's parameters are named in upstream's checkpoints, and how they become ours.

1×1 convolutions become linear layers, query, key and value one matrix, weight norm a plain weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.keymap import Key
from engine.models import ModelSpec
from engine.s3gen.encoder import TokenEncoder
from engine.s3gen.estimator import Estimator
from engine.s3gen.flow import Flow
from engine.s3gen.vocoder import DILATIONS, Vocoder

Shapes = dict[str, tuple[int, ...]]

_ESTIMATOR = "flow.decoder.estimator."
_ENCODER = "flow.encoder."


def _both(ours: str, theirs: str, how: str = "same") -> Iterator[Key]:
    """Weight and bias."""
    yield Key(f"{ours}.weight", (f"{theirs}.weight",), how)
    yield Key(f"{ours}.bias", (f"{theirs}.bias",))


def _count(shapes: Shapes, prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in shapes if key.startswith(prefix))


def build_flow(spec: ModelSpec, shapes: Shapes) -> Flow:
    """An empty flow of the checkpoint's size; call on the meta device."""
    encoder = TokenEncoder(
        _count(shapes, f"{_ENCODER}encoders."),
        _count(shapes, f"{_ENCODER}up_encoders."),
        shapes[f"{_ENCODER}encoders.0.feed_forward.w_1.weight"][0],
    )
    estimator = Estimator(
        shapes[f"{_ESTIMATOR}final_proj.weight"][1],
        _count(shapes, f"{_ESTIMATOR}mid_blocks."),
        _count(shapes, f"{_ESTIMATOR}mid_blocks.0.1."),
        meanflow=spec.meanflow,
    )
    return Flow(encoder, estimator, num_steps=spec.num_flow_steps, meanflow=spec.meanflow)


def build_vocoder(shapes: Shapes) -> Vocoder:
    """An empty vocoder of the checkpoint's size; call on the meta device."""
    return Vocoder(shapes["mel2wav.conv_pre.bias"][0], shapes["mel2wav.f0_predictor.classifier.weight"][1])


def flow_keys(shapes: Shapes) -> Iterator[Key]:
    """Parameters of `Flow`."""
    yield Key("token_embedding.weight", ("flow.input_embedding.weight",))
    yield from _both("speaker", "flow.spk_embed_affine_layer")
    yield from _both("encoder.out", "flow.encoder_proj")
    for ours, theirs in (
        ("input.linear", "embed.out.0"),
        ("input.norm", "embed.out.1"),
        ("lookahead", "pre_lookahead_layer.conv1"),
        ("lookahead_out", "pre_lookahead_layer.conv2"),
        ("upsample", "up_layer.conv"),
        ("up_input.linear", "up_embed.out.0"),
        ("up_input.norm", "up_embed.out.1"),
        ("norm", "after_norm"),
    ):
        yield from _both(f"encoder.{ours}", _ENCODER + theirs)
    for ours, theirs in (("layers", "encoders"), ("up_layers", "up_encoders")):
        for i in range(_count(shapes, f"{_ENCODER}{theirs}.")):
            yield from _encoder_layer(f"encoder.{ours}.{i}", f"{_ENCODER}{theirs}.{i}")
    yield from _estimator_keys(shapes)


def _encoder_layer(ours: str, theirs: str) -> Iterator[Key]:
    for our_name, their_name in (
        ("attention_norm", "norm_mha"),
        ("ffn_norm", "norm_ff"),
        ("up", "feed_forward.w_1"),
        ("down", "feed_forward.w_2"),
        ("attention.query", "self_attn.linear_q"),
        ("attention.key", "self_attn.linear_k"),
        ("attention.value", "self_attn.linear_v"),
        ("attention.out", "self_attn.linear_out"),
    ):
        yield from _both(f"{ours}.{our_name}", f"{theirs}.{their_name}")
    yield Key(f"{ours}.attention.position.weight", (f"{theirs}.self_attn.linear_pos.weight",))
    yield Key(f"{ours}.attention.content_bias", (f"{theirs}.self_attn.pos_bias_u",))
    yield Key(f"{ours}.attention.position_bias", (f"{theirs}.self_attn.pos_bias_v",))


def _estimator_keys(shapes: Shapes) -> Iterator[Key]:
    yield from _both("estimator.time_in", f"{_ESTIMATOR}time_mlp.linear_1")
    yield from _both("estimator.time_out", f"{_ESTIMATOR}time_mlp.linear_2")
    if f"{_ESTIMATOR}time_embed_mixer.weight" in shapes:
        yield Key("estimator.time_mix.weight", (f"{_ESTIMATOR}time_embed_mixer.weight",))
    num_mid = _count(shapes, f"{_ESTIMATOR}mid_blocks.")
    num_blocks = _count(shapes, f"{_ESTIMATOR}mid_blocks.0.1.")
    stages = [("down", "down_blocks.0"), ("up", "up_blocks.0")]
    stages += [(f"mid.{i}", f"mid_blocks.{i}") for i in range(num_mid)]
    for ours, theirs in stages:
        yield from _stage(f"estimator.{ours}", f"{_ESTIMATOR}{theirs}", num_blocks)
    yield from _both("estimator.down_conv.conv", f"{_ESTIMATOR}down_blocks.0.2")
    yield from _both("estimator.up_conv.conv", f"{_ESTIMATOR}up_blocks.0.2")
    yield from _conv_block("estimator.final", f"{_ESTIMATOR}final_block")
    yield from _both("estimator.out", f"{_ESTIMATOR}final_proj", "squeeze")


def _conv_block(ours: str, theirs: str) -> Iterator[Key]:
    yield from _both(f"{ours}.conv.conv", f"{theirs}.block.0")
    yield from _both(f"{ours}.norm", f"{theirs}.block.2")


def _stage(ours: str, theirs: str, num_blocks: int) -> Iterator[Key]:
    yield from _both(f"{ours}.resnet.time", f"{theirs}.0.mlp.1")
    yield from _both(f"{ours}.resnet.shortcut", f"{theirs}.0.res_conv", "squeeze")
    for block in ("block1", "block2"):
        yield from _conv_block(f"{ours}.resnet.{block}", f"{theirs}.0.{block}")
    for i in range(num_blocks):
        our_block, their_block = f"{ours}.blocks.{i}", f"{theirs}.1.{i}"
        yield from _both(f"{our_block}.attention_norm", f"{their_block}.norm1")
        qkv = tuple(f"{their_block}.attn1.to_{name}.weight" for name in "qkv")
        yield Key(f"{our_block}.qkv.weight", qkv, "stack")
        yield from _both(f"{our_block}.out", f"{their_block}.attn1.to_out.0")
        yield from _both(f"{our_block}.ffn_norm", f"{their_block}.norm3")
        yield from _both(f"{our_block}.up", f"{their_block}.ff.net.0.proj")
        yield from _both(f"{our_block}.down", f"{their_block}.ff.net.2")


def vocoder_keys(vocoder: Vocoder) -> Iterator[Key]:
    """Parameters of `Vocoder`."""
    root = "mel2wav."
    yield from _both("source_mix", f"{root}m_source.l_linear")
    yield from _normed("conv_in", f"{root}conv_pre")
    yield from _normed("conv_out", f"{root}conv_post")
    for i in range(len(vocoder.f0_predictor.convs)):
        yield from _normed(f"f0_predictor.convs.{i}", f"{root}f0_predictor.condnet.{2 * i}")
    yield from _both("f0_predictor.out", f"{root}f0_predictor.classifier")
    for i in range(len(vocoder.ups)):
        yield from _normed(f"ups.{i}", f"{root}ups.{i}")
        yield from _both(f"source_downs.{i}", f"{root}source_downs.{i}")
        yield from _resblock(f"source_resblocks.{i}", f"{root}source_resblocks.{i}")
    for i in range(len(vocoder.resblocks)):
        yield from _resblock(f"resblocks.{i}", f"{root}resblocks.{i}")


def _normed(ours: str, theirs: str) -> Iterator[Key]:
    """A convolution under weight norm: original0 is the magnitude, original1 the direction."""
    parametrized = f"{theirs}.parametrizations.weight.original"
    yield Key(f"{ours}.weight", (f"{parametrized}0", f"{parametrized}1"), "weight_norm")
    yield Key(f"{ours}.bias", (f"{theirs}.bias",))


def _resblock(ours: str, theirs: str) -> Iterator[Key]:
    for i in range(len(DILATIONS)):
        for half in ("1", "2"):
            yield from _normed(f"{ours}.convs{half}.{i}", f"{theirs}.convs{half}.{i}")
            alpha = f"activations{half}.{i}.alpha"
            yield Key(f"{ours}.{alpha}", (f"{theirs}.{alpha}",))
