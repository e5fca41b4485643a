"""What a rank is told of the documents in its samples: their positions, and which tokens belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from planner.layout import Layout

from .context_parallel import SequenceShard, inputs_and_targets, pick
from .data.packing import Packing, document_starts
from .data.token_source import NO_TARGET


@dataclass(frozen=True)
class Documents:
    """Tensors of so many samples, None where documents change nothing ([Note: Packed documents]).

    `positions` [samples, sequence / cp] within their documents, of the tokens that the cp rank holds. `starts`
    [samples, sequence], where in the whole sample the document of each token begins: attention of a cp rank reaches
    beyond what it holds. Every pipeline stage has both, from the ids that it reads as the others do. `tokens`, a whole
    number, is how many of the step's count where not all do; the targets of the others are `NO_TARGET`.
    """

    positions: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """What is of each sample, as a chunk's arguments; what is not there is left out."""
        found = {"positions": self.positions, "starts": self.starts}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def chunk(self, parts: int) -> list[Documents]:
        """Cut into the documents of so many microbatches."""
        cut = {name: tensor.chunk(parts) for name, tensor in self.named().items()}
        return [
            Documents(**{name: pieces[part] for name, pieces in cut.items()}, tokens=self.tokens)
            for part in range(parts)
        ]


NO_DOCUMENTS = Documents()


def documents_of(ids: np.ndarray, packing: Packing | None, layout: Layout, cp_rank: int) -> Documents:
    """Positions and starts of token ids [samples, sequence + 1]."""
    if packing is None or not (packing.reset_positions or packing.reset_attention):
        return NO_DOCUMENTS
    whole = document_starts(ids[:, :-1], packing.end)
    starts, positions = torch.from_numpy(whole), None
    if packing.reset_positions:
        tokens = whole.shape[1] // layout.cp
        spans = SequenceShard(cp_rank, layout.cp, layout.cp_style).spans(tokens)
        positions = pick(torch.arange(whole.shape[1]) - starts, spans, 1).contiguous()
    return Documents(positions, starts if packing.reset_attention else None)


def own_tensors(
    ids: np.ndarray | tuple[torch.Tensor, torch.Tensor],
    packing: Packing | None,
    layout: Layout,
    cp_rank: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, Documents]:
    """Inputs and targets [samples, sequence / cp] and documents of a cp rank, of samples as a TokenSource has them.

    Where the loss of some tokens does not count, every rank must call it.
    """
    if isinstance(ids, tuple):  # a module's own
        return ids[0].to(device), ids[1].to(device), NO_DOCUMENTS
    inputs, targets = (of.to(device) for of in inputs_and_targets(torch.from_numpy(ids), layout, cp_rank))
    documents = documents_of(ids, packing, layout, cp_rank)
    tokens = None
    if packing is not None and packing.mask_loss:
        targets.masked_fill_(inputs == packing.end, NO_TARGET)
        # Of a dp rank's samples each of its tp · cp · pp ranks counts all.
        tokens = torch.tensor(int((ids[:, :-1] != packing.end).sum()), device=device)
        dist.all_reduce(tokens)
        tokens //= layout.tp * layout.cp * layout.pp
    there = {name: tensor.to(device) for name, tensor in documents.named().items()}
    return inputs, targets, Documents(**there, tokens=tokens)
