"""The first Megatron headline (arXiv 1909.08053): GPT-2 8.3B on 512 V100 beside the same trainer on one, predicted.

python benchmarks/megatron_headline.py [--plan]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from planner.job import TrainingJob
from planner.layout import Layout
from planner.predict_case import assignment
from planner.question import ask
from planner.search import search, solve_layout
from planner.step_cost import CostModel
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import load_hardware
from profiles.model import ModelSpec
from profiles.software import load_software

SEQUENCE, MICRO_BATCH, REPLICAS = 1024, 8, 64
# Abstract: teraflop/s of one GPU, petaflop/s of 512, weak-scaling efficiency; within how much they are asked for.
PAPER_ONE, PAPER_ALL, PAPER_EFFICIENCY = 39e12, 15.1e15, 0.76
ASKED_ALL, ASKED_EFFICIENCY = 0.15, 0.03


@dataclass(frozen=True)
class Headline:
    """Predicted FLOP/s of one GPU and of all; recomputation counts as work, which the paper's 39 TFLOP/s imply."""

    one: float
    all: float
    devices: int

    @property
    def efficiency(self) -> float:
        return self.all / self.devices / self.one


def work(model: ModelSpec, sequences: int) -> float:
    """FLOPs of a step with every layer recomputed (arXiv 2104.04473, equation 3)."""
    layers, hidden, seq = model.layers, model.hidden_size, SEQUENCE
    each = 96 * seq * layers * hidden**2
    return sequences * each * (1 + seq / (6 * hidden) + model.vocab_size / (16 * layers * hidden))


def step_seconds(model: ModelSpec, layout: Layout) -> float:
    """One step as Megatron-LM of 2019 runs it, every layer recomputed."""
    cluster = resolve_cluster(f"dgx-2:{-(-layout.world_size // 16)}").with_devices(layout.world_size)
    job = TrainingJob(global_batch=MICRO_BATCH * layout.dp, sequence=SEQUENCE, precision="fp16", target="megatron")
    hardware = load_hardware(resolve_hardware_path(cluster.hardware))
    costs = CostModel(model, cluster, hardware, job, load_software("megatron-2019").software).price(layout)
    return sum(costs.breakdown(assignment(costs.segments, (model.layers,), "full")).values())


def headline() -> Headline:
    """The 8.3 B model with tp 8 on 512 GPUs, and the 1.2 B model (table 1 of the paper) on one."""
    large = resolve_model("megatron-gpt2-8.3b")
    small = replace(large, name="gpt2-1.2b", layers=40, hidden_size=1536, ffn_hidden_size=6144, heads=16, kv_heads=16)
    wide = Layout(tp=8, dp=REPLICAS, micro_batch=MICRO_BATCH)
    one = work(small, MICRO_BATCH) / step_seconds(small, Layout(micro_batch=MICRO_BATCH))
    return Headline(one, work(large, MICRO_BATCH * REPLICAS) / step_seconds(large, wide), wide.world_size)


def planned() -> tuple[str, float, float]:
    """What the planner chooses for Megatron-LM of today, its seconds, and those of the paper's layout under it."""
    question = ask(
        "megatron-gpt2-8.3b", "dgx-2:32", MICRO_BATCH * REPLICAS, SEQUENCE, precision="fp16", target="megatron"
    )
    plan = search(question)
    paper, _ = solve_layout(question, Layout(tp=8, dp=REPLICAS, micro_batch=MICRO_BATCH), "full")
    return plan.layout.short(), plan.prediction.step_seconds, paper.step_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="also what the planner would have chosen")
    arguments = parser.parse_args()
    found = headline()
    print(f"{'':<24}{'paper':>12}{'predicted':>12}{'off by':>10}{'asked':>8}")
    rows = (
        ("one GPU, TFLOP/s", PAPER_ONE / 1e12, found.one / 1e12, found.one / PAPER_ONE - 1, None),
        ("512 GPUs, PFLOP/s", PAPER_ALL / 1e15, found.all / 1e15, found.all / PAPER_ALL - 1, ASKED_ALL),
        ("efficiency", PAPER_EFFICIENCY, found.efficiency, found.efficiency - PAPER_EFFICIENCY, ASKED_EFFICIENCY),
    )
    for name, paper, predicted, off, asked in rows:
        limit = f"{asked:.0%}" if asked else ""
        print(f"{name:<24}{paper:>12.3g}{predicted:>12.3g}{off:>+10.1%}{limit:>8}")
    if arguments.plan:
        layout, best, as_paper = planned()
        print(f"planned for today's Megatron-LM: {layout}, {best:.3f} s a step")
        print(f"the paper's layout under it:     {as_paper:.3f} s, {as_paper / best:.2f} times as long")


if __name__ == "__main__":
    main()
