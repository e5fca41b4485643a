"""Weights in Hugging Face folders: what is found wrong before anything is read, and a run's own folder of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiles.hf_config import read_hf_config
from profiles.hf_writer import write_hf_config
from profiles.input_error import InputError
from profiles.store import load_json
from runtime.hf_files import TensorFiles, keep_description
from runtime.hf_names import Place, places_of
from runtime.hf_weights import check_weights, model_to_start_from
from tests.hf_folders import CONFIGS, make_model, read_whole, require_same_logits

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A family's folder and transformers' model of it, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder, model = tmp_path_factory.mktemp(family), make_model(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return of


def copy_with(folder: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """The folder in one file after `change` on its tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def renamed(tensors: Tensors, name: Callable[[str], str]) -> None:
    for old in list(tensors):
        tensors[name(old)] = tensors.pop(old)


# ---- what is read -------------------------------------------------------------------------------------------


def test_a_part_of_a_fused_transposed_matrix_is_found() -> None:
    (place,) = places_of("gpt2", "blocks.3.attention.wk.weight", (32, 32))
    assert place == Place("transformer.h.3.attn.c_attn.weight", (32, 96), first=32, transposed=True)
    assert place.box((slice(8, 16), slice(0, 32))) == (slice(0, 32), slice(40, 48))
    (bias,) = places_of("gpt2", "blocks.3.attention.wv.bias", (32,))
    assert bias == Place("transformer.h.3.attn.c_attn.bias", (96,), first=64)
    assert bias.box((slice(8, 16),)) == (slice(72, 80),)
    stack = places_of("mixtral", "blocks.0.mlp.experts.w2", (4, 32, 48))
    assert [place.tensor for place in stack] == [
        f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)
    ]
    assert {place.shape for place in stack} == {(32, 48)}


def test_the_released_gpt2_has_no_prefix_and_a_mask_in_every_layer(saved: Any, tmp_path: Path) -> None:
    folder, theirs = saved("gpt2")

    def as_released(tensors: Tensors) -> None:
        renamed(tensors, lambda name: name.removeprefix("transformer."))
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    require_same_logits(read_whole(copy_with(folder, tmp_path / "released", as_released)), theirs)


