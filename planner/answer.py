"""Answer: what a report says of one layout, as values: stage seconds, the default, GPU-hours, cost, assumptions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from profiles.lists_in_words import first_of
from profiles.masked_language import MASKED_SHARE

from .assignment import counts_of
from .default_layout import DefaultLayout, default_layout
from .layout import LAYOUT_KEYS, Layout
from .layout_costs import LayoutCosts, StageCount
from .plan import Prediction, Stage
from .question import Question
from .step_cost import CostModel

_TOKENS_PRICED = 1e9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A layout with its stages and prediction, and what follows from them.

    `stage_seconds` is what each stage works in a step, in the order of the stages; `price_per_gpu_hour` in dollars.
    """

    question: Question
    layout: Layout
    stages: tuple[Stage, ...]
    prediction: Prediction
    stage_seconds: tuple[float, ...]
    default: DefaultLayout | None
    price_per_gpu_hour: float | None = None

    @property
    def bubble_share(self) -> float:
        """Of the step, on the rank that has the most to do."""
        return self.prediction.breakdown_seconds["bubble"] / self.prediction.step_seconds

    @property
    def gpu_hours_per_step(self) -> float:
        return self.question.cluster.devices * self.prediction.step_seconds / 3600

    @property
    def gpu_hours_per_billion_tokens(self) -> float:
        return self.gpu_hours_per_step * _TOKENS_PRICED / self.question.job.tokens

    @property
    def cost_per_billion_tokens(self) -> float | None:
        """Dollars, where a price is known."""
        price = self.price_per_gpu_hour
        return None if price is None else price * self.gpu_hours_per_billion_tokens


def answer(
    question: Question, layout: Layout, stages: Sequence[Stage], prediction: Prediction, price: float | None = None
) -> Answer:
    """What a report says of the layout; nothing is solved."""
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    costs = prices.price(layout, [stage.reshard for stage in stages])
    return Answer(
        question=question,
        layout=layout,
        stages=tuple(stages),
        prediction=prediction,
        stage_seconds=work_seconds(costs, counts_of(question.model, stages)),
        default=default_layout(question),
        price_per_gpu_hour=price,
    )


def work_seconds(costs: LayoutCosts, counts: Sequence[StageCount]) -> tuple[float, ...]:
    """Seconds of a step in which each stage works: its microbatches, gathers, reductions and update."""
    seconds = []
    for stage, count in enumerate(counts):
        cost = costs.stage_seconds(stage, count)
        each = cost.forward.total + cost.backward.total + cost.recompute_full.total
        seconds.append(costs.microbatches * each + cost.gather.total + cost.reduce.total + cost.optimizer.total)
    return tuple(seconds)


def differing(layout: Layout, other: Layout) -> dict[str, object]:
    """The keys in which `other` differs, with its values; dp_shard not where it follows from zero and dp."""
    keys = {key: getattr(other, key) for key in LAYOUT_KEYS if getattr(other, key) != getattr(layout, key)}
    if all(each.dp_shard == (each.dp if each.zero else 1) for each in (layout, other)):
        keys.pop("dp_shard", None)
    return keys


def differing_text(layout: Layout, other: Layout) -> str:
    """As it is pinned: `tp=4 sequence_parallel=true`."""
    found = differing(layout, other)
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in found.items())


# ---- assumptions -------------------------------------------------------------------------------------------


def assumptions(question: Question) -> tuple[str, ...]:
    """What the figures rest on that nobody has measured for this run, a sentence each."""
    hardware, job = question.hardware, question.job
    trainer = question.rules.capabilities.software
    loads = ""
    if question.model.experts is not None:
        fullest = job.expert_capacity or job.expert_imbalance
        how = "a capacity of" if job.expert_capacity else "the fullest expert rank gets"
        loads = f"; {how} × {fullest:g} its even share of tokens"
    said = [
        f"kernels and overlap as {trainer}'s; compute under communication × {hardware.overlap_compute_slowdown:g}, "
        f"communication × {hardware.overlap_communication_slowdown:g}; slowest rank × {hardware.straggler_slowdown:g}"
        + loads,
        "mfu counts attention in full, of which causal kernels do half"
        if not question.model.bidirectional
        else f"mfu counts the head at every token, and {MASKED_SHARE:.0%} of them are predicted",
    ]
    if job.document_length is not None:
        said.append(
            f"attention stays within documents, all of {job.document_length:,.0f} tokens; mfu counts it in full"
        )
    figures = nominal_figures(question)
    kind = str(hardware.provenance.get("kind", "stated"))
    said.append(
        f"{hardware.name} is {kind}" + (f"; nominal in it and its links: {', '.join(figures)}" if figures else "")
    )
    if left_out := hardware.left_out.get("overheads"):
        said.append(
            f"what {hardware.name} had no time to measure costs too little here: {first_of(left_out, 4)}; "
            "`cli.py profile --resume` measures it"
        )
    return tuple(said)


def nominal_figures(question: Question) -> tuple[str, ...]:
    """The figures of hardware and links that their source calls nominal."""
    hardware, dtype = question.hardware, question.job.precision
    sourced = {key: text for key, text in hardware.provenance.items() if isinstance(text, str)}
    if question.job.offload == "none":
        sourced.pop("host_link", None)
    found = [_NAMES.get(key, key.replace("_", " ")) for key, text in sourced.items() if text.startswith("nominal")]
    models = (("GEMM", hardware.gemm_models), ("attention", hardware.attention_models))
    for name, known in models:
        if any(model.dtype == dtype and model.source.startswith("nominal") for model in known):
            found.append(f"{name} in {dtype}")
    for link in question.cluster.links:
        parts = [part for part in ("bandwidth", "latency") if re.search(rf"{part}: nominal", link.source)]
        found += [f"{' and '.join(parts)} of {link.tier}"] if parts else []
    return tuple(found)


_NAMES = {
    "memory_bandwidth_bytes_per_second": "memory bandwidth",
    "context_bytes": "context",
    "communicator_bytes": "communicators",
    "allocator_slack": "allocator slack",
    "straggler_slowdown": "stragglers",
    "host_link": "link to the host",
    "host_operation_seconds": "host operations",
    "launch_seconds": "launches",
    "overlap_compute_slowdown": "compute under communication",
    "overlap_communication_slowdown": "communication under compute",
    "peak_flops_per_second": "peak FLOP/s",
    "memory_bytes": "memory",
}
