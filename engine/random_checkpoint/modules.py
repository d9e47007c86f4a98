"""Upstream's modules in two sizes: as published, or tiny.

A tiny module has few layers, and upstream's own width wherever upstream fixes it: T3's Llama is 1024
wide because the perceiver is, and S3Gen's encoder 512 because its look-ahead and upsampling layers are.
Heads are 64 wide everywhere, as in the full size, so that a loader can read every size from the weights.

With device "meta" nothing is allocated: names and shapes are all that the writer of a checkpoint needs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from engine.models import ModelSpec, get_model
from engine.upstream import chatterbox

Size = Literal["tiny", "full"]

_HEAD_WIDTH = 64
_TINY_GPT2_WIDTH = 128
_TINY_TOKENIZER_WIDTH = 128
_TINY_ESTIMATOR_WIDTH = 64
_TINY_VOCODER_WIDTH = 64


def _backbone_rows(configs: dict[str, Any]) -> dict[str, Any]:
    """Rows that upstream's table of backbones lacks: the tiny ones, and Nano's in the PyPI release."""
    llama, gpt2 = configs["Llama_520M"], configs["GPT2_medium"]
    tiny = {"n_embd": _TINY_GPT2_WIDTH, "hidden_size": _TINY_GPT2_WIDTH, "n_head": 2, "n_layer": 2}
    return {
        "GPT2_small": gpt2 | {"n_embd": 768, "hidden_size": 768, "n_head": 12, "n_layer": 12},
        "GPT2_tiny": gpt2 | tiny | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        "Llama_tiny": llama | {"num_hidden_layers": 2, "intermediate_size": 256},
    }


def _backbone_name(spec: ModelSpec, size: Size) -> str:
    if spec.backbone == "llama":
        return "Llama_tiny" if size == "tiny" else "Llama_520M"
    if size == "tiny":
        return "GPT2_tiny"
    return "GPT2_small" if spec.name == "nano" else "GPT2_medium"


@contextlib.contextmanager
def _building_on(device: str) -> Iterator[None]:
    """Make what is built inside on `device`; on "meta" also without the initial values it could not hold."""
    import torch

    from engine.weights import without_weights

    with without_weights() if device == "meta" else torch.device(device):
        yield


def t3_config(model: str, size: Size = "tiny") -> Any:
    """Upstream's T3Config for a family member, with the values that its `from_local` sets.

    Upstream looks backbones up by name in its LLAMA_CONFIGS, so a backbone that the installed release
    does not know gets a row there; rows that exist are left as they are.
    """
    spec = get_model(model)
    configs = chatterbox("models.t3.llama_configs").LLAMA_CONFIGS
    for name, row in _backbone_rows(configs).items():
        configs.setdefault(name, row)
    config = chatterbox("models.t3.modules.t3_config").T3Config(text_tokens_dict_size=spec.text_vocab_size)
    config.llama_config_name = _backbone_name(spec, size)
    config.speech_cond_prompt_len = spec.max_prompt_tokens
    if spec.backbone == "gpt2":
        config.speech_tokens_dict_size = 6563
        config.input_pos_emb = None
        config.use_perceiver_resampler = False
        config.emotion_adv = False
    return config


def build_upstream_t3(model: str, size: Size = "tiny", device: str = "cpu") -> Any:
    """Upstream's T3 of a family member, with upstream's own initial values (or none, on "meta")."""
    config = t3_config(model, size)
    with _building_on(device):
        return chatterbox("models.t3.t3").T3(config)


def build_upstream_voice_encoder(device: str = "cpu") -> Any:
    """Upstream's VoiceEncoder: small as published, so it has one size."""
    with _building_on(device):
        return chatterbox("models.voice_encoder").VoiceEncoder()


def build_upstream_s3gen(model: str, size: Size = "tiny", device: str = "cpu") -> Any:
    """Upstream's S3Gen (speech tokenizer, speaker encoder, flow, vocoder) of a family member."""
    meanflow = get_model(model).meanflow
    upstream = chatterbox("models.s3gen.s3gen")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`LoRACompatibleLinear` is deprecated", FutureWarning)  # between packages
        if size == "tiny":
            return _tiny_s3gen(upstream, meanflow, device)
        with _building_on(device):
            return upstream.S3Token2Wav(meanflow=meanflow)


