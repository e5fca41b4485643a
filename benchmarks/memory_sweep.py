"""python benchmarks/memory_sweep.py [--cases N] [--seed S] [--schedules NAME...]: memory of random legal pipelines.

Layouts of dense models are drawn over schedule, chunks, zero, tp, cp, recomputation and microbatches, and one pipeline
rank of each is predicted and run dry as in `memory.py`. Printed are all, the worst last, and the errors by schedule.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.job import TrainingJob
from planner.layout import Layout
from planner.rules import RuleContext, violations, why_no_recompute
from profiles.model import ModelSpec
from tests.distributed.memory_cases import BERT, GPT2, LLAMA_8, WIDE, Compared, MemoryCase, compare, in_child

_MODELS = {"llama": LLAMA_8, "wide": WIDE, "gpt2": GPT2, "bert": BERT}
_SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb1p", "zbv", "dualpipev")


def drawn(
    seed: int, schedules: tuple[str, ...], keep: Callable[[MemoryCase], bool]
) -> Iterator[tuple[str, MemoryCase]]:
    """Legal cases without end, each with its name."""
    dice = random.Random(seed)
    while True:
        name = dice.choice(list(_MODELS))
        case = _draw(dice, _MODELS[name], schedules)
        if case is not None and keep(case):
            yield f"{name} {_text(case)}", case


def _draw(dice: random.Random, model: ModelSpec, schedules: tuple[str, ...]) -> MemoryCase | None:
    schedule = dice.choice(schedules)
    precision, pp = dice.choice(("bf16", "fp32")), dice.choice((2, 2, 4))
    chunks = {"gpipe": 1, "1f1b": 1, "zbv": 2, "dualpipev": 2}.get(schedule) or dice.choice((1, 2, 4))
    tp, zero, dp = dice.choice((1, 1, 2, 4)), dice.choice((0, 1, 2, 3)), dice.choice((1, 2, 4))
    style = dice.choice(("none", "none", "ring", "all-to-all"))
    layout = Layout(
        tp=tp,
        sequence_parallel=tp > 1 and dice.random() < 0.7,
        cp=2 if style != "none" else 1,
        cp_style=style,
        pp=pp,
        dp=dp,
        dp_shard=dp if zero else 1,
        zero=zero,
        micro_batch=dice.choice((2, 4)),
        schedule=schedule,
        virtual_stages=chunks,
    )
    microbatches = dice.choice((1, 2, 4, 8, 8))
    job = TrainingJob(global_batch=layout.micro_batch * dp * microbatches, sequence=128, precision=precision)
    context = RuleContext(model, job, layout.world_size)
    if layout.stages > model.layers or violations(layout, context):
        return None
    if precision == "fp32" and zero == 0 and dp * layout.cp > 1:
        return None
    mode = dice.choice(("none", "selective", "full"))
    if why_no_recompute(mode, layout, context):
        mode = "none"
    again = dice.randint(1, model.layers // layout.stages) if mode != "none" else 0
    nothing, counts = (0,) * layout.stages, (again,) * layout.stages
    return MemoryCase(
        model=model,
        layout=layout,
        precision=precision,
        pipeline_rank=dice.randrange(pp),
        global_batch=job.global_batch,
        sequence=job.sequence,
        recompute=counts if mode == "full" else nothing,
        selective=counts if mode == "selective" else nothing,
        reshard=dice.choice((True, None, False)) if layout.stages_choose else None,
    )


def _text(case: MemoryCase) -> str:
    words = [case.precision, case.layout.short(), f"M{case.layout.microbatches(case.global_batch)}"]
    words.append(f"rank{case.pipeline_rank}")
    again = {"full": case.recompute[0], "selective": case.selective[0]}
    words += [f"{mode}{number}" for mode, number in again.items() if number]
    words += [f"reshard={case.reshard}"] if case.layout.stages_choose else []
    return " ".join(words)


def _attempt(case: MemoryCase) -> Compared | str:
    try:
        return compare(case)
    except Exception as error:  # one that cannot run is a finding, no reason to lose the others
        return f"{type(error).__name__}: {error}"


def _line(name: str, one: Compared) -> str:
    parts = sorted(set(one.predicted) | set(one.measured))
    off = {part: one.predicted.get(part, 0.0) - one.measured.get(part, 0) for part in parts}
    shown = "  ".join(f"{part} {more / one.measured_bytes:+.1%}" for part, more in off.items() if more)
    return f"{one.error:+7.2%}  {one.measured_bytes / 2**20:7.1f} MiB  {name}\n           {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", nargs="*", default=_SCHEDULES)
    parser.add_argument("--zero", type=int, nargs="*", default=(0, 1, 2, 3))
    asked = parser.parse_args()
    draws = drawn(asked.seed, tuple(asked.schedules), lambda case: case.layout.zero in asked.zero)
    cases = dict(next(draws) for _ in range(asked.cases))
    tried = dict(zip(cases, in_child(_attempt, cases.values()), strict=True))
    for name, found in tried.items():
        if isinstance(found, str):
            print(f"failed  {name}\n           {found}")
    results = {name: found for name, found in tried.items() if isinstance(found, Compared)}
    for name in sorted(results, key=lambda each: abs(results[each].error)):
        print(_line(name, results[name]))
    errors: dict[str, list[float]] = defaultdict(list)
    for name, case in cases.items():
        if name in results:
            errors[case.layout.schedule].append(results[name].error)
    for schedule, found in sorted(errors.items()):
        within = sum(abs(error) <= 0.03 for error in found)
        print(
            f"{schedule:<18}{len(found):>4} drawn, {within} within 3 %, {min(found):+.1%} to {max(found):+.1%}, "
            f"mean of sizes {mean(map(abs, found)):.1%}"
        )


if __name__ == "__main__":
    main()
