"""The model catalogue: counts against those published and transformers' classes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from profiles.attention_spec import RopeScaling, SlidingWindow
from profiles.catalogue import list_catalogue, resolve_model
from profiles.experts_spec import Experts
from profiles.model import Segment
from tests.transformers_models import transformers_model

from .plans import tiny_llama

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


def half_a_digit(text: str) -> tuple[float, float]:
    """The published number and half of its last digit."""
    digits = text.rstrip("MB")
    unit = {"M": 1e6, "B": 1e9}.get(text[-1], 1.0)
    return float(digits) * unit, 0.5 * unit * 10.0 ** -len(digits.partition(".")[2])


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
