"""Torch's selective checkpoint that keeps what products and attention give: as the runtime does, and as it is timed."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default})
# Attention goes by its name, one a backend.
_ATTENTION = ("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward")


def keeping_products(also: Collection[Any] = ()) -> Any:
    """The contexts of a block's forward and of its second one, for `checkpoint`'s `context_fn`: the outputs of
    products, of attention and of the operations `also` are kept, everything else is computed again."""
    return create_selective_checkpoint_contexts(partial(_policy, _PRODUCTS.union(also)))


def _policy(kept: frozenset[Any], _context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operation.name().partition("::")[2] if hasattr(operation, "name") else ""
    if operation in kept or name.startswith(_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
