"""Compiled blocks and loss: the same numbers, the same names, one code for all blocks, and where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed._symmetric_memory import _test_mode
from torch.torch_version import TorchVersion

from planner.compile_rules import why_no_asynchronous_tp, why_not_compiled
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.attention_spec import RopeScaling, RopeStretch
from profiles.input_error import InputError
from profiles.model import ModelSpec
from runtime import checkpoint, compilation
from runtime.checkpoint_folder import latest
from runtime.clock import Clock
from runtime.compilation import Compilation, choose_compilation
from runtime.loss_scale import LossScaling
from runtime.measure import OperationTimer
from runtime.mesh import build_mesh
from runtime.parallelize import build_chunks
from runtime.parameters import named_parameters
from runtime.process_group import set_timeout
from runtime.step import TrainState, build_state, training_step
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.layout_runs import Trajectory, own_samples, run_plain, run_plan, tokens_of
from tests.plans import make_plan, tiny_bert, tiny_experts, tiny_gpt2, tiny_latent, tiny_llama
from tests.thinned import every

STEPS = 2
JOB = TrainingJob(global_batch=12, sequence=16, precision="fp32")
LLAMA, GPT2, BERT, EXPERTS = tiny_llama(), tiny_gpt2(), tiny_bert(), tiny_experts()
# torch's tracing and its split into forward and backward, without its code generator, which takes too long here.
EAGER_CODE = Compilation(backend="aot_eager")
CPU = torch.device("cpu")
MENDED = "torch has mended this: lift the rule, and let the layouts here have it"


def plan_of(
    model: ModelSpec = LLAMA,
    recompute: tuple[int, ...] | None = None,
    selective: tuple[int, ...] | None = None,
    **layout: Any,
) -> Plan:
    shards = {"dp_shard": layout["dp"]} if layout.get("zero") else {}
    chosen = Layout(**{"micro_batch": 2} | layout | shards)
    return make_plan(model, chosen, JOB, None, recompute, selective, check=False)


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def run_compiled(plan: Plan, dtype: torch.dtype, how: Compilation = EAGER_CODE) -> tuple[Trajectory, int]:
    """What `run_plan` gives, and how many graphs it has compiled."""
    return run_plan(plan, STEPS, dtype, None, how), compiled_graphs()


# name -> plan, and the graphs of the first and of the last rank: a block of each kind, and the loss.
CASES = {
    "full and selective": (plan_of(recompute=(1,), selective=(2,)), 4, 4),
    "dp2 zero0": (plan_of(dp=2), 2, 2),
    "dp2 zero3 full": (plan_of(dp=2, zero=3, recompute=(2,)), 3, 3),
    "tp2 sp full and selective": (
        plan_of(tp=2, sequence_parallel=True, micro_batch=6, recompute=(2,), selective=(2,)),
        3,
        3,
    ),
    "pp2 gpipe": (plan_of(pp=2, schedule="gpipe"), 1, 3),  # the loss forward, and its gradient in the backward pass
    "interleaved": (plan_of(pp=2, schedule="interleaved-1f1b", virtual_stages=2), 1, 2),
    "gpt2 tp2": (plan_of(GPT2, tp=2, micro_batch=6), 2, 2),
}


CONTEXT_CASES = {
    "cp2 ring": (plan_of(cp=2, cp_style="ring", recompute=(1,), selective=(2,)), 4, 4),
    "tp2 sp cp2 all-to-all": (
        plan_of(GPT2, tp=2, sequence_parallel=True, cp=2, cp_style="all-to-all", micro_batch=6),
        2,
        2,
    ),
}
CASES |= CONTEXT_CASES
CASES["bert tp2 sp selective"] = (plan_of(BERT, tp=2, sequence_parallel=True, micro_batch=6, selective=(2,)), 3, 3)


@pytest.mark.parametrize("name", every(4, CASES))
def test_compiled_training_is_training(name: str) -> None:
    plan, first, last = CASES[name]
    ranks = run_ranks(run_compiled, plan.layout.world_size, plan, torch.float64, timeout_seconds=180.0)
    expected = run_plain(make_plan(plan.model, Layout(), JOB), STEPS, torch.float64)
    for trajectory, _ in (ranks[0], ranks[-1]):
        assert trajectory.losses == pytest.approx(expected.losses, rel=1e-9)
        assert trajectory.norms == pytest.approx(expected.norms, rel=1e-9)
    assert (ranks[0][1], ranks[-1][1]) == (first, last)


def losses_of_each(plans: Sequence[Plan]) -> list[list[float]]:
    """Of compiled blocks, one plan after the other in one process."""
    return [run_compiled(plan, torch.float64)[0].losses for plan in plans]


def test_each_scaling_of_positions_is_compiled() -> None:
    llama3 = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=16)
    yarn = RopeStretch(kind="yarn", factor=4.0, original_max_positions=16)
    plain = tiny_llama(layers=1, rope_theta=50.0)
    stretched = replace(plain, rope_stretch=yarn)
    latent = tiny_latent(layers=1, rope_theta=50.0, rope_stretch=yarn)
    plans = [plan_of(model) for model in (plain, replace(plain, rope_scaling=llama3), stretched, latent)]
    expected = [run_plain(make_plan(plan.model, Layout(), JOB), STEPS, torch.float64).losses for plan in plans]
    assert len({losses[0] for losses in expected}) == len(plans)
    (found,) = run_ranks(losses_of_each, 1, plans, timeout_seconds=180.0)
    assert found == [pytest.approx(losses, rel=1e-9) for losses in expected]


def run_scaled(plan: Plan) -> tuple[Trajectory, int]:
    """Under a loss scale that is another one each step."""
    return run_plan(plan, STEPS, torch.float64, None, EAGER_CODE, scaling=LossScaling(window=1)), compiled_graphs()


@pytest.mark.full
def test_another_loss_scale_compiles_nothing_anew() -> None:
    plan = plan_of(pp=2, schedule="gpipe")
    trajectory, graphs = run_ranks(run_scaled, 2, plan, timeout_seconds=180.0)[1]
    expected = run_plain(make_plan(plan.model, Layout(), JOB), STEPS, torch.float64)
    assert trajectory.norms == pytest.approx(expected.norms, rel=1e-9)
    assert graphs == CASES["pp2 gpipe"][2]


def test_blocks_share_their_code() -> None:
    # torch gives up on code that it has compiled 8 times.
    plan = plan_of(tiny_llama(layers=12), tp=2, sequence_parallel=True, micro_batch=6)
    assert [graphs for _, graphs in run_ranks(run_compiled, 2, plan, torch.float32)] == [2, 2]


def names_of(plan: Plan, run_dir: Path | None = None) -> tuple[list[str], list[str]]:
    """Names of the parameters and of the state dict; with `run_dir` a checkpoint is saved there too."""
    state = build_state(plan, CPU, dtype=torch.float32, seed=0, weight_decay=0.0, compilation=EAGER_CODE)
    if run_dir is not None:
        checkpoint.save(run_dir, 1, state.chunks, state.optimizer, "")
    (chunk,) = state.chunks
    return [name for name, _ in named_parameters(state.chunks)], list(chunk.state_dict())


def eager_names(plan: Plan) -> tuple[list[str], list[str]]:
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=False)
    (chunk,) = build_chunks(plan, mesh, CPU, dtype=torch.float32, seed=0)
    return [name for name, _ in named_parameters([chunk])], list(chunk.state_dict())


def load_eager(plan: Plan, folder: Path) -> int:
    state = build_state(plan, CPU, dtype=torch.float32, seed=1, weight_decay=0.0)
    return checkpoint.load(folder, state.chunks, state.optimizer)


@pytest.mark.full
def test_compiled_parameters_keep_their_names(tmp_path: Path) -> None:
    plan = plan_of(dp=2, zero=3, recompute=(1,), selective=(1,))
    compiled = run_ranks(names_of, 2, plan, tmp_path)[0]
    assert compiled == run_ranks(eager_names, 2, plan)[0]
    assert run_ranks(load_eager, 1, plan_of(), latest(tmp_path)) == [1]


def batch_of(plan: Plan, state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = own_samples(plan, tokens_of(plan, 0), state.mesh.coordinate.dp)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def evaluate_after_a_step(plan: Plan) -> tuple[float, float, int]:
    """The loss of a batch with weights that do not move: trained on, and evaluated; graphs that the latter compiled."""
    state = build_state(plan, CPU, dtype=torch.float64, seed=0, weight_decay=0.0, compilation=EAGER_CODE)
    batch = batch_of(plan, state)
    loss = training_step(state, *batch, learning_rate=0.0, clip_norm=None).loss
    graphs = compiled_graphs()
    share = state.runner.evaluate(*batch)
    dist.all_reduce(share)
    return loss, share.item(), compiled_graphs() - graphs


@pytest.mark.full
@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=str)
def test_evaluation_compiles_nothing(layout: dict[str, int]) -> None:
    plan = plan_of(**layout)
    for loss, evaluated, graphs in run_ranks(evaluate_after_a_step, plan.layout.world_size, plan):
        assert evaluated == pytest.approx(loss, rel=1e-12)
        assert graphs == 0


def watched_counts(plan: Plan, how: Compilation | None) -> dict[str, int]:
    """Collectives that are timed in a second step."""
    state = build_state(plan, CPU, dtype=torch.float32, seed=0, weight_decay=0.0, compilation=how)
    batch = batch_of(plan, state)
    training_step(state, *batch, learning_rate=0.0, clip_norm=None)
    timer = OperationTimer(state.mesh, Clock(CPU))
    training_step(state, *batch, learning_rate=0.0, clip_norm=None, watch=timer)
    return timer.counts


@pytest.mark.full
def test_collectives_of_compiled_blocks_are_timed() -> None:
    plan = plan_of(tp=2, sequence_parallel=True, micro_batch=6)
    compiled = run_ranks(watched_counts, 2, plan, EAGER_CODE, timeout_seconds=180.0)
    assert compiled == run_ranks(watched_counts, 2, plan, None)
    assert compiled[0]["tp:reduce_scatter_tensor"] == 2 * (4 * LLAMA.layers + 2)


# ---- where nothing is compiled, and why ----------------------------------------------------------------------


def backward_runs(plan: Plan) -> int:
    """How often a compiled block's backward runs on this rank in a step."""
    runs: list[int] = []

    def counted(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            runs.append(1)
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend: Any = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=counted)
    run_plan(plan, 1, torch.float32, None, Compilation(backend=backend))
    return len(runs)