def _tiny_s3gen(upstream: Any, meanflow: bool, device: str) -> Any:
    """S3Gen with small parts; its constructor takes no sizes, so it is put together here as it would do it."""
    import torch

    s3gen = upstream.S3Token2Wav.__new__(upstream.S3Token2Wav)
    torch.nn.Module.__init__(s3gen)
    s3gen.tokenizer = _tiny_tokenizer(device)
    s3gen.mel_extractor = upstream.mel_spectrogram
    s3gen.meanflow = meanflow
    s3gen.resamplers = {}
    s3gen.estimator_dtype = "fp32"
    with _building_on(device):
        s3gen.speaker_encoder = upstream.CAMPPlus(memory_efficient=False, growth_rate=8, bn_size=2, init_channels=32)
        s3gen.flow = _tiny_flow(upstream, meanflow=meanflow)
        s3gen.mel2wav = _tiny_vocoder(upstream)
        s3gen.register_buffer("trim_fade", _fade_in(upstream.S3GEN_SR), persistent=False)
    return s3gen


def _tiny_tokenizer(device: str) -> Any:
    """S3Tokenizer with one layer; upstream ignores the sizes it is given, hence the replaced parts."""
    import torch

    parts = chatterbox("models.s3tokenizer.s3tokenizer")
    from s3tokenizer.model_v2 import AudioEncoderV2, FSQVectorQuantization  # importable once chatterbox is

    with _building_on("meta"):
        tokenizer = parts.S3Tokenizer("speech_tokenizer_v2_25hz")
    with _building_on(device):
        tokenizer.window = torch.hann_window(tokenizer.n_fft)
        tokenizer.encoder = AudioEncoderV2(
            n_mels=128,
            n_state=_TINY_TOKENIZER_WIDTH,
            n_head=_TINY_TOKENIZER_WIDTH // _HEAD_WIDTH,
            n_layer=1,
            stride=2,
            use_sdpa=False,
        )
        tokenizer.quantizer = FSQVectorQuantization(_TINY_TOKENIZER_WIDTH, 3**8)
    return tokenizer


def _tiny_flow(upstream: Any, *, meanflow: bool) -> Any:
    """Upstream's flow with one block before the upsampling (the four after it are fixed) and one mid block."""
    encoder = upstream.UpsampleConformerEncoder(
        output_size=512,
        attention_heads=8,
        linear_units=64,
        num_blocks=1,
        normalize_before=True,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        input_size=512,
        use_cnn_module=False,
        macaron_style=False,
    )
    estimator = upstream.ConditionalDecoder(
        in_channels=320,
        out_channels=80,
        causal=True,
        channels=[_TINY_ESTIMATOR_WIDTH],
        dropout=0.0,
        attention_head_dim=_HEAD_WIDTH,
        n_blocks=1,
        num_mid_blocks=1,
        num_heads=8,
        act_fn="gelu",
        meanflow=meanflow,
    )
    decoder = upstream.CausalConditionalCFM(spk_emb_dim=80, cfm_params=upstream.CFM_PARAMS, estimator=estimator)
    return upstream.CausalMaskedDiffWithXvec(encoder=encoder, decoder=decoder)


def _tiny_vocoder(upstream: Any) -> Any:
    """HiFT with upstream's rates and kernels and an eighth of its channels."""
    return upstream.HiFTGenerator(
        base_channels=_TINY_VOCODER_WIDTH,
        sampling_rate=upstream.S3GEN_SR,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        f0_predictor=upstream.ConvRNNF0Predictor(cond_channels=_TINY_VOCODER_WIDTH),
    )


def _fade_in(sample_rate: int) -> Any:
    """S3Gen's `trim_fade`: 20 ms of silence, then 20 ms of raised cosine."""
    import torch

    num_samples = sample_rate // 50
    ramp = (torch.cos(torch.linspace(torch.pi, 0, num_samples)) + 1) / 2
    return torch.cat([torch.zeros(num_samples), ramp])
