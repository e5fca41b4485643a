"""First values of a module of another package: made whole on every rank, then each rank's part of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from profiles.traced_model import TracedModel

from ..local_parameters import local_part
from ..parameters import RECOMPUTE_PREFIX, cut, named_parameters
from ..transformer import Chunk
from .module_factory import make_with_values

_PREFIX = "module."  # of the module in its chunk


def load_first_values(chunks: Sequence[Chunk], model: TracedModel, seed: int) -> None:
    """Copy into chunks that have memory what the factory draws under `seed`, buffers too.

    A factory draws as it likes, parameter after parameter, so only the whole module has values that no layout changes:
    every rank makes it on the CPU, in fp32, takes its shards, and lets it go.
    """
    whole = make_with_values(model.factory, seed)
    values = dict(whole.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            local_part(parameter).copy_(cut(values[name.removeprefix(_PREFIX)], parameter))
        buffers = dict(whole.named_buffers())
        for chunk in chunks:
            for path, buffer in chunk.named_buffers():
                buffer.copy_(buffers[path.replace(RECOMPUTE_PREFIX, "").removeprefix(_PREFIX)])
