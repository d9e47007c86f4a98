"""Random checkpoints are what upstream takes for its own, and planted ones say what they were told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from engine.models import MODELS, START_SPEECH_TOKEN, START_TEXT_TOKEN, STOP_SPEECH_TOKEN, STOP_TEXT_TOKEN, get_model
from engine.random_checkpoint import (
    PlantedSpeech,
    UpstreamModels,
    build_upstream_s3gen,
    build_upstream_t3,
    load_upstream,
    t3_config,
    write_checkpoint,
)
from engine.random_checkpoint.planted import MARGIN
from engine.random_checkpoint.values import random_state
from engine.upstream import chatterbox
from tests.engine.conftest import Checkpoint, PlantedCheckpoint, Upstream

FAMILIES = ("turbo", "original", "multilingual")
PLAN = PlantedSpeech(tokens=tuple(range(100, 140)))


def _decode(upstream: UpstreamModels, model: str, text: list[int], **settings: Any) -> list[int]:
    """Upstream's own decode loop, up to 60 tokens, the stop token taken off."""
    spec = get_model(model)
    cond = chatterbox("models.t3.modules.cond_enc").T3Cond(**upstream.conds.t3.__dict__)
    if spec.backbone == "gpt2":
        tokens = upstream.t3.inference_turbo(cond, torch.tensor([text]), max_gen_len=60, **settings)
    else:
        t3 = copy.copy(upstream.t3)
        t3.hp = t3_config("original")  # not taken for multilingual, whose analyzer would alter the logits
        rows = torch.tensor([[START_TEXT_TOKEN, *text, STOP_TEXT_TOKEN]] * 2)
        tokens = t3.inference(t3_cond=cond, text_tokens=rows, max_new_tokens=60, **settings)
    return [token for token in tokens[0].tolist() if token != STOP_SPEECH_TOKEN]


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_holds_every_file_its_model_requires(model: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(model)
    missing = [name for name in (*get_model(model).required_files, "conds.pt") if not (folder / name).is_file()]
    assert missing == []


def test_laying_out_upstreams_modules_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    build_upstream_s3gen("turbo", device="meta")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("model", FAMILIES)
def test_upstream_loads_a_checkpoint_as_strictly_as_it_loads_its_own(model: str, tiny_upstream: Upstream) -> None:
    upstream = tiny_upstream(model)
    for module in (upstream.t3, upstream.s3gen, upstream.voice_encoder):
        assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert upstream.conds.t3.cond_prompt_speech_tokens.shape == (1, get_model(model).max_prompt_tokens)
    assert upstream.conds.gen["prompt_feat"].shape[1] == 2 * upstream.conds.gen["prompt_token"].shape[1]


def test_turbos_file_holds_the_word_embedding_that_upstream_drops_after_loading(tiny_checkpoint: Checkpoint) -> None:
    with safe_open(tiny_checkpoint("turbo") / "t3_turbo_v1.safetensors", "pt") as file:
        assert "tfmr.wte.weight" in file.keys()  # noqa: SIM118 (safe_open is no mapping)


def test_originals_s3gen_lacks_the_buffers_that_upstream_computes(tiny_checkpoint: Checkpoint) -> None:
    with safe_open(tiny_checkpoint("original") / "s3gen.safetensors", "pt") as file:
        missing = set(build_upstream_s3gen("original", device="meta").state_dict()) - set(file.keys())
    assert missing == {"tokenizer._mel_filters", "tokenizer.window"}


@pytest.mark.parametrize(("model", "layers", "width"), [("turbo", 24, 1024), ("nano", 12, 768), ("original", 30, 1024)])
def test_full_size_is_the_published_size(model: str, layers: int, width: int) -> None:
    t3 = build_upstream_t3(model, "full", "meta")
    assert (t3.cfg.num_hidden_layers, t3.dim, t3.cfg.num_attention_heads) == (layers, width, width // 64)
    if model == "original":
        assert round(sum(parameter.numel() for parameter in t3.parameters()) / 1e6) == 532


def test_tiny_s3gen_is_put_together_as_upstreams_constructor_does_it() -> None:
    tiny, full = (build_upstream_s3gen("turbo", size, "meta") for size in ("tiny", "full"))
    assert {name: type(part) for name, part in tiny.named_children()} == {
        name: type(part) for name, part in full.named_children()
    }
    own = {name: value for name, value in vars(full).items() if not name.startswith("_")}
    assert {name: value for name, value in vars(tiny).items() if not name.startswith("_")} == own
    assert tiny.trim_fade.shape == full.trim_fade.shape
    assert "trim_fade" not in tiny.state_dict()


def test_tiny_s3gen_fades_in_as_upstreams_does() -> None:
    s3gen = build_upstream_s3gen("turbo")
    assert s3gen.trim_fade[:480].abs().max() == 0
    assert s3gen.trim_fade[480] == pytest.approx(0, abs=1e-6)
    assert s3gen.trim_fade[-1] == pytest.approx(1, abs=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    t3 = build_upstream_t3("turbo", device="meta")
    first, again, other = (random_state(t3, seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["text_emb.weight"], other["text_emb.weight"])


def test_weight_norm_directions_and_magnitudes_agree() -> None:
    state = random_state(build_upstream_s3gen("turbo", device="meta").mel2wav, seed=0)
    direction = state["conv_pre.parametrizations.weight.original1"]
    magnitude = state["conv_pre.parametrizations.weight.original0"]
    torch.testing.assert_close(magnitude.flatten(), direction.flatten(1).norm(dim=1))


@pytest.mark.parametrize("model", FAMILIES)
def test_random_weights_decode_to_varied_tokens(model: str, tiny_upstream: Upstream) -> None:
    torch.manual_seed(0)
    tokens = _decode(tiny_upstream(model), model, [20, 21, 22])
    assert len(tokens) >= 59, "random weights do not say stop"
    assert len(set(tokens)) > 30


def test_random_weights_give_audible_audio_that_does_not_clip(tiny_upstream: Upstream) -> None:
    upstream = tiny_upstream("turbo")
    torch.manual_seed(0)
    audio, _ = upstream.s3gen.inference(
        torch.randint(6561, (1, 25)), ref_dict=dict(upstream.conds.gen), n_cfm_timesteps=2
    )
    assert audio.shape == (1, 24_000)
    assert 0.003 < audio.std() < 0.3
    assert audio.abs().max() < 0.9


GREEDY: dict[str, dict[str, Any]] = {
    "turbo": {"top_k": 1},
    "original": {"top_p": 1e-6},
    "multilingual": {"top_p": 1e-6},
}


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("text", [[20, 21, 22], [5] * 30])
def test_planted_speech_is_what_upstream_decodes_greedily(
    model: str, text: list[int], planted_checkpoint: PlantedCheckpoint
) -> None:
    upstream = load_upstream(planted_checkpoint(model, PLAN), model)
    assert _decode(upstream, model, text, **GREEDY[model]) == list(PLAN.tokens)


@pytest.mark.parametrize("model", FAMILIES)
def test_planted_speech_survives_sampling_with_upstreams_defaults(
    model: str, planted_checkpoint: PlantedCheckpoint
) -> None:
    upstream = load_upstream(planted_checkpoint(model, PLAN), model)
    torch.manual_seed(1)
    assert _decode(upstream, model, [20, 21, 22]) == list(PLAN.tokens)


@pytest.mark.parametrize("model", FAMILIES)
def test_planted_speech_without_an_end_loops_for_ever(model: str, planted_checkpoint: PlantedCheckpoint) -> None:
    upstream = load_upstream(planted_checkpoint(model, PlantedSpeech((7, 8, 9), ends=False)), model)
    tokens = _decode(upstream, model, [20, 21], **GREEDY[model])
    assert len(tokens) >= 60
    assert tokens == ([7, 8, 9] * 21)[: len(tokens)]


@pytest.mark.parametrize("model", FAMILIES)
def test_planted_logits_depend_on_the_last_token_alone(model: str, planted_checkpoint: PlantedCheckpoint) -> None:
    t3 = load_upstream(planted_checkpoint(model, PLAN), model).t3
    chain = torch.tensor([[START_SPEECH_TOKEN, *PLAN.tokens]])
    speech = t3.speech_emb(chain) if t3.speech_pos_emb is None else t3.speech_emb(chain) + t3.speech_pos_emb(chain)
    whatever_came_before = 10 * torch.randn(1, 9, t3.dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = t3.tfmr(inputs_embeds=torch.cat([whatever_came_before, speech], dim=1)).last_hidden_state[0, 9:]
        logits = t3.speech_head(hidden)
    expected = torch.zeros_like(logits)
    expected[range(len(logits)), [*PLAN.tokens, STOP_SPEECH_TOKEN]] = MARGIN
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("tokens", [(), (1, 1), (6562,)])
def test_speech_that_cannot_be_planted_is_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        PlantedSpeech(tokens)


def test_more_speech_than_the_backbone_is_wide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="at most 126"):
        write_checkpoint(tmp_path, "turbo", plan=PlantedSpeech(tuple(range(127))))
