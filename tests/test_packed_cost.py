"""What packed documents cost: pairs of tokens by brute force, and plans that are priced by them."""

from __future__ import annotations

import doctest
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import planner.packed_cost
from planner.compute_cost import ComputeModel
from planner.compute_seconds import DOCUMENT_OPERATIONS, NO_SECONDS, ComputeCost
from planner.job import TrainingJob
from planner.layout import Layout
from planner.packed_cost import attended_documents, document_work, even_length, row_pieces
from planner.plan import load, save
from planner.question import Question, ask
from profiles.catalogue import resolve_hardware_path, resolve_model
from profiles.hardware import HardwareProfile, load_hardware
from profiles.input_error import InputError
from profiles.software import load_software
from profiles.store import Reader
from runtime.document_attention import BODIES, DOCUMENTS
from tests.operations import Operations
from tests.oracles.small_world import small_hardware
from tests.plans import make_plan, tiny_llama

BACKWARD = torch.ops.meshwright.document_attention_backward.default


def rows_of(lengths: np.ndarray, sequence: int) -> tuple[float, float]:
    """(Σ L², pieces) of a row, the mean over all places where rows of documents in a circle can begin."""
    documents = np.repeat(np.arange(len(lengths)), lengths)
    around = np.tile(documents, 1 + -(-sequence // len(documents)))
    counts = []
    for start in range(len(documents)):
        row = around[start : start + sequence]
        ends = np.flatnonzero(np.diff(row)) + 1
        counts.append(np.diff(np.concatenate([[0], ends, [sequence]])))
    return float(np.mean([(row**2).sum() for row in counts])), float(np.mean([len(row) for row in counts]))


@pytest.mark.parametrize(("sequence", "length"), [(1, 5), (16, 1), (16, 4), (16, 7), (16, 16), (16, 30)])
def test_rows_of_even_documents_are_as_counted(sequence: int, length: int) -> None:
    squares, pieces = rows_of(np.full(40, length), sequence)
    row = row_pieces(sequence, length)
    assert row.number * row.length == pytest.approx(sequence)
    assert row.number * row.length**2 == pytest.approx(squares)
    assert row.pieces == pytest.approx(pieces)


@pytest.mark.parametrize("sequence", [4, 32, 200])
def test_one_length_stands_for_documents_of_all_lengths(sequence: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 120, 300)
    even = even_length([(1.0, lengths)], sequence)
    row = row_pieces(sequence, even)
    assert row.number * row.length**2 == pytest.approx(rows_of(lengths, sequence)[0], rel=1e-2)
    # Few long documents have most of the pairs.
    assert lengths.mean() < even < lengths.max()
    assert even_length([(1.0, np.full(9, 7))], sequence) == pytest.approx(7)
    assert even_length([(1.0, np.append(lengths, 0))], sequence) == even


def test_a_blend_weighs_its_parts() -> None:
    short, long = np.full(5, 10), np.full(1, 100)
    shares = [row_pieces(64, even_length([(w, short), (1 - w, long)], 64)).length for w in (1e-9, 0.25, 1 - 1e-9)]
    ends = [row_pieces(64, length).length for length in (100, 10)]
    assert shares == pytest.approx([ends[0], 0.75 * ends[0] + 0.25 * ends[1], ends[1]], rel=1e-6)


def test_the_worked_example() -> None:
    assert doctest.testmod(planner.packed_cost) == doctest.TestResults(failed=0, attempted=1)


def attention_seconds(job: TrainingJob) -> float:
    facts = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    cost = ComputeModel(resolve_model("llama3-8b"), facts, job, load_software("meshwright").software).block(Layout())
    return cost.forward.attention + cost.backward.attention


def test_attention_is_priced_by_its_documents() -> None:
    job = TrainingJob(global_batch=8, sequence=32768)
    whole = attention_seconds(job)
    packed = attention_seconds(replace(job, document_length=2048.0))
    # A model of attention with one rate: seconds are as the pairs of tokens.
    assert packed / whole == pytest.approx(row_pieces(32768, 2048).length / 32768)
    assert attended_documents(Layout(micro_batch=2), job) == (2.0, 32768.0)
    longer = [attention_seconds(replace(job, document_length=n)) for n in (64.0, 4096.0, 1e9)]
    assert longer == sorted(longer)
    assert longer[-1] == pytest.approx(whole, rel=1e-4)


def test_a_call_more_issues_so_many_operations() -> None:
    q, k, v = (torch.rand(1, heads, 48, 8) for heads in (4, 2, 2))
    counted = []
    for length in (24, 16, 12):
        starts = torch.arange(48).div(length, rounding_mode="floor").mul(length).unsqueeze(0)
        with Operations() as forward:
            outputs, logarithms = BODIES[DOCUMENTS](q, k, v, starts)
        with Operations() as backward:
            BODIES[BACKWARD](outputs, q, k, v, outputs, logarithms, starts)
        counted.append((forward.number, backward.number))
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counted)] == [DOCUMENT_OPERATIONS] * 2


def test_on_a_cpu_each_call_takes_its_time() -> None:
    hardware, layout = small_hardware(launch_seconds=1e-5, backend="gloo"), Layout(micro_batch=2)
    job = TrainingJob(global_batch=8, sequence=64, document_length=16.0)

    def work(hardware: HardwareProfile, dtype: str = "fp32") -> ComputeCost:
        return document_work(layout, job, hardware, lambda *_: NO_SECONDS, 1.0, 1.0, 1.0, dtype=dtype)

    calls = 2 * (1 + 63 / 16) - 1
    assert work(hardware).forward.total == pytest.approx(calls * 9e-5)
    assert work(hardware).backward.total == pytest.approx(calls * 16e-5)
    gpu = replace(hardware, backend="nccl")
    assert (work(gpu).forward.total, work(gpu).forward.operations) == (0.0, pytest.approx(9 * calls))
    assert work(gpu, "bf16").forward == NO_SECONDS  # one call for all documents


def test_a_job_has_a_document_length_or_does_not_say_it(tmp_path: Path) -> None:
    job = TrainingJob(global_batch=8, sequence=64)
    assert "document_length" not in job.to_dict()
    packed = replace(job, document_length=12.5)
    assert TrainingJob.from_dict(Reader(packed.to_dict(), source="job")) == packed
    with pytest.raises(InputError, match="document_length"):
        TrainingJob.from_dict(Reader(job.to_dict() | {"document_length": 0}, source="job"))
    plan = make_plan(tiny_llama(), Layout(), replace(packed, precision="fp32"))
    save(plan, tmp_path / "plan.yaml")
    assert load(tmp_path / "plan.yaml") == plan


def question(length: float | None, target: str = "meshwright") -> Question:
    return ask("llama3-8b", "dgx-h100:1", 8, 8192, document_length=length, target=target)


def test_only_our_own_runtime_is_priced_so() -> None:
    assert question(100.0).job.document_length == 100.0
    with pytest.raises(InputError, match="priced as our own runtime attends"):
        question(100.0, "torchtitan")
