"""Our modules: as many parameters as ModelSpec counts, their names, their first values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from planner.plan import Stage
from profiles.model import ModelSpec, RopeScaling
from runtime.parameters import initialise, named_parameters
from runtime.transformer import build_chunk
from tests.plans import tiny_gpt2, tiny_llama

SCALING = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=16)
LLAMA = tiny_llama()
LLAMA_SCALED = replace(LLAMA, name="tiny-llama-3.1", rope_scaling=SCALING, rope_theta=50.0)
QWEN2 = tiny_llama(name="tiny-qwen2", family="qwen2", qkv_bias=True, tied_embeddings=True, rope_theta=1e6)
MISTRAL = tiny_llama(name="tiny-mistral", family="mistral", rope_theta=1e6)  # of version 0.2 on: no window
GPT2 = tiny_gpt2(max_positions=40)
GELU = tiny_llama(name="tiny-gelu", activation="gelu", mlp_bias=True, head_dim=16)
MODELS = {model.name: model for model in (LLAMA, LLAMA_SCALED, QWEN2, MISTRAL, GPT2, GELU)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_parameters_are_as_many_as_the_spec_says(model: ModelSpec) -> None:
    chunk = build_chunk(model, Stage.whole(model))
    assert all(parameter.is_meta for parameter in chunk.parameters())
    assert sum(parameter.numel() for parameter in chunk.parameters()) == model.parameters


def test_names_are_those_of_the_whole_model_on_every_stage() -> None:
    def stage(first: int, end: int, embedding: bool, head: bool) -> Stage:
        return replace(
            Stage.whole(GPT2), first=first, end=end, embedding=embedding, head=head, recompute_none=end - first
        )

    parts = [stage(0, 0, True, False), stage(0, 3, False, False), stage(3, 4, False, True)]
    names = [name for part in parts for name, _ in named_parameters([build_chunk(GPT2, part)])]
    expected = [name for name, _ in named_parameters([build_chunk(GPT2, Stage.whole(GPT2))])]
    assert names[-1] == "embedding.tokens.weight"  # the head's copy goes by the name of what it is a copy of
    assert names[:-1] == expected


def test_first_values_depend_on_seed_and_name_only() -> None:
    def first(seed: int) -> dict[str, torch.Tensor]:
        chunk = build_chunk(GPT2, Stage.whole(GPT2)).to_empty(device="cpu")
        chunk.tie()
        initialise([chunk], layers=GPT2.layers, seed=seed)
        return {name: parameter.detach() for name, parameter in named_parameters([chunk])}

    values, again, other = first(3), first(3), first(4)
    assert all(torch.equal(values[name], again[name]) for name in values)
    assert not torch.equal(values["blocks.1.mlp.w1.weight"], other["blocks.1.mlp.w1.weight"])
    assert not torch.equal(values["blocks.1.mlp.w1.weight"], values["blocks.2.mlp.w1.weight"])
    assert values["blocks.1.mlp.w1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert values["blocks.1.attention.wo.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert values["blocks.1.attention_norm.weight"].eq(1.0).all()
    assert values["blocks.1.attention_norm.bias"].eq(0.0).all()
