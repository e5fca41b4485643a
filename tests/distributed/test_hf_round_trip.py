"""Hugging Face folder -> ranks of a layout -> a step -> checkpoint -> Hugging Face folder, beside transformers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan, save
from profiles.hf_config import read_hf_config
from runtime import checkpoint
from runtime.context_parallel import whole_inputs_and_targets
from runtime.hf_export import Exported, export_run
from runtime.hf_files import TensorFiles, keep_description
from runtime.hf_names import FAMILIES, Box
from runtime.local_parameters import local_part
from runtime.parameters import named_buffers, named_parameters
from runtime.step import build_state, sum_over_ranks, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.hf_folders import make_model, read_whole, require_same_logits
from tests.plans import make_plan

RANKS = 4
LAYERS = 4
SMALL_FILE = 40_000  # bytes: every model here then is several files


@dataclass(frozen=True)
class Case:
    """A family under a layout of four ranks. `bf16` files; `sharded` ones; `own_config`: the run has no config kept."""

    family: str
    layout: Layout
    bf16: bool = False
    sharded: bool = False
    own_config: bool = False


CASES = [
    # 61 tokens over tp=2: shards of 31 and 30 rows.
    Case("llama", Layout(tp=2, pp=2, sequence_parallel=True, micro_batch=2), sharded=True),
    Case("mistral", Layout(dp=4, micro_batch=1), bf16=True, own_config=True),
    Case("qwen3", Layout(tp=4, micro_batch=2), own_config=True),  # wk and wv whole on each rank
    # Tied embeddings in one chunk, and as two copies on one rank.
    Case("gpt2", Layout(tp=2, dp=2, dp_shard=2, zero=3, micro_batch=2), bf16=True, sharded=True),
    Case("qwen2", Layout(pp=2, dp=2, schedule="zbv", virtual_stages=2, micro_batch=1), sharded=True),
    Case("mixtral", Layout(pp=2, dp=2, dp_shard=2, zero=1, ep=2, micro_batch=2), sharded=True, own_config=True),
    Case("qwen3_moe", Layout(tp=2, dp=2, dp_shard=2, ep=2, etp=2, zero=1, sequence_parallel=True, micro_batch=2)),
    Case(
        "deepseek_v2",
        Layout(tp=2, dp=2, dp_shard=2, ep=4, zero=3, sequence_parallel=True, micro_batch=2),
        own_config=True,
    ),
    Case("deepseek_v3", Layout(dp=4, dp_shard=2, zero=2, micro_batch=1)),  # HSDP
    Case(
        "gpt_oss",
        Layout(tp=2, dp=2, dp_shard=2, ep=2, etp=2, zero=1, sequence_parallel=True, micro_batch=2),
        own_config=True,
    ),
    Case("bert", Layout(tp=2, pp=2, sequence_parallel=True, micro_batch=2), own_config=True),
    Case("megatron-bert", Layout(tp=2, dp=2, dp_shard=2, zero=3, micro_batch=2), sharded=True),
]
MORE_CASES = [
    Case("gpt2", Layout(dp=4, dp_shard=2, zero=2, micro_batch=1), own_config=True),
    Case("gpt2", Layout(tp=2, pp=2, micro_batch=2), own_config=True),
    Case(
        "qwen2",  # tied copies on two ranks
        Layout(pp=2, dp=2, dp_shard=2, zero=1, schedule="interleaved-1f1b", virtual_stages=2, micro_batch=1),
        own_config=True,
    ),
    Case("mistral", Layout(pp=2, dp=2, schedule="dualpipev", virtual_stages=2, micro_batch=1)),
    Case("llama", Layout(tp=2, dp=2, micro_batch=1), own_config=True),
    Case("qwen3_moe", Layout(dp=4, dp_shard=4, zero=3, micro_batch=1), own_config=True),  # experts cut by width
    Case("mixtral", Layout(tp=4, ep=4, sequence_parallel=True, micro_batch=2), bf16=True),
    Case("deepseek_v3", Layout(pp=2, dp=2, dp_shard=2, ep=2, zero=3, micro_batch=2), sharded=True, own_config=True),
]


def train(cases: list[tuple[Plan, Path, Path]]) -> list[tuple[float, float]]:
    """On every rank, for each (plan, weights, run folder): loss before and after a step, after which it is saved.

    Raises AssertionError where a rank reads more, or less, than it holds.
    """
    losses, numbers_read, read = [], [0], TensorFiles.read

    def read_and_count(self: TensorFiles, tensor: str, box: Box) -> torch.Tensor:
        part = read(self, tensor, box)
        numbers_read[0] += part.numel()
        return part

    TensorFiles.read = read_and_count
    for plan, weights, run_dir in cases:
        numbers_read[0] = 0
        state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1, weights=weights)
        held = (*named_parameters(state.chunks), *named_buffers(state.chunks))
        assert numbers_read[0] == sum(local_part(tensor).numel() for _, tensor in held) > 0
        tokens = own_samples(plan, tokens_of(plan, 0), state.mesh.coordinate.dp)
        inputs, targets = (ids.contiguous() for ids in whole_inputs_and_targets(tokens))
        before = training_step(state, inputs, targets, learning_rate=1e-2, clip_norm=None).loss
        checkpoint.save(run_dir, 1, state.chunks, state.optimizer, "")
        losses.append((before, sum_over_ranks(state.runner.evaluate(inputs, targets).double())))
    return losses


def loss_of(model: Any, plan: Plan) -> float:
    """transformers' own loss on the tokens of the first step."""
    inputs, targets = whole_inputs_and_targets(tokens_of(plan, 0))
    with torch.no_grad():
        logits = model(inputs).logits.flatten(0, 1).double()
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1).item()