@pytest.mark.full
@pytest.mark.parametrize(("schedule", "chunks"), [("zb1p", 1), ("zbv", 2)])
def test_split_backward_runs_compiled_backwards_whole_and_twice(schedule: str, chunks: int) -> None:
    # With the code generator it raises instead.
    plan = plan_of(pp=2, schedule=schedule, virtual_stages=chunks)
    assert why_not_compiled(plan.layout, plan.model) is not None
    assert sum(run_ranks(backward_runs, 2, plan)) > 1.2 * LLAMA.layers * plan.microbatches, MENDED


@pytest.mark.full
def test_whole_backwards_run_once() -> None:
    plan = plan_of(pp=2, schedule="interleaved-1f1b", virtual_stages=2)
    assert sum(run_ranks(backward_runs, 2, plan)) == LLAMA.layers * plan.microbatches


@pytest.mark.full
def test_split_backward_under_dualpipev_raises() -> None:
    plan = plan_of(pp=2, schedule="dualpipev", virtual_stages=2)
    assert why_not_compiled(plan.layout, plan.model) is not None
    with pytest.raises(RankError, match="donated buffers"):  # else torch has mended it
        run_ranks(run_compiled, 2, plan, torch.float32)


def test_blocks_with_experts_have_no_whole_graph() -> None:
    plan = plan_of(EXPERTS)
    assert why_not_compiled(plan.layout, EXPERTS) is not None
    with pytest.raises(RankError, match=r"loads\.tolist\(\)"):  # else torch has mended it
        run_ranks(run_compiled, 1, plan, torch.float32)


