"""ModelSpec and the model catalogue against transformers' models, torch's FLOP counter and published counts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from profiles.catalogue import list_catalogue, resolve_model
from profiles.input_error import InputError
from profiles.model import SCHEMA, ModelSpec, RopeScaling, load_model_file
from profiles.store import Reader, dump_yaml

from .plans import tiny_gpt2, tiny_llama

# Parameters as their authors or model cards state them.
PUBLISHED_PARAMETERS = {
    "gpt2": 124.4e6,
    "gpt2-medium": 354.8e6,
    "gpt2-large": 774.0e6,
    "gpt2-xl": 1557.6e6,
    "megatron-gpt2-8.3b": 8.3e9,
    "gpt3-175b": 175e9,
    "llama2-7b": 6.74e9,
    "llama2-13b": 13.02e9,
    "llama2-70b": 68.98e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9,
    "llama3-405b": 405.85e9,
    "qwen2.5-7b": 7.62e9,
}


def transformers_model(spec: ModelSpec, **extra: Any) -> PreTrainedModel:
    """The same architecture as transformers builds it, on the device of the context."""
    if spec.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=spec.hidden_size,
                n_layer=spec.layers,
                n_head=spec.heads,
                n_inner=spec.ffn_hidden_size,
                n_positions=spec.max_positions,
                vocab_size=spec.vocab_size,
                tie_word_embeddings=spec.tied_embeddings,
                **extra,
            )
        )
    rotary: dict[str, Any] = {
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
    if spec.family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**rotary, **extra))
    biases = {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    return LlamaForCausalLM(LlamaConfig(**rotary, **biases, **extra))


# ---- the catalogue ---------------------------------------------------------------------------------------


def test_the_catalogue_holds_every_published_model_and_the_demo() -> None:
    assert set(list_catalogue("models")) == {*PUBLISHED_PARAMETERS, "demo"}


@pytest.mark.parametrize("name", [*PUBLISHED_PARAMETERS, "demo"])
def test_catalogue_parameters_are_those_of_the_model_transformers_builds(name: str) -> None:
    spec = resolve_model(name)
    with torch.device("meta"):
        model = transformers_model(spec)
    assert spec.name == name
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMETERS.items())
def test_catalogue_parameters_are_the_published_ones(name: str, published: float) -> None:
    assert resolve_model(name).parameters == pytest.approx(published, rel=0.005)


def test_what_a_parameter_count_cannot_show() -> None:
    assert resolve_model("megatron-gpt2-8.3b").head_dim == 96  # 32 heads, as in the scaling study
    assert resolve_model("gpt3-175b").head_dim == 128
    assert resolve_model("gpt2-xl").heads == 25
    assert resolve_model("llama2-70b").kv_heads == resolve_model("llama3-8b").kv_heads == 8
    assert (resolve_model("llama2-7b").rope_theta, resolve_model("llama2-7b").max_positions) == (10000.0, 4096)
    assert (resolve_model("llama3-8b").rope_theta, resolve_model("llama3-8b").max_positions) == (500000.0, 8192)
    assert resolve_model("llama3-8b").rope_scaling is None
    assert resolve_model("llama3-405b").rope_scaling == RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=8192
    )
    assert (resolve_model("qwen2.5-7b").norm_epsilon, resolve_model("qwen2.5-7b").rope_theta) == (1e-6, 1e6)


def test_a_catalogue_file_says_where_its_numbers_are_from() -> None:
    catalog = Path(sys.modules["profiles.catalogue"].__file__ or "").parent / "catalog" / "models"
    for name in list_catalogue("models"):
        assert (catalog / f"{name}.yaml").read_text(encoding="utf-8").startswith("# Source: "), name


# ---- names -----------------------------------------------------------------------------------------------


def test_a_model_file_a_folder_and_a_config_json_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_yaml({"schema": SCHEMA, **tiny_llama(name="mine").to_dict()}), encoding="utf-8")
    assert resolve_model(str(file)) == tiny_llama(name="mine")
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert resolve_model(str(folder)) == resolve_model(str(folder / "config.json"))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("gpt2").family == "gpt2"  # the catalogue outranks the folder
    assert resolve_model("./gpt2").family == "llama"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("llama3-8", "is llama3-8b meant?"),
        ("GPT3-175B", "is gpt3-175b meant?"),
        ("meta-llama/Llama-2-7b-hf", "is llama2-7b meant?"),
        ("zzz", ""),
        ("", ""),
        ("../models/demo", "is demo meant?"),
        pytest.param("x" * 5000, "", id="longer than a file name may be"),
    ],
)
def test_an_unknown_name_gives_the_list_and_the_near_match(text: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(text)
    assert caught.value.what == f"{text!r} is neither in the catalogue nor a file that can be read"
    assert (caught.value.where, caught.value.hint) == ("--model", hint)
    names = ", ".join(list_catalogue("models"))
    assert caught.value.expected == f"one of {names}; or a Hugging Face folder or config.json, or a .yaml file"


@pytest.mark.parametrize("text", ["nosuch.yaml", "nosuch/config.json"])
def test_a_path_that_does_not_exist_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"{text} does not exist"):
        resolve_model(text)


def test_a_lookup_imports_neither_torch_nor_networkx() -> None:
    code = (
        "import sys; from profiles.catalogue import resolve_cluster, resolve_model;"
        "resolve_model('gpt3-175b'); resolve_cluster('dgx-a100:4');"
        "print(sorted({'torch', 'networkx', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        tiny_llama(),
        tiny_llama(head_dim=12),
        tiny_llama(qkv_bias=True, attention_output_bias=True),
        tiny_llama(mlp_bias=True),
        tiny_llama(family="qwen2", qkv_bias=True, tied_embeddings=True),
        tiny_gpt2(),
        tiny_gpt2(tied_embeddings=False, ffn_hidden_size=100),
    ],
)
def test_parameters_by_part(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = transformers_model(spec)
    blocks = "transformer.h.0." if spec.family == "gpt2" else "model.layers.0."
    block = sum(p.numel() for name, p in model.named_parameters() if name.startswith(blocks))
    embedding = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" in n or "wte" in n or "wpe" in n)
    assert spec.block_parameters == block
    assert spec.embedding_parameters == embedding
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    assert spec.head_parameters == spec.parameters - embedding - spec.layers * block


@pytest.mark.parametrize("spec", [tiny_llama(), tiny_llama(head_dim=12), tiny_gpt2()])
def test_step_flops_are_what_torch_counts(spec: ModelSpec) -> None:
    batch, sequence = 3, 16
    model = transformers_model(spec, attn_implementation="eager")
    tokens = torch.arange(batch * sequence).reshape(batch, sequence) % spec.vocab_size
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == spec.step_flops(batch, sequence)


# ---- files -----------------------------------------------------------------------------------------------


def read(**changes: Any) -> ModelSpec:
    return ModelSpec.from_dict(Reader(tiny_llama().to_dict() | changes, source="m.yaml"))


def test_keys_left_out_follow_from_the_others() -> None:
    given = ("name", "layers", "hidden_size", "ffn_hidden_size", "heads", "vocab_size", "max_positions")
    document = {key: value for key, value in tiny_llama(hidden_size=48).to_dict().items() if key in given}
    spec = ModelSpec.from_dict(Reader(document, source="m.yaml"))
    assert spec == replace(tiny_llama(hidden_size=48), family="custom", kv_heads=4, head_dim=12)


@pytest.mark.parametrize(
    ("changes", "key", "expected", "got"),
    [
        ({"kv_heads": 3}, "kv_heads", "a divisor of heads = 4", "3"),
        ({"head_dim": 7}, "head_dim", "an even number, since RoPE turns pairs", "7"),
        ({"layers": 0}, "layers", "a whole number >= 1", "0"),
        ({"norm": "batchnorm"}, "norm", "one of rmsnorm, layernorm", "'batchnorm'"),
        ({"activation": "relu"}, "activation", "one of swiglu, gelu, gelu_tanh", "'relu'"),
        ({"positions": "alibi"}, "positions", "one of rope, learned", "'alibi'"),
        ({"rope_scaling": 8}, "rope_scaling", "a mapping of keys to values", "8"),
    ],
)
def test_contradictions_carry_their_key(changes: dict[str, Any], key: str, expected: str, got: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert (caught.value.where, caught.value.expected, caught.value.got) == (f"m.yaml: {key}", expected, got)


def test_rope_frequencies_that_are_the_wrong_way_round() -> None:
    scaling = {"factor": 8, "low_frequency_factor": 4, "high_frequency_factor": 4, "original_max_positions": 64}
    with pytest.raises(InputError) as caught:
        read(rope_scaling=scaling)
    assert caught.value.where.endswith(": rope_scaling.high_frequency_factor")
    assert (caught.value.expected, caught.value.got) == ("a number above low_frequency_factor = 4", "4.0")
    assert read(rope_scaling=scaling | {"low_frequency_factor": 1}).rope_scaling is not None


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    document = tiny_llama(hidden_size=34).to_dict()
    del document["head_dim"]
    with pytest.raises(InputError) as caught:
        ModelSpec.from_dict(Reader(document, source="m.yaml"))
    assert caught.value.where == "m.yaml: heads"
    assert caught.value.expected == "a divisor of hidden_size = 34, or an explicit head_dim"
    assert read(hidden_size=34, head_dim=10).query_width == 40


def test_an_odd_head_dim_is_fine_without_rope() -> None:
    assert read(positions="learned", head_dim=7).query_width == 28


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("schema: meshwright.cluster/v1\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_model_file(path)
    assert caught.value.lines() == [
        ("error", "schema has a value that cannot be used"),
        ("where", f"{path}: schema"),
        ("expected", "meshwright.model/v1"),
        ("got", "'meshwright.cluster/v1'"),
        ("try", "is this a model file?"),
    ]
