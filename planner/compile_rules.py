"""What torch.compile cannot run, or not faster: every rule that leaves it off, with its reason in words."""

from __future__ import annotations

from profiles.model import ModelSpec
from profiles.traced_model import TracedModel

from .layout import Layout


def why_not_compiled(layout: Layout, model: ModelSpec) -> str | None:
    """The reason why the blocks of this model in this layout are not compiled."""
    if model.experts is not None:
        return (
            f"{model.name} has experts: how many tokens each gets is read by the host, and a graph that is whole "
            "cannot wait for it"
        )
    if isinstance(model, TracedModel):
        return f"{model.factory} makes a module of its own, whose blocks run as they are"
    if layout.splits_backward:
        return (
            f"{layout.schedule} splits each backward in two, which torch 2.11 to 2.13 does not do with compiled "
            "blocks; 1f1b and interleaved-1f1b do not split it"
        )
    return None


def why_no_asynchronous_tp(layout: Layout, model: ModelSpec, devices_per_node: int) -> str | None:
    """The reason why tp's collectives do not run in pieces beside the pieces of their products.

    torch does it in compiled code, and through memory that the devices of a node open to each other.
    """
    if layout.tp == 1:
        return "tp=1: there is nothing to overlap"
    if not layout.sequence_parallel:
        return (
            f"tp={layout.tp} without sequence_parallel: torch cuts gathers and reduce-scatters into pieces, and here "
            "are all-reduces"
        )
    if all(model.has_bias(name) for name in model.linear_shapes):
        return f"{model.name} adds a bias in every product, and torch cuts only products without"
    if devices_per_node % layout.tp:
        return f"tp={layout.tp} and nodes of {devices_per_node} devices: the pieces pass through the memory of one node"
    return why_not_compiled(layout, model)