def full_recomputation_inside(plan: Plan) -> None:
    with mock.patch.object(compilation, "_outside", return_value=False):
        run_compiled(plan, torch.float32)


@pytest.mark.full
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.12", reason="torch 2.11 compiles it")
def test_full_recomputation_over_tp_cannot_be_compiled_whole() -> None:
    plan = plan_of(tp=2, micro_batch=6, recompute=(4,))
    # Once torch has mended this, `compile_chunk` can take all recomputation inside.
    with pytest.raises(RankError, match="expected all tensors_saved_with_vc_check to be Tensors"):
        run_ranks(full_recomputation_inside, 2, plan)


def test_the_rules_say_why() -> None:
    assert why_not_compiled(Layout(pp=2), LLAMA) is None
    assert why_not_compiled(Layout(pp=2, schedule="zbv", virtual_stages=2), LLAMA) == (
        "zbv splits each backward in two, which torch 2.11 to 2.13 does not do with compiled blocks; "
        "1f1b and interleaved-1f1b do not split it"
    )
    assert why_not_compiled(Layout(), EXPERTS) == (
        "tiny-experts has experts: how many tokens each gets is read by the host, and a graph that is whole cannot "
        "wait for it"
    )
    parallel = Layout(tp=4, sequence_parallel=True)
    assert why_no_asynchronous_tp(parallel, LLAMA, 8) is None
    assert why_no_asynchronous_tp(Layout(), LLAMA, 8) == "tp=1: there is nothing to overlap"
    assert why_no_asynchronous_tp(Layout(tp=4), LLAMA, 8) == (
        "tp=4 without sequence_parallel: torch cuts gathers and reduce-scatters into pieces, and here are all-reduces"
    )
    assert why_no_asynchronous_tp(parallel, GPT2, 8) == (
        "tiny-gpt2 adds a bias in every product, and torch cuts only products without"
    )
    assert why_no_asynchronous_tp(parallel, LLAMA, 2) == (
        "tp=4 and nodes of 2 devices: the pieces pass through the memory of one node"
    )
    split = replace(parallel, pp=2, schedule="zb1p")
    assert why_no_asynchronous_tp(split, LLAMA, 8) == why_not_compiled(split, LLAMA)