def test_the_released_bert_has_old_names_and_what_belongs_to_other_tasks(saved: Any, tmp_path: Path) -> None:
    folder, theirs = saved("bert")

    def as_released(tensors: Tensors) -> None:
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            renamed(tensors, lambda name, new=new, old=old: name.replace(new, old))
        tensors["bert.embeddings.position_ids"] = torch.arange(64)
        tensors |= {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
        tensors |= {"cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}

    require_same_logits(read_whole(copy_with(folder, tmp_path / "released", as_released)), theirs)


def test_a_tied_head_may_have_its_own_tensor_if_it_is_the_same(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("qwen2")
    model = read_hf_config(folder)
    embedding = "model.embed_tokens.weight"
    same = copy_with(folder, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    check_weights(same, model)
    other = copy_with(folder, tmp_path / "other", lambda t: t.update({"lm_head.weight": t[embedding] + 1e-3}))
    with pytest.raises(InputError, match="the head is not the embedding, to which the config ties it") as caught:
        check_weights(other, model)
    assert caught.value.where == f"{other / WEIGHTS}: lm_head.weight"


def test_values_are_cast_to_the_parameters(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("qwen3")
    half = copy_with(folder, tmp_path / "half", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    chunk = read_whole(half)
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.float32}
    assert chunk.head is not None
    assert torch.equal(chunk.head.weight, load_file(half / WEIGHTS)["lm_head.weight"].float())


# ---- what is refused ------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "what", "expected", "got"),
    [
        (lambda t: t.pop(UP), f"lacks tensors of wrong: {UP}", f"the tensor {UP}", "no such tensor"),
        (
            lambda t: [t.pop(UP.replace("1", str(layer))) for layer in range(3)] + [t.pop("lm_head.weight")],
            "lacks tensors of wrong: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight, "
            "model.layers.2.mlp.up_proj.weight and 1 more",
            "the tensor model.layers.0.mlp.up_proj.weight",
            "no such tensor",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
            "has tensors that wrong has not: model.layers.3.mlp.up_proj.weight",
            "no tensor of this name",
            "model.layers.3.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({UP: t[UP][:-1]}),
            f"has a tensor of another shape than wrong: {UP}",
            "[48, 32]",
            "[47, 32]",
        ),
        (
            lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}),
            f"{UP} is quantised",
            "one of F64, F32, F16, BF16",
            "F8_E4M3",
        ),
    ],
)
def test_the_tensor_that_is_wrong_is_named(
    saved: Any, tmp_path: Path, change: Callable[[Tensors], object], what: str, expected: str, got: str
) -> None:
    folder = copy_with(saved("mistral")[0], tmp_path / "wrong", change)
    with pytest.raises(InputError) as caught:
        check_weights(folder, read_hf_config(folder))
    assert caught.value.what.endswith(what)
    place, _, tensor = caught.value.where.rpartition(": ")
    assert place in (str(folder / WEIGHTS), str(folder))
    assert tensor in what
    assert (caught.value.expected, caught.value.got) == (expected, got)


def test_a_folder_of_another_model_is_refused_with_the_keys_that_differ(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("mistral")
    model = read_hf_config(folder)
    check_weights(folder, replace(model, name="mine", family="custom", max_positions=8192))
    with pytest.raises(InputError, match="holds another model than the plan's") as caught:
        check_weights(folder, replace(model, rope_theta=5e5, layers=2))
    assert caught.value.where == str(folder / "config.json")
    assert (caught.value.expected, caught.value.got) == (
        "layers 2, rope_theta 500000.0",
        f"layers 3, rope_theta {model.rope_theta}",
    )
    neox = tmp_path / "neox"
    copy_with(folder, neox, lambda _: None)
    (neox / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(InputError, match="weights of the family gpt_neox are not read"):
        check_weights(neox, read_hf_config(neox))


@pytest.mark.parametrize("kind", ["none", "pickles", "no folder", "torn", "index of nothing", "wrong index", "no map"])
def test_files_that_cannot_be_read_are_named(saved: Any, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    if kind != "no folder":
        copy_with(saved("mistral")[0], folder, lambda _: None)
    weights, index = folder / WEIGHTS, folder / "model.safetensors.index.json"
    if kind in ("none", "pickles"):
        weights.rename(folder / "pytorch_model.bin") if kind == "pickles" else weights.unlink()
    if kind == "torn":
        weights.write_bytes(weights.read_bytes()[:5000])
    if kind == "index of nothing":
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    if kind == "wrong index":
        index.write_text(json.dumps({"weight_map": {"lm_tail.weight": WEIGHTS}}))
    if kind == "no map":
        index.write_text(json.dumps({}))
    where, got = {
        "none": (f"--from {folder}", "config.json"),
        "pickles": (f"--from {folder}", "config.json, pytorch_model.bin"),
        "no folder": (f"--from {folder}", "no such folder"),
        "torn": (str(weights), ""),
        "index of nothing": (str(folder / "model-00001-of-00001.safetensors"), ""),
        "wrong index": (f"{index}: weight_map.lm_tail.weight", "no such tensor there"),
        "no map": (f"{index}: top level", "no keys"),
    }[kind]
    with pytest.raises(InputError) as caught:
        TensorFiles(folder)
    assert caught.value.where == where
    assert caught.value.got == got or not got


# ---- before a run -----------------------------------------------------------------------------------------------


def test_without_a_plan_the_folder_is_the_model(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved("llama")
    monkeypatch.chdir(folder.parent)
    relative = Path(folder.name)
    assert model_to_start_from(relative, None, None) == str(folder)
    assert model_to_start_from(relative, None, "demo") == "demo"
    assert model_to_start_from(relative, Path("plan.yaml"), None) is None
    assert model_to_start_from(None, None, None, resume=True) is None
    with pytest.raises(InputError, match="--from and --resume do not go together"):
        model_to_start_from(relative, None, None, resume=True)
    with pytest.raises(InputError, match="lacks tensors of empty"):
        model_to_start_from(copy_with(folder, tmp_path / "empty", lambda t: t.clear()), None, None)


def test_a_run_keeps_config_and_tokenizer_of_what_it_started_from(saved: Any, tmp_path: Path) -> None:
    folder = copy_with(saved("llama")[0], tmp_path / "folder", lambda _: None)
    (folder / "tokenizer.json").write_text("{}")
    run_dir = tmp_path / "run"
    keep_description(run_dir, folder)
    kept = run_dir / "hugging_face"
    assert {path.name for path in kept.iterdir()} == {"config.json", "tokenizer.json"}
    (other := tmp_path / "other").mkdir()
    (other / "tokenizer.json").write_text('{"other": 1}')
    (other / "vocab.json").write_text("{}")
    keep_description(run_dir, folder, other)
    assert {path.name for path in kept.iterdir()} == {"config.json", "tokenizer.json", "vocab.json"}
    assert (kept / "tokenizer.json").read_text() == '{"other": 1}'
    keep_description(run_dir, None, other / "tokenizer.json")
    assert {path.name for path in kept.iterdir()} == {"tokenizer.json"}
    keep_description(run_dir, None)
    assert not kept.exists()


# ---- config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_is_what_transformers_says(family: str, tmp_path: Path) -> None:
    """Where both name a key they agree, and transformers reads ours as its own."""
    theirs = make_model(family).config
    theirs.save_pretrained(tmp_path)
    document = load_json(tmp_path / "config.json", "config")
    written = write_hf_config(read_hf_config(tmp_path))
    free = {"architectures", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling"}
    assert {key: document[key] for key in written if key in document and key not in free} == {
        key: value for key, value in written.items() if key in document and key not in free
    }
    again = type(theirs).from_dict(written)
    shared = ("rope_parameters", "layer_types", "hidden_act", "num_key_value_heads", "first_k_dense_replace")
    assert {key: getattr(again, key, None) for key in shared} == {key: getattr(theirs, key, None) for key in shared}


def test_a_model_that_the_family_cannot_express_is_refused(saved: Any) -> None:
    model = read_hf_config(saved("mistral")[0])
    assert write_hf_config(replace(model, family="custom"))["model_type"] == "llama"
    with pytest.raises(InputError, match="cannot be written as a Hugging Face model of the family mistral") as caught:
        write_hf_config(replace(model, mlp_bias=True))
    assert caught.value.where == "plan: model.mlp_bias"
