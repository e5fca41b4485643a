"""Steps of training with nothing of ours but the modules: one process, whole batch, torch's loss and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from planner.plan import Stage
from profiles.model import ModelSpec

from .context_parallel import whole_inputs_and_targets
from .data.packing import Packing, document_starts
from .data.token_source import NO_TARGET
from .experts import Balance, routers_of, update_selection_bias
from .parameters import initialise, named_buffers, named_parameters
from .transformer import Chunk, build_chunk


@dataclass(frozen=True)
class PlainRun:
    """Loss, gradient norm, and gradient norm after clipping of each step; parameters and
    selection biases by name after the last."""

    losses: list[float]
    norms: list[float]
    clipped_norms: list[float]
    parameters: dict[str, torch.Tensor]


def run_plain(
    model: ModelSpec,
    batches: Iterable[torch.Tensor],
    *,
    dtype: torch.dtype,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    clip_norm: float | None = None,
    balance: Balance | None = None,
    packing: Packing | None = None,
) -> PlainRun:
    """A step on each of `batches`, samples as a TokenSource has them, from the first values that `seed` gives.

    `balance` is of experts, where the model has some. With `packing` each document is run alone.
    """
    chunk = build_chunk(model, Stage.whole(model)).to(dtype).to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=model.layers, seed=seed)
    groups = [
        {"params": [p for p in chunk.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in chunk.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, clipped_norms = [], [], []
    routers = routers_of([chunk])
    for tokens in batches:
        for router in routers:
            router.balance, router.sequences_per_step = balance or Balance(), len(tokens)
        loss = _loss(chunk, tokens) if packing is None else _loss_of_documents(chunk, tokens, packing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(chunk.parameters(), clip_norm or float("inf"))
        gradients = [p.grad for p in chunk.parameters() if p.grad is not None]
        clipped_norms.append(torch.nn.utils.get_total_norm(gradients).item())
        optimizer.step()
        optimizer.zero_grad()
        update_selection_bias(routers, [])
        losses.append(loss.item())
        norms.append(norm.item())
    trained = (*named_parameters([chunk]), *named_buffers([chunk]))
    parameters = {name: tensor.detach() for name, tensor in trained}
    return PlainRun(losses, norms, clipped_norms, parameters)


def _loss(chunk: Chunk, tokens: torch.Tensor) -> torch.Tensor:
    inputs, targets = whole_inputs_and_targets(tokens)
    return F.cross_entropy(chunk(inputs).flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)


def _loss_of_documents(chunk: Chunk, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The mean over all tokens that count, each document a forward pass of its own ([Note: Packed documents]).

    Only of documents whose positions and attention are both reset is a row so many rows.
    """
    assert packing.reset_positions
    assert packing.reset_attention
    sums, counted = [], 0
    for row in tokens:
        ids, targets = row[:-1], row[1:]
        starts = torch.from_numpy(document_starts(ids[None].numpy(), packing.end))[0]
        for begin in starts.unique().tolist():
            own = starts == begin
            counts = ids[own] != packing.end if packing.mask_loss else torch.ones_like(ids[own], dtype=torch.bool)
            logits = chunk(ids[None, own])[0]
            sums.append(F.cross_entropy(logits[counts], targets[own][counts], reduction="sum"))
            counted += int(counts.sum())
    return torch.stack(sums).sum() / counted
