"""What layouts a module of another package can have, as the runtime cuts it: each rule with its reason in words."""

from __future__ import annotations

from profiles.model import ModelSpec
from profiles.traced_model import TracedModel

from .job import TrainingJob
from .layout import Layout


def why_no_degrees(layout: Layout, model: ModelSpec, job: TrainingJob) -> str | None:
    """The reason why such a module cannot have these degrees; None for every other model."""
    if not isinstance(model, TracedModel):
        return None
    if job.sequence != model.tokens:
        return f"{model.factory} has samples of {model.tokens} tokens, and the sequence has {job.sequence}"
    if job.precision not in ("fp32", "bf16"):
        return f"{job.precision}: the loss and the products of {model.factory} are its own; ask for --precision bf16"
    if layout.cp > 1:
        return f"cp={layout.cp}: the attention of {model.factory} is its own, and has no keys of other ranks"
    shared = [name for name in model.before.parameter_names if name in model.after.parameter_names]
    if layout.pp > 1 and len(shared) > 1:
        return f"pp={layout.pp}: {' and '.join(shared)} of {model.factory} are used before its blocks and after them"
    return _why_no_tp(layout, model) if layout.tp > 1 else None


def _why_no_tp(layout: Layout, model: TracedModel) -> str | None:
    tp = layout.tp
    if layout.sequence_parallel:
        return f"sequence_parallel: between the linears of {model.factory} nothing is cut over tp"
    if not model.tp_plan:
        return f"tp={tp}: {model.factory} has no tp_plan, and its blocks no pair of linears that one can see"
    for product in model.block.products:
        style = model.style_of(product)
        cut = {"colwise": product.outputs, "rowwise": product.inputs}.get(style or "", tp)
        if cut % tp:
            return (
                f"tp={tp} does not divide the {cut} {'outputs' if style == 'colwise' else 'inputs'} of {product.module}"
            )
    for attention in model.block.attention if model.tp_heads else ():
        for heads, of in ((attention.heads, "attention"), (attention.kv_heads, "key-value")):
            if heads % tp:
                return f"tp={tp} does not divide the {heads} {of} heads of {model.factory}"
    return None


def why_no_schedule(layout: Layout, model: ModelSpec) -> str | None:
    """The reason why such a module does not run under the layout's schedule."""
    if isinstance(model, TracedModel) and layout.splits_backward:
        return f"schedule={layout.schedule}: the backward of {model.factory} is run as a whole"
    return None
