"""python benchmarks/one_gpu.py --hardware PROFILE.yaml [--case TEXT] [--torchtitan FOLDER]: models of 1 to 8 B on one
GPU, predicted beside measured.

Each case is a model under one micro batch, precision and mode of recomputation, in a process of its own: what a step
takes (median), its tokens per second, model FLOPs per second as a share of the device's peak and of the fastest GEMM of
the profile, and the memory that torch's allocator had at most, in tensors and reserved. Beside them stands what the
plan for it predicts, the context and communicators left out, of which the allocator knows nothing. With `--torchtitan`
the same step of torchtitan 0.2.2, compiled as its trainer compiles, is run in the same process, in turn, where its
model is that one; memory is then not measured.

First values are drawn on the device: they do not matter, and to draw those of a run takes minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, where `runtime` is a benchmark

import torch
from closed_loop import UNPROVEN
from torch import multiprocessing as mp

from planner.calibrate import predicted_parts
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.question import Question
from planner.record import RunRecord
from planner.search import make_plan, solve_layout
from profiles.catalogue import resolve_model
from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile, load_hardware
from profiles.parent_process import die_with_parent
from runtime.clock import Clock
from runtime.compilation import choose_compilation
from runtime.parallelize import allocate_chunks, shape_chunks
from runtime.parameters import clear_buffers, parameters_of
from runtime.process_group import process_group
from runtime.step import mesh_of, state_of, training_step

WARM_UP_STEPS = 3
_PATIENCE_SECONDS = 300.0
_OUTSIDE = ("context", "communicators")  # of predicted memory: what torch's allocator does not hand out


@dataclass(frozen=True)
class Case:
    """What to train on the one GPU."""

    model: str
    sequence: int
    micro_batch: int
    microbatches: int = 1
    recompute: str = "none"
    precision: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.model} {self.microbatches}×{self.micro_batch}×{self.sequence} {self.precision} {self.recompute}"


CASES = (
    Case("llama-3.2-1b", 4096, 2),
    Case("llama-3.2-1b", 4096, 8, recompute="full"),
    Case("llama-3.2-1b", 4096, 4, recompute="selective"),
    Case("llama-3.2-1b", 1024, 2, microbatches=4),
    Case("llama-3.2-1b", 4096, 2, precision="fp8"),
    Case("gpt2-xl", 1024, 8),
    Case("llama-3.2-3b", 4096, 2),
    Case("llama-3.2-3b", 4096, 4, recompute="full"),
    Case("mistral-7b", 2048, 1),
    Case("mistral-7b", 2048, 2, recompute="full"),
    Case("mistral-7b", 4096, 2, microbatches=2, recompute="full"),
    Case("llama3-8b", 2048, 1, recompute="full"),
)


@dataclass
class Found:
    """What a case took: seconds of each step, parts of one by the runtime's clock and by the names of its kernels,
    bytes; of torchtitan too where it ran."""

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    kernel_names: dict[str, float] = field(default_factory=dict)
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    compile_seconds: float = 0.0
    titan_seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


def plan_of(case: Case, hardware: HardwareProfile) -> Plan:
    """The plan of this very case, whether it fits or not."""
    cluster = ClusterSpec(
        name="one-gpu",
        hardware=hardware.name,
        nodes=1,
        devices_per_node=1,
        memory_bytes=hardware.memory_bytes,
        links=(),
    )
    job = TrainingJob(
        global_batch=case.micro_batch * case.microbatches, sequence=case.sequence, precision=case.precision
    )
    question = Question(resolve_model(case.model), cluster, hardware, job)
    solved, _ = solve_layout(question, Layout(micro_batch=case.micro_batch), case.recompute)
    return make_plan(question, solved, UNPROVEN)


# ---- the process of a case -----------------------------------------------------------------------------------


def measure(case: Case, plan: Plan, steps: int, titan: bool) -> Found:
    """Run the case in a process of its own."""
    with socket.socket() as probe, tempfile.NamedTemporaryFile() as kept:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        process = mp.get_context("spawn").Process(target=_run, args=(case, plan, steps, titan, port, kept.name))
        process.start()
        process.join(_PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            return Found(failed=f"no end after {_PATIENCE_SECONDS:.0f} s")
        written = Path(kept.name).read_text()
        return Found(**json.loads(written)) if written else Found(failed=f"exit code {process.exitcode}")


def _run(case: Case, plan: Plan, steps: int, titan: bool, port: int, kept: str) -> None:
    die_with_parent()
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    found = Found()
    try:
        with process_group(1, _PATIENCE_SECONDS) as device:
            _measure(case, plan, steps, titan, device, found)
    except Exception as error:
        found.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        traceback.print_exc()
    Path(kept).write_text(json.dumps(asdict(found)))


def _measure(case: Case, plan: Plan, steps: int, titan: bool, device: torch.device, found: Found) -> None:
    step, clock = _ours(plan, device)
    cuda = device.type == "cuda"
    begun = time.perf_counter()
    step()
    _wait(device)
    found.compile_seconds = time.perf_counter() - begun
    for _ in range(WARM_UP_STEPS - 1):
        step()
    theirs = _titan(plan, device) if titan and why_not(case, plan) is None else None
    for _ in range(steps):
        found.seconds.append(_timed(step, device))
        if theirs is not None:
            found.titan_seconds.append(_timed(theirs, device))
    clock.read()
    step()
    found.parts = clock.read()
    if cuda and theirs is None:
        found.allocated_bytes = torch.cuda.max_memory_allocated(device)
        found.reserved_bytes = torch.cuda.max_memory_reserved(device)
    if cuda:
        found.kernels, found.kernel_names = _kernels(step)


_KINDS = {
    "gemm": ("nvjet", "gemm", "cutlass", "cublas", "splitk"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "adamw": ("adam",),
}


def _kernels(step: Callable[[], object]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step in kernels of each kind by their names, and of the longest ones by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kinds, names = dict.fromkeys((*_KINDS, "memory"), 0.0), dict[str, float]()
    for event in trace.key_averages():
        seconds, name = event.self_device_time_total / 1e6, event.key.lower()
        kind = next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "memory")
        kinds[kind] += seconds
        names[event.key[:90]] = seconds
    return kinds, dict(sorted(names.items(), key=lambda pair: -pair[1])[:25])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - begun


def _tokens(plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, plan.model.vocab_size, (plan.job.global_batch, plan.job.sequence + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _ours(plan: Plan, device: torch.device) -> tuple[Callable[[], None], Clock]:
    """The runtime's step, as the trainer takes it, and its clock."""
    how, _ = choose_compilation(plan, None, device.type)
    mesh = mesh_of(plan, device)
    chunks = shape_chunks(plan, mesh, dtype=torch.float32, compilation=how)
    allocate_chunks(chunks, device)
    with torch.no_grad():
        for parameter in parameters_of(chunks):
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    clear_buffers(chunks)
    state = state_of(plan, mesh, chunks, device, dtype=torch.float32, weight_decay=0.1)
    inputs, targets = _tokens(plan, device)

    def step() -> None:
        training_step(state, inputs, targets, learning_rate=1e-4, clip_norm=1.0)

    return step, state.runner.clock


