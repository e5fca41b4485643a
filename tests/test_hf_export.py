"""`cli.py export RUN --to hf`: which checkpoint, in which dtype and files, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_saver

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Stage, save
from profiles.catalogue import resolve_model
from profiles.model import ModelSpec
from runtime.checkpoint_reader import CheckpointReader
from runtime.hf_export import export_run
from runtime.hf_files import DESCRIPTION_FOLDER
from runtime.hf_weights import places_in
from runtime.parameters import initialise, named_buffers, named_parameters
from runtime.transformer import build_chunk
from tests.command_line import run
from tests.hf_folders import read_whole
from tests.plans import make_plan, tiny_experts, tiny_gpt2, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")


def write_run(run_dir: Path, model: ModelSpec, *steps: int) -> Path:
    """A run folder with a checkpoint for each step, whose weights are drawn from the step."""
    save(make_plan(model, Layout(micro_batch=2), JOB), run_dir / "plan.yaml")
    for step in steps:
        chunk = build_chunk(model, Stage.whole(model)).to_empty(device="cpu")
        chunk.tie()
        initialise([chunk], layers=model.layers, seed=step)
        held = (*named_parameters([chunk]), *named_buffers([chunk]))
        folder = run_dir / "checkpoints" / f"step_{step}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process only
            tensors = {f"model.{name}": tensor.detach() for name, tensor in held}
            state_dict_saver.save(tensors, checkpoint_id=folder, no_dist=True)
    return run_dir


def test_the_last_checkpoint_or_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of `make train` has no family of its own there: it is a llama of 256 tokens."""
    import transformers

    run_dir = write_run(tmp_path / "run", resolve_model("demo"), 3, 20)
    code, out, _ = run(capsys, monkeypatch, "export", str(run_dir), "--to", "hf", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["step"] == 20
    assert said["files"] == ["model.safetensors"]
    assert said["folder"] == str(run_dir / "hugging_face_step_20")
    assert said["weight_bytes"] == 4 * resolve_model("demo").parameters
    first = str(tmp_path / "first")
    code, out, _ = run(
        capsys, monkeypatch, *("export", str(run_dir), "--to", "hf", "--step", "3", "--out", first, "--dtype", "bf16")
    )
    assert code == 0
    assert "step 3 of" in out
    assert "tokenizer: none: the run has none recorded" in out
    last, early = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (said["folder"], first))
    assert (last.dtype, early.dtype) == (torch.float32, torch.bfloat16)
    assert type(last).__name__ == "LlamaForCausalLM"
    for model, step in ((last, 20), (early, 3)):
        chunk = build_chunk(resolve_model("demo"), Stage.whole(resolve_model("demo"))).to_empty(device="cpu")
        initialise([chunk], layers=4, seed=step)
        assert chunk.head is not None
        assert torch.equal(model.lm_head.weight, chunk.head.weight.detach().to(model.dtype))


