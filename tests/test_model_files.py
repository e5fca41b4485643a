"""Models in files: they survive them, and what contradicts itself is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from profiles.catalogue import resolve_model
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import Reader, dump_yaml, parse_yaml
from tests.test_model_features import UNTRAINED
from tests.test_model_flops import TINY

from .plans import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("spec", [*TINY, *map(resolve_model, sorted(UNTRAINED))], ids=lambda spec: spec.name)
def test_a_model_survives_a_plan_file(spec: ModelSpec) -> None:
    document = parse_yaml(dump_yaml(spec.to_dict()), "plan.yaml")
    assert ModelSpec.from_dict(Reader(document, source="plan.yaml")) == spec


def test_a_file_from_before_these_keys_is_the_same_model() -> None:
    keys = [*tiny_llama().to_dict()]
    newer = keys[keys.index("tied_embeddings") + 1 :]
    assert len(newer) == 16
    old = {key: value for key, value in tiny_gpt2().to_dict().items() if key not in newer}
    assert ModelSpec.from_dict(Reader(old, source="m.yaml")) == tiny_gpt2()


EXPERTS = {"number": 8, "top_k": 2, "ffn_hidden_size": 64}
MLA = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_positions": 16}
LLAMA3 = {"factor": 8, "low_frequency_factor": 1, "high_frequency_factor": 4, "original_max_positions": 16}
OWN_HEADS = {"kv_heads": 4, "latent_attention": MLA}


@pytest.mark.parametrize(
    ("changes", "key", "expected", "got"),
    [
        ({"experts": 8}, "experts", "a mapping of keys to values", "8"),
        ({"experts": EXPERTS | {"number": 1}}, "experts.number", "a whole number >= 2", "1"),
        ({"experts": EXPERTS | {"top_k": 9}}, "experts.top_k", "at most number = 8", "9"),
        ({"experts": EXPERTS | {"dense_layers": 4}}, "experts.dense_layers", "fewer than layers = 4", "4"),
        ({"experts": EXPERTS | {"every": 0}}, "experts.every", "a whole number >= 1", "0"),
        (
            {"experts": EXPERTS | {"dense_layers": 1, "every": 4}},
            "experts.every",
            "at most the 3 layers after the first dense ones",
            "4",
        ),
        ({"experts": EXPERTS | {"groups": 3}}, "experts.groups", "a divisor of number = 8", "3"),
        ({"experts": EXPERTS | {"groups": 4, "top_groups": 5}}, "experts.top_groups", "at most groups = 4", "5"),
        (
            {"experts": EXPERTS | {"groups": 4, "top_k": 3}},
            "experts.top_k",
            "at most the 2 experts of top_groups = 1",
            "3",
        ),
        ({"experts": EXPERTS | {"router_scale": 0}}, "experts.router_scale", "a finite number > 0", "0"),
        ({"experts": EXPERTS | {"normalize_top_k": 1}}, "experts.normalize_top_k", "true or false", "1"),
        (
            {"rope_stretch": YARN | {"kind": "ntk"}},
            "rope_stretch.kind",
            "one of yarn, linear, dynamic, longrope",
            "'ntk'",
        ),
        ({"rope_stretch": YARN | {"factor": 0}}, "rope_stretch.factor", "a finite number > 0", "0"),
        (
            {"rope_stretch": YARN | {"original_max_positions": 0}},
            "rope_stretch.original_max_positions",
            "a whole number >= 1",
            "0",
        ),
        ({"rope_stretch": YARN, "positions": "learned"}, "rope_stretch", "none, since positions = learned", "'yarn'"),
        (
            {"rope_stretch": YARN, "rope_scaling": LLAMA3},
            "rope_stretch",
            "none, since there is a rope_scaling",
            "'yarn'",
        ),
        (
            {"experts": EXPERTS | {"shared_ffn_hidden_size": 4}},
            "experts.shared_ffn_hidden_size",
            "no width, since shared = 0",
            "4",
        ),
        ({"experts": EXPERTS | {"router_score": "top"}}, "experts.router_score", "one of softmax, sigmoid", "'top'"),
        ({"experts": EXPERTS | {"expert_bias": 1}}, "experts.expert_bias", "true or false", "1"),
        (
            {"experts": EXPERTS | {"ffn_hidden_size": 24}},
            "ffn_hidden_size",
            "that of the experts, 24, since no layer is dense",
            "64",
        ),
        ({"latent_attention": MLA}, "kv_heads", "4, as latent_attention has it", "2"),
        (OWN_HEADS | {"head_dim": 16}, "head_dim", "8, as latent_attention has it", "16"),
        (OWN_HEADS | {"positions": "learned"}, "positions", "rope, as latent_attention has it", "'learned'"),
        (OWN_HEADS | {"qk_norm": True}, "qk_norm", "false, as latent_attention has it", "True"),
        (
            {"latent_attention": MLA | {"qk_rope_head_dim": 3}},
            "latent_attention.qk_rope_head_dim",
            "an even number, since RoPE turns pairs",
            "3",
        ),
        ({"latent_attention": MLA | {"q_lora_rank": 0}}, "latent_attention.q_lora_rank", "a whole number >= 1", "0"),
        ({"sliding_window": {"length": 0}}, "sliding_window.length", "a whole number >= 1", "0"),
        ({"sliding_window": {"length": 9, "full_every": 1}}, "sliding_window.full_every", "a whole number >= 2", "1"),
        (
            {"rotary_fraction": 0.4},
            "rotary_fraction",
            "an even number of the 8 elements of a head, since RoPE turns pairs",
            "0.4",
        ),
        ({"rotary_fraction": 0.5, "positions": "alibi"}, "rotary_fraction", "1, since positions = alibi", "0.5"),
        ({"position_offset": 2}, "position_offset", "0, since positions = rope", "2"),
        ({"norm_placement": "middle"}, "norm_placement", "one of pre, post", "'middle'"),
        ({"token_types": -1}, "token_types", "a whole number >= 0", "-1"),
    ],
)
def test_contradictions_carry_their_key(changes: dict[str, Any], key: str, expected: str, got: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_dict(Reader(tiny_llama().to_dict() | changes, source="m.yaml"))
    assert (caught.value.where, caught.value.expected, caught.value.got) == (f"m.yaml: {key}", expected, got)


def test_an_unknown_key_of_a_part_is_named() -> None:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_dict(Reader(tiny_llama().to_dict() | {"experts": EXPERTS | {"topk": 2}}, source="m.yaml"))
    assert (caught.value.what, caught.value.hint) == ("unknown key experts.topk", "is 'top_k' meant?")
