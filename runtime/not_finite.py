"""A loss or gradient that is not finite: which rank it came from, found by running the forward passes once more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from planner.layout import Layout

from .disk import last_checkpoint
from .failure import RunFailed
from .local_parameters import local_part
from .mesh import coordinate_of
from .packed_rows import Documents
from .step import StepResult, TrainState
from .transformer import Chunk

_HEAD = 1 << 30  # the place of the head among the layers; the embedding's is -1, a block's its index


@dataclass(frozen=True, order=True)
class Finding:
    """What one rank saw. The smallest is where it began: the first layer, and there a rank whose own weights are
    not finite before those that only were given what it computed."""

    layer: int
    weights_finite: bool
    rank: int

    def __str__(self) -> str:
        name = {-1: "the embedding", _HEAD: "the head"}.get(self.layer, f"block {self.layer}")
        weights = "whose weights are finite" if self.weights_finite else "whose weights are not finite either"
        return f"the first values that are not finite come out of {name}, {weights}"


def failure(
    state: TrainState,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    documents: Documents,
    result: StepResult,
    layout: Layout,
    run_dir: Path,
    *,
    step: int,
    in_a_row: int,
) -> RunFailed:
    """The error that ends a run after `in_a_row` steps without an update; names the rank where it began.

    The same on every rank; every rank must call it, with the last step's samples.
    """
    own = _finding(state, inputs, targets, documents)
    shares = [math.isfinite(value) for value in result.shares.tolist()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (own, shares, _depth(state.chunks)))
    findings = [finding for finding, _, _ in every if finding is not None]
    no_loss = [rank for rank, (_, (loss, _), _) in enumerate(every) if not loss]
    no_norm = [rank for rank, (_, (_, norm), _) in enumerate(every) if not norm]
    if findings:
        rank, what = min(findings).rank, str(min(findings))
    elif no_loss:
        rank, what = no_loss[0], "its loss was not finite, but is when the same samples run once more"
    else:
        # Backward begins at the last layer, and what it overflows there spreads to the layers before.
        rank = max(no_norm, key=lambda rank: (every[rank][2], -rank))
        scaled = f" under a loss scale of {state.scaler.scale:g}" if state.scaler is not None else ""
        what = f"losses are finite, its gradients are not{scaled}"
    return RunFailed(
        f"made {in_a_row} steps in a row not finite, up to step {step}: {what}. None of them changed the weights; "
        f"{last_checkpoint(run_dir)}",
        rank=rank,
        stage=coordinate_of(rank, layout).pp,
    )


def _finding(state: TrainState, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents) -> Finding | None:
    """The first layer of this rank that gives something not finite in a forward pass of these samples."""
    spoilt: dict[int, nn.Module] = {}

    def watch(layer: int, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output  # modules of others give more than one
            if not stream.isfinite().all():
                spoilt[layer] = module

        return module.register_forward_hook(look)

    with ExitStack() as stack:
        for layer, module in _layers(state.chunks):
            stack.callback(watch(layer, module).remove)
        state.runner.evaluate(inputs, targets, documents)
    if not spoilt:
        return None
    first = min(spoilt)
    finite = all(bool(local_part(parameter).isfinite().all()) for parameter in spoilt[first].parameters())
    return Finding(first, finite, dist.get_rank())


def _layers(chunks: Sequence[Chunk]) -> list[tuple[int, nn.Module]]:
    layers: list[tuple[int, nn.Module]] = []
    for chunk in chunks:
        if chunk.embedding is not None:
            layers.append((-1, chunk.embedding))
        layers.extend((int(index), block) for index, block in chunk.blocks.items())
        if chunk.head is not None:
            layers.append((_HEAD, chunk.head))
    return layers


def _depth(chunks: Sequence[Chunk]) -> int:
    """The place of this rank's last layer in the model."""
    return max((layer for layer, _ in _layers(chunks)), default=-1)