@pytest.mark.parametrize("model", [tiny_gpt2(), tiny_experts(family="mixtral")], ids=lambda model: model.family)
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
def test_files_are_cut_at_their_size_and_hold_everything_once(
    tmp_path: Path, shard_bytes: int, model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    run_dir = write_run(tmp_path / "run", model, 1)
    names_read, read = [], CheckpointReader.read

    def read_and_note(self: CheckpointReader, name: str) -> torch.Tensor:
        names_read.append(name)
        return read(self, name)

    monkeypatch.setattr(CheckpointReader, "read", read_and_note)
    found = export_run(run_dir, tmp_path / "out", step=None, dtype="fp32", shard_bytes=shard_bytes)
    files = {file: load_file(found.folder / file) for file in found.files}
    assert all((found.folder / file).stat().st_mode & 0o044 == 0o044 for file in files)  # others may read them
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in files.values()]
    assert all(len(of_file) == 1 or sum(of_file) <= shard_bytes for of_file in sizes)
    assert sum(map(sum, sizes)) == found.weight_bytes == 4 * model.parameters
    assert sorted(names_read) == sorted(places_in(model, model.family))  # each once, and held while it is needed
    assert sum(map(len, sizes)) == found.tensors
    index = found.folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        said = json.loads(index.read_text())
        assert said["weight_map"] == {tensor: file for file, tensors in files.items() for tensor in tensors}
        assert said["metadata"] == {"total_size": found.weight_bytes}
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(found.folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected, got = theirs(ids).logits, read_whole(found.folder)(ids)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_the_run_was_told_of_its_model_goes_out_again(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", tiny_llama(), 1)
    plain = json.loads((export_run(run_dir, None, step=1, dtype="bf16").folder / "config.json").read_text())
    kept = run_dir / DESCRIPTION_FOLDER
    kept.mkdir()
    (kept / "config.json").write_text(json.dumps({**plain, "dtype": "float16", "eos_token_id": 7}))
    (kept / "tokenizer.json").write_text("{}")
    (kept / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = export_run(run_dir, tmp_path / "out", step=None, dtype="fp32")
    said = json.loads((found.folder / "config.json").read_text())
    assert said == {**plain, "eos_token_id": 7, "torch_dtype": "float32"}
    assert found.tokenizer == ("tokenizer.json",)
    assert {path.name for path in found.folder.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
    }


def break_run(run_dir: Path, kind: str) -> list[str]:
    """Make a run wrong in one way; the options that `export` gets then."""
    checkpoint = run_dir / "checkpoints" / "step_4"
    if kind == "no run":
        return ["--step", "4", "--out", str(run_dir / "new")]
    if kind == "another model":
        save(make_plan(tiny_llama(layers=6), Layout(micro_batch=2), JOB), run_dir / "plan.yaml")
    if kind == "another width":
        save(make_plan(tiny_llama(ffn_hidden_size=96), Layout(micro_batch=2), JOB), run_dir / "plan.yaml")
    if kind == "no family":
        save(make_plan(tiny_llama(family="qwen2"), Layout(micro_batch=2), JOB), run_dir / "plan.yaml")
    if kind == "no checkpoint":
        checkpoint.rename(run_dir / "checkpoints" / ".step_4.unfinished")
    if kind == "no metadata":
        (checkpoint / ".metadata").unlink()
    if kind == "torn metadata":
        (checkpoint / ".metadata").write_bytes((checkpoint / ".metadata").read_bytes()[:100])
    if kind == "lost file":
        next(checkpoint.glob("*.distcp")).unlink()
    if kind == "torn file":
        file = next(checkpoint.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:1000])
    return {
        "unknown target": ["--to", "gguf"],
        "unknown dtype": ["--dtype", "fp8"],
        "no such step": ["--step", "5"],
        "full": ["--out", str(run_dir)],
        "a file": ["--out", str(run_dir / "plan.yaml")],
        "below a file": ["--out", str(run_dir / "plan.yaml" / "out")],
    }.get(kind, [])


REFUSED = {
    "no run": ["is not a run folder", "no such folder"],
    "another model": ["lacks a parameter of the plan's model", "blocks.4.attention_norm.weight"],
    "another width": ["has another shape than the plan's model", "[96, 32]", "[64, 32]"],
    "no family": ["cannot be written as a Hugging Face model of the family qwen2", "qkv_bias"],
    "no checkpoint": ["has no checkpoint"],
    "no metadata": ["step_4 cannot be loaded", "the index of a checkpoint"],
    "torn metadata": ["step_4 cannot be loaded", "an index of tensors"],
    "lost file": ["step_4 cannot be loaded", "no file"],
    "torn file": ["step_4 cannot be loaded", "1000 bytes"],
    "unknown target": ["--to", "one of hf", "gguf"],
    "unknown dtype": ["--dtype", "one of fp32, bf16", "fp8"],
    "no such step": ["--step", "one of 4"],
    "full": ["is there already", "a folder that is new or empty", "a folder with files"],
    "a file": ["is there already", "a folder that is new or empty"],
    "below a file": ["cannot be written"],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_is_one_screen_and_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    if kind != "no run":
        write_run(run_dir, tiny_llama(), 4)
    options = break_run(run_dir, kind)
    before = sorted(tmp_path.rglob("*"))
    told = options if "--to" in options else ["--to", "hf", *options]
    code, out, err = run(capsys, monkeypatch, "export", str(run_dir), *told)
    assert code == 2, (out, err)
    assert out == ""
    assert len(err.splitlines()) <= 24
    for text in REFUSED[kind]:
        assert text in " ".join(err.split()), err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiles.input_error import InputError
    from runtime import hf_export

    run_dir = write_run(tmp_path / "run", replace(tiny_llama(), vocab_size=64), 4)
    monkeypatch.setattr(hf_export, "free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match="has no room for the weights"):
        export_run(run_dir, None, step=None, dtype="fp32")
    assert not (run_dir / "hugging_face_step_4").exists()
