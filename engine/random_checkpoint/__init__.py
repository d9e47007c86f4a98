"""Writes checkpoint folders in upstream's exact layout, with random or planted weights.

Tests and benchmarks need every family member without a hub: tiny ones run upstream's real classes and
this project's real loader in seconds, full-size ones have the true shapes and so the true speed. Names
and shapes come from upstream's own classes, so a folder written here is one that upstream loads.

    modules.py   upstream's modules, full-size or composed small from its part classes
    values.py    a value for every tensor: random, of a sane scale, the same for the same seed
    planted.py   a T3 that says given speech tokens, whatever the text and the voice
    files.py     the folder: weights, conds.pt, tokenizer files; and upstream's modules loaded from it
"""

from engine.random_checkpoint.files import UpstreamModels, load_upstream, write_checkpoint
from engine.random_checkpoint.modules import (
    Size,
    build_upstream_s3gen,
    build_upstream_t3,
    build_upstream_voice_encoder,
    t3_config,
)
from engine.random_checkpoint.planted import PlantedSpeech

__all__ = [
    "PlantedSpeech",
    "Size",
    "UpstreamModels",
    "build_upstream_s3gen",
    "build_upstream_t3",
    "build_upstream_voice_encoder",
    "load_upstream",
    "t3_config",
    "write_checkpoint",
]
