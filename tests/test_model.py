"""ModelSpec of dense decoders against transformers' models and torch's FLOP counter; names and files of models."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from profiles.catalogue import list_catalogue, resolve_model
from profiles.input_error import InputError
from profiles.model import SCHEMA, ModelSpec, load_model_file
from profiles.store import Reader, dump_yaml

from .plans import tiny_gpt2, tiny_llama
from .transformers_models import transformers_model

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
        ("zzz", "cli.py profile --list shows the catalogue"),
        ("", "cli.py profile --list shows the catalogue"),
        ("../models/demo", "is demo meant?"),
        pytest.param("x" * 5000, "cli.py profile --list shows the catalogue", id="longer than a file name may be"),
    ],
)
def test_an_unknown_name_gives_the_list_and_the_near_match(text: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(text)
    assert caught.value.what == f"{text!r} is neither in the catalogue nor a file that can be read"
    assert (caught.value.where, caught.value.hint) == ("--model", hint)
    names = ", ".join(list_catalogue("models"))
    files = "a Hugging Face folder or config.json, a .yaml file, or package.module:factory"
    assert caught.value.expected == f"one of {names}; or {files}"


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
        ({"activation": "selu"}, "activation", "one of swiglu, gelu, gelu_tanh, relu, clamped_swiglu", "'selu'"),
        ({"positions": "sinusoidal"}, "positions", "one of rope, learned, alibi", "'sinusoidal'"),
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


def test_the_examples_bert_is_one_of_bytes() -> None:
    model = load_model_file(Path(__file__).parents[1] / "examples" / "small_bert.yaml")
    held = sum(parameter.numel() for parameter in transformers_model(model).parameters())
    assert (model.bidirectional, model.vocab_size, model.parameters) == (True, 257, held)