def why_not(case: Case, plan: Plan) -> str | None:
    """The reason why torchtitan is not run beside a case."""
    if plan.model.norm != "rmsnorm" or plan.model.positions != "rope":
        return "its model is Llama's"
    return None if case.precision == "bf16" and case.recompute != "selective" else "another precision or recomputation"


def _titan(plan: Plan, device: torch.device) -> Callable[[], object]:
    from titan_loops import Titan  # where it is installed

    loop = Titan(plan, {}, device, mixed=True, compiled=True)
    inputs, targets = _tokens(plan, device)
    for _ in range(WARM_UP_STEPS):
        loop.step(inputs, targets)
    return lambda: loop.step(inputs, targets)


# ---- the report ----------------------------------------------------------------------------------------------


def show(case: Case, plan: Plan, found: Found, hardware: HardwareProfile) -> dict[str, Any]:
    """A case's lines; gives them as figures."""
    prediction = plan.prediction
    row: dict[str, Any] = {"case": case.name, "predicted": prediction.to_dict()} | asdict(found)
    print(f"\n{case.name}")
    if found.failed:
        print(f"    {found.failed}")
        return row
    seconds = found.step_seconds
    error = prediction.step_seconds / seconds - 1
    flops = plan.model.step_flops(plan.job.global_batch, plan.job.sequence) / seconds
    peak = max(hardware.peak_flops_per_second.get(case.precision, 0.0), 1.0)
    spread = (max(found.seconds) - min(found.seconds)) / seconds
    print(
        f"    step {prediction.step_seconds * 1e3:.1f} ms predicted, {seconds * 1e3:.1f} ms measured ({error:+.1%}; "
        f"spread {spread:.1%}), {plan.job.tokens / seconds:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP/s, "
        f"{flops / peak:.1%} of the fastest GEMM; first step {found.compile_seconds:.0f} s"
    )
    whole = RunRecord(Path(), plan, "", "", 0, seconds, {}, {})
    row["predicted_parts"] = parts = predicted_parts(hardware, whole)
    print(f"    predicted ms {_ms(parts)}\n    kernels ms   {_ms(found.kernels)}\n    measured ms  {_ms(found.parts)}")
    items = prediction.memory_bytes[0]
    total = sum(value for part, value in items.items() if part not in _OUTSIDE)
    slack = items.get("allocator_slack", 0.0) + items.get("reserve", 0.0)
    if found.allocated_bytes:
        print(
            f"    memory {(total - slack) / 1e9:.2f} GB predicted, {found.allocated_bytes / 1e9:.2f} allocated "
            f"({(total - slack) / found.allocated_bytes - 1:+.1%}); with slack {total / 1e9:.2f}, reserved "
            f"{found.reserved_bytes / 1e9:.2f} ({total / found.reserved_bytes - 1:+.1%})"
        )
        print(f"    { ({part: f'{value / 1e9:.2f}' for part, value in items.items() if value}) }")
    if found.titan_seconds:
        ratio = statistics.median(a / b for a, b in zip(found.seconds, found.titan_seconds, strict=True))
        print(f"    torchtitan {statistics.median(found.titan_seconds) * 1e3:.1f} ms: ours takes {ratio:.3f} of it")
    return row


def _ms(seconds: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value * 1e3:.1f}" for name, value in seconds.items() if value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hardware", type=Path, required=True, help="profile of this GPU")
    options.add_argument("--case", action="append", metavar="TEXT", help="cases whose name has the text; repeatable")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--torchtitan", type=Path, metavar="FOLDER")
    options.add_argument("--keep", type=Path, metavar="FILE.json", help="what was found, also of unfinished runs")
    arguments = options.parse_args()
    if arguments.torchtitan:
        sys.path.append(str(arguments.torchtitan))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(arguments.torchtitan)])
    hardware = load_hardware(arguments.hardware)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {name}, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )
    print("command: python " + " ".join(sys.argv))
    rows = []
    for case in CASES:
        if arguments.case and not any(text in case.name for text in arguments.case):
            continue
        plan = plan_of(case, hardware)
        found = measure(case, plan, arguments.steps, bool(arguments.torchtitan))
        rows.append(show(case, plan, found, hardware))
        sys.stdout.flush()
        if arguments.keep:
            arguments.keep.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