def test_compilation_is_chosen_by_device_rule_and_word() -> None:
    plain, split = plan_of(), plan_of(pp=2, schedule="zb1p")
    parallel = plan_of(tp=2, sequence_parallel=True, micro_batch=6)
    assert choose_compilation(plain, None, "cpu") == (None, "off: by default only on CUDA")
    assert choose_compilation(plain, None, "cuda") == (Compilation(), "blocks and loss")
    assert choose_compilation(plain, True, "cpu") == (Compilation(), "blocks and loss")
    assert choose_compilation(plain, False, "cuda") == (None, "off: as asked")
    assert choose_compilation(split, None, "cuda") == (None, f"off: {why_not_compiled(split.layout, LLAMA)}")
    assert choose_compilation(parallel, None, "cuda") == (
        Compilation(asynchronous_tp=True),
        "blocks and loss, asynchronous tp",
    )
    assert choose_compilation(parallel, True, "cpu") == (Compilation(), "blocks and loss")
    with pytest.raises(InputError) as info:
        choose_compilation(split, True, "cpu")
    assert (info.value.where, info.value.got) == ("--compile", why_not_compiled(split.layout, LLAMA))


# ---- asynchronous tp -------------------------------------------------------------------------------------------


class GraphSeen(Exception):
    """Ends a compilation once its graph has been seen."""


def forward_collectives(plan: Plan) -> list[str]:
    """The collectives in a block's forward graph after inductor's pass, as on CUDA, where alone they would run."""
    # Not on top: torch's own import of it warns, and warnings are errors.
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass

    names: list[str] = []

    def see(graph: torch.fx.Graph) -> None:
        micro_pipeline_tp_pass(graph)
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        names.extend(name for name in targets if name.startswith(("symm_mem", "_c10d_functional")))
        raise GraphSeen

    with (
        mock.patch.object(post_grad, "micro_pipeline_tp_pass", see),
        mock.patch.object(dist, "is_nccl_available", return_value=True),
        mock.patch.object(compilation, "_share_memory"),
        _test_mode(),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="GraphSeen"),
    ):
        run_plan(plan, 1, torch.float32, None, Compilation(asynchronous_tp=True))
    return sorted(names)


@pytest.mark.full
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda model: model.name)
def test_torch_cuts_the_collectives_of_products_without_a_bias(model: ModelSpec) -> None:
    plan = plan_of(model, tp=2, sequence_parallel=True)
    found = run_ranks(forward_collectives, 2, plan)[0]
    cut = 2 * ["symm_mem.fused_all_gather_matmul.default"] + 2 * ["symm_mem.fused_matmul_reduce_scatter.default"]
    if why_no_asynchronous_tp(plan.layout, model, 2) is None:
        assert found == cut
    else:
        assert not set(found) & set(cut), MENDED


# ---- waiting for a compiler ------------------------------------------------------------------------------------


def timeouts(plan: Plan) -> list[float]:
    """Of the world's and all other groups, after they are set."""
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=True)
    groups = mesh.all_groups()
    set_timeout(groups, 7.0)
    backends: list[Any] = [group._get_backend(CPU) for group in (dist.group.WORLD, *groups) if group is not None]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_timeouts_of_all_groups_are_set() -> None:
    assert run_ranks(timeouts, 2, plan_of(GPT2, pp=2))[0] == [7.0] * 5