def auto_class(plan: Plan) -> Any:
    """transformers' class that reads the plan's model."""
    import transformers

    return transformers.AutoModelForMaskedLM if plan.model.bidirectional else transformers.AutoModelForCausalLM


def prepare(case: Case, folder: Path) -> tuple[Plan, Path, Path, Any]:
    """Plan, weights and run folder of a case, and transformers' model with what it read from those weights."""
    weights, run_dir = folder / "weights", folder / "run"
    model = make_model(case.family, layers=LAYERS)
    model = model.to(torch.bfloat16) if case.bf16 else model
    model.save_pretrained(weights, **({"max_shard_size": SMALL_FILE} if case.sharded else {}))
    assert (weights / "model.safetensors.index.json").exists() == case.sharded
    plan = make_plan(read_hf_config(weights), case.layout, TrainingJob(global_batch=8, sequence=16, precision="fp32"))
    save(plan, run_dir / "plan.yaml")
    keep_description(run_dir, None if case.own_config else weights)
    theirs = auto_class(plan).from_pretrained(weights, dtype=torch.float32).eval()
    return plan, weights, run_dir, theirs


def require_round_trip(case: Case, plan: Plan, run_dir: Path, after: float) -> Exported:
    """transformers' loss of what the run exports is the loss that the ranks had, and the folder reads back."""
    found = export_run(run_dir, None, step=None, dtype="fp32", shard_bytes=SMALL_FILE if case.sharded else 1 << 30)
    assert (len(found.files) > 1) == case.sharded
    exported, said = auto_class(plan).from_pretrained(found.folder, output_loading_info=True)
    assert not any(said.values()), said
    assert exported.dtype == torch.float32
    assert loss_of(exported.eval(), plan) == pytest.approx(after, rel=1e-5)
    require_same_logits(read_whole(found.folder, plan.model), exported)
    return found


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.full)], ids=["each family", "more"]
)
def test_every_family_comes_in_and_goes_out(cases: list[Case], tmp_path: Path) -> None:
    assert {case.family for case in CASES} == set(FAMILIES)
    made = [prepare(case, tmp_path / str(index)) for index, case in enumerate(cases)]
    ranks = run_ranks(train, RANKS, [(plan, weights, run_dir) for plan, weights, run_dir, _ in made])
    for case, (plan, _, run_dir, theirs), losses in zip(cases, made, zip(*ranks, strict=True), strict=True):
        before, after = losses[0]
        assert set(losses) == {(before, after)}, case  # on all ranks
        assert before == pytest.approx(loss_of(theirs, plan), rel=1e-5), case
        assert abs(after - before) > 1e-2, case
        require_round_trip(case, plan, run_dir, after)


def test_train_starts_from_a_folder_and_what_it_exports_is_what_it_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands. Of a text of one letter every sample is the same, so that what a step trained on is known."""
    import transformers

    weights, run_dir, text = tmp_path / "weights", tmp_path / "run", tmp_path / "a.txt"
    theirs = make_model("qwen2", layers=2, vocab_size=256)
    theirs.save_pretrained(weights)
    text.write_text("a" * 10_000)
    layout, job = Layout(pp=2, micro_batch=2), TrainingJob(global_batch=4, sequence=16, precision="fp32")
    plan = make_plan(read_hf_config(weights), layout, job)
    save(replace(plan, cluster=replace(plan.cluster, hardware="a100-sxm-40gb")), tmp_path / "plan.yaml")

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cli.py", *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_info.value.code, captured
        return captured.out

    train = ("train", str(tmp_path / "plan.yaml"), "--from", str(weights), "--data", str(text))
    run(*train, "--run-dir", str(run_dir), "--steps", "2", "--lr", "0.01", "--warmup", "0", "--checkpoint-every", "1")
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    exported = json.loads(run("export", str(run_dir), "--to", "hf", "--step", "1", "--json"))
    after_one = transformers.AutoModelForCausalLM.from_pretrained(exported["folder"]).eval()
    ids = torch.full((1, 17), ord("a"))
    for model, loss in zip((theirs, after_one), losses, strict=True):
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[0, 1:]).item()
        assert loss == pytest.approx(expected, rel=1e-5)
    assert losses[1] < losses[0] - 0.01
