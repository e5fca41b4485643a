"""The model catalogue: counts against those published and transformers' classes; what no runtime of ours trains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import cli
from planner.capabilities import FEATURES, missing_features
from planner.errors import UnsupportedError
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.question import ask
from planner.rules import RuleContext, violations
from planner.search import check_supported, search
from planner.space import enumerate_layouts
from profiles.attention_spec import LatentAttention, RopeScaling, SlidingWindow
from profiles.catalogue import list_catalogue, resolve_model
from profiles.experts_spec import Experts
from profiles.input_error import InputError
from profiles.model import ModelSpec, Segment
from profiles.store import Reader, dump_yaml, parse_yaml

from .plans import make_plan, tiny_bert, tiny_gpt2, tiny_llama, tiny_megatron_bert

# Our count, and the one that authors or model cards state, with as many digits as they give.
PARAMETERS: dict[str, tuple[int, str]] = {
    "bert-large": (335_174_458, "335M"),
    "bloom-176b": (176_247_271_424, "176247271424"),
    "deepseek-v2": (235_741_434_880, "236B"),
    "deepseek-v3": (671_026_404_352, "671B"),
    "gpt-1t": (1_008_038_758_400, "1008.0B"),
    "gpt-neox-20b": (20_554_567_680, "20554567680"),
    "gpt-oss-120b": (116_829_156_672, "116.83B"),
    "gpt2": (124_439_808, "124M"),
    "gpt2-large": (774_030_080, "774M"),
    "gpt2-medium": (354_823_168, "355M"),
    "gpt2-xl": (1_557_611_200, "1558M"),
    "gpt3-175b": (174_615_846_912, "175B"),
    "llama-3.2-1b": (1_235_814_400, "1.24B"),
    "llama-3.2-3b": (3_212_749_824, "3.21B"),
    "llama2-7b": (6_738_415_616, "6.74B"),
    "llama2-13b": (13_015_864_320, "13.0B"),
    "llama2-70b": (68_976_648_192, "69.0B"),
    "llama3-8b": (8_030_261_248, "8.03B"),
    "llama3-70b": (70_553_706_496, "70.6B"),
    "llama3-405b": (405_853_388_800, "406B"),
    "megatron-bert-3.9b": (3_863_027_200, "3.9B"),
    "megatron-gpt2-8.3b": (8_317_040_640, "8.3B"),
    "mistral-7b": (7_241_732_096, "7.24B"),
    "mixtral-8x7b": (46_702_792_704, "46.7B"),
    "mixtral-8x22b": (140_620_634_112, "141B"),
    "mt-nlg-530b": (529_600_819_200, "530B"),
    "opt-175b": (174_604_468_224, "175B"),
    "qwen2.5-7b": (7_615_616_512, "7.62B"),
    "qwen3-8b": (8_190_735_360, "8.2B"),
    "qwen3-30b-a3b": (30_532_122_624, "30.5B"),
    "qwen3-235b-a22b": (235_093_634_560, "235B"),
    "smollm2-135m": (134_515_008, "135M"),
}

# Active parameters as published, and whether that number counts the embedding's matrix.
ACTIVE_PARAMETERS: dict[str, tuple[str, bool]] = {
    "mixtral-8x7b": ("12.9B", True),
    "mixtral-8x22b": ("39B", True),
    "qwen3-30b-a3b": ("3.3B", True),
    "qwen3-235b-a22b": ("22B", True),
    "deepseek-v2": ("21B", False),
    "deepseek-v3": ("36.6B", False),
    "gpt-oss-120b": ("5.13B", False),
}

UNTRAINED = {name for name in PARAMETERS if resolve_model(name).features}


def half_a_digit(text: str) -> tuple[float, float]:
    """The published number and half of its last digit."""
    digits = text.rstrip("MB")
    unit = {"M": 1e6, "B": 1e9}.get(text[-1], 1.0)
    return float(digits) * unit, 0.5 * unit * 10.0 ** -len(digits.partition(".")[2])


# ---- transformers --------------------------------------------------------------------------------------------


def _rotary(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
    }


def _llama(spec: ModelSpec) -> dict[str, Any]:
    return _rotary(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _routed(spec: ModelSpec, number: str) -> dict[str, Any]:
    assert spec.experts is not None
    return {number: spec.experts.number, "num_experts_per_tok": spec.experts.top_k}


def _mixtral(spec: ModelSpec) -> dict[str, Any]:
    return _rotary(spec) | _routed(spec, "num_local_experts")


def _qwen3_moe(spec: ModelSpec) -> dict[str, Any]:
    assert spec.experts is not None
    width = {"moe_intermediate_size": spec.experts.ffn_hidden_size}
    return _rotary(spec) | width | {"decoder_sparse_step": spec.experts.every} | _routed(spec, "num_experts")


def _gpt_oss(spec: ModelSpec) -> dict[str, Any]:
    assert spec.sliding_window is not None
    window = {"sliding_window": spec.sliding_window.length, "attention_bias": spec.qkv_bias}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta}}
    return _rotary(spec) | window | rope | _routed(spec, "num_local_experts")


def _deepseek(spec: ModelSpec) -> dict[str, Any]:
    latent, experts = spec.latent_attention, spec.experts
    assert latent is not None
    assert experts is not None
    widths = {key: value for key, value in _rotary(spec).items() if key != "head_dim"}
    return widths | {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "n_routed_experts": experts.number,
        "n_shared_experts": experts.shared,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "first_k_dense_replace": experts.dense_layers,
        "n_group": 1,
        "topk_group": 1,
    }


def _bert(spec: ModelSpec) -> dict[str, Any]:
    not_his = ("head_dim", "num_key_value_heads")
    return {k: v for k, v in _rotary(spec).items() if k not in not_his} | {"type_vocab_size": spec.token_types}


def _gpt_neox(spec: ModelSpec) -> dict[str, Any]:
    widths = {k: v for k, v in _rotary(spec).items() if k not in ("head_dim", "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta, "partial_rotary_factor": spec.rotary_fraction}
    return widths | {"rope_parameters": rope, "use_parallel_residual": spec.parallel_residual}


def _opt(spec: ModelSpec) -> dict[str, Any]:
    not_his = ("head_dim", "num_key_value_heads", "intermediate_size")
    widths = {k: v for k, v in _rotary(spec).items() if k not in not_his}
    return widths | {"ffn_dim": spec.ffn_hidden_size, "word_embed_proj_dim": spec.hidden_size}


def _bloom(spec: ModelSpec) -> dict[str, Any]:
    assert spec.ffn_hidden_size == 4 * spec.hidden_size
    return {
        "hidden_size": spec.hidden_size,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_embd": spec.hidden_size,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn_hidden_size,
        "n_positions": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }


# family -> transformers' config class, model class, and the config's arguments.
FAMILIES: dict[str, tuple[str, str, Callable[[ModelSpec], dict[str, Any]]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _bert),
    "bloom": ("BloomConfig", "BloomForCausalLM", _bloom),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _deepseek),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _deepseek),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _gpt2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _gpt_neox),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", _gpt_oss),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _llama),
    "megatron-bert": ("MegatronBertConfig", "MegatronBertForMaskedLM", _bert),
    "mistral": ("MistralConfig", "MistralForCausalLM", _rotary),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _mixtral),
    "opt": ("OPTConfig", "OPTForCausalLM", _opt),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _rotary),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _rotary),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _qwen3_moe),
}


def transformers_model(spec: ModelSpec, **extra: Any) -> PreTrainedModel:
    """The same architecture as transformers builds it, on the device of the context."""
    config, model, arguments = FAMILIES[spec.family]
    if spec.next_sentence_head:
        model = model.replace("ForMaskedLM", "ForPreTraining")
    return getattr(transformers, model)(getattr(transformers, config)(**arguments(spec), **extra))


# ---- counts --------------------------------------------------------------------------------------------------


def test_the_catalogue_holds_every_published_model_and_the_demo() -> None:
    assert set(list_catalogue("models")) == {*PARAMETERS, "demo"}


@pytest.mark.parametrize(("name", "counts"), PARAMETERS.items(), ids=list(PARAMETERS))
def test_parameters_are_the_published_ones(name: str, counts: tuple[int, str]) -> None:
    ours, published = counts
    spec = resolve_model(name)
    assert spec.name == name
    assert spec.parameters == ours
    number, tolerance = half_a_digit(published)
    assert abs(ours - number) <= tolerance


@pytest.mark.parametrize("name", [*PARAMETERS, "demo"])
def test_parameters_are_those_of_the_model_transformers_builds(name: str) -> None:
    spec = resolve_model(name)
    with torch.device("meta"):
        model = transformers_model(spec)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "published"), ACTIVE_PARAMETERS.items(), ids=list(ACTIVE_PARAMETERS))
def test_active_parameters_are_the_published_ones(name: str, published: tuple[str, bool]) -> None:
    text, with_embedding = published
    spec = resolve_model(name)
    active = spec.active_parameters - (0 if with_embedding else spec.embedding_parameters)
    number, half = half_a_digit(text)
    assert number - half <= active < number + 2 * half  # rounded, or cut off as Qwen's 3.353


def test_every_model_with_experts_has_its_active_count_here() -> None:
    assert {name for name in PARAMETERS if resolve_model(name).experts} == set(ACTIVE_PARAMETERS)
    assert resolve_model("llama3-8b").active_parameters == resolve_model("llama3-8b").parameters


def test_the_chain_of_layers() -> None:
    assert resolve_model("deepseek-v3").segments == (Segment("dense", 3), Segment("experts", 58))
    assert resolve_model("mixtral-8x7b").segments == (Segment("experts", 32),)
    assert resolve_model("gpt-oss-120b").segments == (Segment("experts", 36),)
    assert resolve_model("llama3-8b").segments == (Segment("dense", 32),)
    spec = resolve_model("deepseek-v2")
    chain = spec.layer_parameters("dense") + 59 * spec.layer_parameters("experts")
    assert spec.parameters == spec.embedding_parameters + chain + spec.head_parameters
    assert spec.layer_parameters("dense") == spec.block_parameters


def test_experts_in_every_second_layer_after_the_first_dense_ones() -> None:
    experts = Experts(number=4, top_k=2, ffn_hidden_size=8, dense_layers=1, every=2)
    spec = tiny_llama(layers=6, experts=experts)
    assert [experts.in_layer(i) for i in range(6)] == [False, False, True, False, True, False]
    assert spec.segments == (
        *(Segment("dense", 2), Segment("experts", 1), Segment("dense", 1), Segment("experts", 1), Segment("dense", 1)),
    )
    chain = 4 * spec.layer_parameters("dense") + 2 * spec.layer_parameters("experts")
    assert spec.parameters == spec.embedding_parameters + chain + spec.head_parameters
    assert spec.parameters - spec.active_parameters == 2 * (4 - 2) * 3 * 32 * 8  # layers, idle experts, matrices


def test_how_the_routers_differ() -> None:
    parts = {name: resolve_model(name).experts for name in ACTIVE_PARAMETERS}
    routers = {
        name: (part.normalize_top_k, part.router_scale, part.groups, part.top_groups)
        for name, part in parts.items()
        if part is not None
    }
    plain = dict.fromkeys(ACTIVE_PARAMETERS, (True, 1.0, 1, 1))
    assert routers == plain | {"deepseek-v2": (False, 16.0, 8, 3), "deepseek-v3": (True, 2.5, 8, 4)}


def test_a_selection_bias_is_a_buffer_and_counts_nowhere() -> None:
    spec = replace(resolve_model("deepseek-v3"), layers=5)  # 3 of them dense
    with torch.device("meta"):
        model = transformers_model(spec)
    buffers = {name: buffer.numel() for name, buffer in model.named_buffers() if "e_score_correction_bias" in name}
    assert list(buffers.values()) == [256, 256]
    assert spec.experts is not None
    without = replace(spec, experts=replace(spec.experts, selection_bias=False))
    assert without.parameters == spec.parameters


def test_what_a_parameter_count_cannot_show() -> None:
    assert resolve_model("megatron-gpt2-8.3b").head_dim == 96  # 32 heads, as in the scaling study
    assert resolve_model("gpt3-175b").head_dim == 128
    assert resolve_model("gpt2-xl").heads == 25
    assert resolve_model("llama2-70b").kv_heads == resolve_model("llama3-8b").kv_heads == 8
    assert (resolve_model("llama2-7b").rope_theta, resolve_model("llama2-7b").max_positions) == (10000.0, 4096)
    assert (resolve_model("llama3-8b").rope_theta, resolve_model("llama3-8b").max_positions) == (500000.0, 8192)
    assert (resolve_model("qwen2.5-7b").norm_epsilon, resolve_model("qwen2.5-7b").rope_theta) == (1e-6, 1e6)
    assert resolve_model("llama3-8b").rope_scaling is None
    stretched = RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=8192
    )
    assert resolve_model("llama3-405b").rope_scaling == stretched
    assert resolve_model("llama-3.2-1b").rope_scaling == replace(stretched, factor=32.0)


def test_what_tells_the_other_decoders_apart() -> None:
    assert resolve_model("mistral-7b").sliding_window == SlidingWindow(length=4096)
    assert resolve_model("gpt-oss-120b").sliding_window == SlidingWindow(length=128, full_every=2)
    assert resolve_model("mixtral-8x7b").sliding_window is None
    assert resolve_model("gpt-neox-20b").rotary_fraction == 0.25
    assert resolve_model("deepseek-v3").head_dim == 192
    experts = {name: resolve_model(name).experts for name in ACTIVE_PARAMETERS}
    scores = {name: part.router_score for name, part in experts.items() if part is not None}
    assert scores == dict.fromkeys(ACTIVE_PARAMETERS, "softmax") | {"deepseek-v3": "sigmoid"}
    # The layers with the window, as transformers lays them out.
    config = transformers.GptOssConfig(num_hidden_layers=36)
    window = resolve_model("gpt-oss-120b").sliding_window
    assert window is not None
    assert config.layer_types is not None
    assert config.layer_types[0] == "sliding_attention"
    assert config.layer_types.count("sliding_attention") == window.windowed_layers(36) == 18


def test_a_catalogue_file_says_where_its_numbers_are_from() -> None:
    catalog = Path(sys.modules["profiles.catalogue"].__file__ or "").parent / "catalog" / "models"
    for name in list_catalogue("models"):
        assert (catalog / f"{name}.yaml").read_text(encoding="utf-8").startswith("# Source: "), name


# ---- FLOPs ---------------------------------------------------------------------------------------------------

LATENT = LatentAttention(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7)


def tiny_mixture(family: str = "mixtral", **changes: Any) -> ModelSpec:
    experts = Experts(number=3, top_k=2, ffn_hidden_size=24)
    return tiny_llama(family=family, layers=2, **({"ffn_hidden_size": 24, "experts": experts} | changes))


def tiny_deepseek(family: str, **latent: Any) -> ModelSpec:
    return tiny_llama(
        family=family,
        layers=2,
        kv_heads=4,
        head_dim=10,
        latent_attention=replace(LATENT, **latent),
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, shared=2, dense_layers=1),
    )


TINY = [
    tiny_llama(family="qwen3", layers=2, qk_norm=True),
    tiny_llama(family="mistral", layers=2, sliding_window=SlidingWindow(length=64)),
    tiny_mixture(),
    tiny_mixture("qwen3_moe", qk_norm=True),
    replace(
        tiny_mixture("qwen3_moe", qk_norm=True, ffn_hidden_size=40),
        layers=5,
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, every=2),
    ),
    tiny_deepseek("deepseek_v3"),
    tiny_deepseek("deepseek_v2"),
    tiny_deepseek("deepseek_v2", q_lora_rank=None),
    tiny_mixture(
        "gpt_oss",
        qkv_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        activation="clamped_swiglu",
        sliding_window=SlidingWindow(length=64, full_every=2),
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, router_bias=True, expert_bias=True),
    ),
    tiny_bert(layers=2),
    tiny_megatron_bert(layers=2),
    tiny_bert(layers=2, next_sentence_head=True),
    tiny_megatron_bert(layers=2, next_sentence_head=True),
    tiny_gpt2(
        family="gpt_neox",
        layers=2,
        positions="rope",
        rotary_fraction=0.5,
        parallel_residual=True,
        tied_embeddings=False,
    ),
    tiny_gpt2(family="opt", layers=2, activation="relu", position_offset=2),
    tiny_gpt2(family="bloom", layers=2, positions="alibi", embedding_norm=True, ffn_hidden_size=128),
]


@pytest.mark.parametrize("spec", TINY, ids=[f"{i}-{spec.family}" for i, spec in enumerate(TINY)])
def test_parameters_and_step_flops_of_a_small_one_are_what_torch_counts(spec: ModelSpec) -> None:
    """Attention in plain matmuls and experts in a loop, so that the counter sees each product."""
    batch, sequence = 2, 8
    extra = {"experts_implementation": "eager"} if spec.experts else {}
    model = transformers_model(spec, attn_implementation="eager", **extra)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.arange(batch * sequence).reshape(batch, sequence) % spec.vocab_size
    with FlopCounterMode(display=False) as counter:
        if spec.next_sentence_head:
            model(input_ids=tokens, labels=tokens, next_sentence_label=torch.zeros(batch).long()).loss.backward()
        else:
            model(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == spec.step_flops(batch, sequence)


def test_a_window_cuts_the_attention_of_its_layers() -> None:
    full = tiny_llama(layers=5)
    windowed = replace(full, sliding_window=SlidingWindow(length=8, full_every=2))
    saved = full.step_flops(4, 32) - windowed.step_flops(4, 32)
    assert saved == 12.0 * full.query_width * 3 * (32 - 8) * 4 * 32  # 3 of 5 layers, 4 sequences of 32 tokens
    assert windowed.step_flops(4, 8) == full.step_flops(4, 8)


# ---- files ---------------------------------------------------------------------------------------------------


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
YARN = {"kind": "yarn", "factor": 4.0}
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


# ---- who trains what -----------------------------------------------------------------------------------------


def test_every_feature_has_its_row_in_the_table() -> None:
    others = {"linearly stretched positions", "dynamically stretched positions", "LongRoPE positions"}
    others |= {"next-sentence head", "a module of its own"}
    used = {feature for name in UNTRAINED for feature in resolve_model(name).features}
    assert used | others == set(FEATURES)  # of the catalogue's models no one uses these
    assert not used & others


def test_what_meshwright_trains_has_no_features() -> None:
    assert {
        *("mistral-7b", "qwen3-8b", "gpt-neox-20b", "mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b"),
        *("qwen3-235b-a22b", "deepseek-v2", "deepseek-v3", "gpt-oss-120b", "bert-large", "megatron-bert-3.9b"),
        *("opt-175b", "bloom-176b"),
    } == UNTRAINED
    assert {name for name in UNTRAINED if missing_features(resolve_model(name), "megatron")} == {
        *("gpt-neox-20b", "opt-175b", "bloom-176b"),
    }


REFUSALS = {
    "deepseek-v3": ("meshwright cannot train YaRN positions yet", "megatron can: --target megatron"),
    "bloom-176b": (
        "meshwright cannot train ALiBi positions and embedding norm yet",
        "nor does Megatron-LM train bloom-176b: it lacks ALiBi positions and embedding norm",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_search_refuses_what_meshwright_cannot_train(name: str) -> None:
    question = ask(name, "dgx-a100:2", 64, 512)
    for refuse in (search, check_supported):
        with pytest.raises(UnsupportedError) as caught:
            refuse(question)
        assert (caught.value.what, caught.value.lines) == (REFUSALS[name][0], (REFUSALS[name][1],))


@pytest.mark.parametrize("verb", ["plan", "estimate"])
@pytest.mark.parametrize("name", REFUSALS)
def test_the_command_line_refuses_it_with_exit_code_1(
    verb: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [verb, "--model", name, "--cluster", "dgx-a100:2", "--global-batch", "64", "--seq", "512"]
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments, *(["--layout", "tp=8"] if verb == "estimate" else [])])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (1, "")
    assert " ".join(captured.err.split()) == " ".join(REFUSALS[name])


def test_no_layout_of_such_a_model_is_legal_and_no_plan_file_of_one_is_read() -> None:
    job = TrainingJob(global_batch=4, sequence=16)
    reason = "tiny-llama: the meshwright runtime does not train sliding-window attention today; megatron can"
    spec = tiny_llama(sliding_window=SlidingWindow(length=8))
    assert violations(Layout(dp=2), RuleContext(spec, job, 2)) == (reason,)
    assert list(enumerate_layouts(RuleContext(spec, job, 2))) == []
    document = make_plan(tiny_llama(), Layout(dp=2), job).to_dict()
    del document["schema"]
    assert Plan.from_dict(Reader(document, source="plan.yaml")).model == tiny_llama()
    document["model"]["sliding_window"] = spec.to_dict()["sliding_window"]
    with pytest.raises(InputError) as caught:
        Plan.from_dict(Reader(document, source="plan.yaml"))
    assert (caught.value.where, reason in caught.value.got) == ("plan.yaml: layout", True)
