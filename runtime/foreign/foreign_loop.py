"""Steps of training with nothing of ours: the factory's module in one process, whole batch, its loss, torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.plan import Plan
from profiles.traced_model import TracedModel

from ..plain_loop import PlainRun
from .module_contract import Samples, contract_of
from .module_factory import make_on_meta, make_with_values
from .op_graph import on_meta
from .trace_module import one_sample


def module_batches(plan: Plan, steps: int) -> Iterator[Samples]:
    """(inputs, target) of each whole step: the module's own samples, or random token ids; the same in any layout."""
    model, samples = plan.model, plan.job.global_batch
    assert isinstance(model, TracedModel)
    contract = contract_of(make_on_meta(model.factory), model.factory)
    for step in range(1, steps + 1):
        if contract.example_batch is not None:
            yield contract.draw(samples, 0, step)
            continue
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, model.vocab_size, (samples, plan.job.sequence + 1), generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def computes_in_double(model: TracedModel) -> bool:
    """Whether the module with float64 parameters computes in float64 alone. Many cast in their norms, to fp32."""
    module = make_on_meta(model.factory).to(torch.float64)
    inputs, _ = one_sample(contract := contract_of(module, model.factory), model.tokens)
    with torch.no_grad(), on_meta(), _NarrowCasts() as casts:
        contract.run(module, inputs.to(torch.float64) if inputs.is_floating_point() else inputs)
    return not casts.seen


class _NarrowCasts(TorchDispatchMode):
    """Whether anything of float64 was made something of a narrower float."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.seen = self.seen or (output.is_floating_point() and output.dtype != torch.float64)
        return output


def run_module_plain(
    model: TracedModel,
    batches: Iterable[Samples],
    *,
    dtype: torch.dtype,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    clip_norm: float | None = None,
) -> PlainRun:
    """A step on each of `batches`, (inputs, target) of a whole step, from the first values that `seed` gives."""
    module = make_with_values(model.factory, seed).to(dtype)
    contract = contract_of(module, model.factory)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, clipped_norms = [], [], []
    for inputs, target in batches:
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        loss = contract.loss(contract.run(module, inputs), target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
        clipped_norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    trained = {f"module.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    return PlainRun(losses, norms, clipped_norms, trained)
