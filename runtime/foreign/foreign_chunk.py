"""A pipeline stage of a module of another package: its own forward on every stage, with only the stage's blocks in it.

[Note: A stage of a module]
Every stage has the whole module and runs its own forward, so that whatever a block takes beside the stream (rotary
tables, masks) is made there, of the samples that every stage is given. What is not the stage's has no memory: blocks
before the stage's pass the stream on, the first of them giving what came from the stage before; past the stage's last
block the forward is left, and what is after never runs. On stages past the first the parameters before the blocks are
zeros of one element, expanded: what they would make is the stream, which is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.plan import Stage
from profiles.input_error import InputError
from profiles.traced_model import TracedModel

from ..transformer import Chunk
from .block_chain import blocks_of, stream_of
from .module_contract import contract_of
from .module_factory import make_on_meta


class ForeignChunk(Chunk):
    """What one stage holds of the module, as [Note: A stage of a module] has it.

    `loss_share` is what the mean loss of a microbatch counts in the step's. `activation_dtype` is that of the stream.
    Parameters have the module's own names, after `module.`, under every layout.
    """

    reads_source = True

    def __init__(self, model: TracedModel, stage: Stage) -> None:
        nn.Module.__init__(self)
        self.module = make_on_meta(model.factory)
        check_as_planned(self.module, model)
        self.contract = contract_of(self.module, model.factory)
        self.embedding = self.norm = self.head = None
        self.tied = False
        self.loss_share = 1.0
        self.activation_dtype = torch.float32
        self._model, self._stage = model, stage
        self._placeholders: list[tuple[nn.Module, str, torch.Size]] = []
        self._tied_names = _tied_names(self.module)
        self._received = _Stream()
        holder, names = self.module.get_submodule(model.block_list), list(blocks_of(self.module, model.block_list))
        self.blocks = _LocalBlocks(holder, names, stage)  # type: ignore[assignment]
        self._leave_out()

    def tie(self) -> None:
        """Make again what giving memory to modules one by one undoes: tied parameters, and the zeros of parameters
        that are not here. To be called after it."""
        for first, others in self._tied_names.items():
            parameter = self.module.get_parameter(first)
            for name in others:
                owner, attribute = _owner(self.module, name)
                setattr(owner, attribute, parameter)
        device = next(self.parameters()).device
        for owner, attribute, shape in self._placeholders:
            setattr(owner, attribute, torch.zeros((), dtype=self.activation_dtype, device=device).expand(shape))
        # Where no block is left whose place a stand-in could take, after the hooks of whoever wrapped the block.
        blocks, stage = list(blocks_of(self.module, self._model.block_list).values()), self._stage
        if stage.first == 0 < stage.end and not stage.embedding:
            blocks[0].register_forward_pre_hook(self._with_received, with_kwargs=True)
        if stage.first < stage.end == self._model.layers and not stage.head:
            blocks[-1].register_forward_hook(_leave_with_output)

    def tied_copy(self) -> tuple[nn.Parameter, bool] | None:
        """The parameter that both ends of the module use, where another stage has the other end."""
        shared = set(self._model.before.parameter_names) & set(self._model.after.parameter_names)
        if not shared or self._stage.embedding == self._stage.head:
            return None
        return self.module.get_parameter(shared.pop()), self._stage.embedding

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, source: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Inputs, past the first stage the stream and the inputs as `source` -> the stream.

        On the last stage: this microbatch's share of the step's loss, or without targets the module's output.
        """
        if not self._stage.embedding:
            assert source is not None, "stages past the first are given the inputs too"
            self._received.tensor = x
            x = source
        if x.is_floating_point():
            x = x.to(self.activation_dtype)
        try:
            output = self.contract.run(self.module, x)
        except _StageOver as over:
            return over.stream
        finally:
            self._received.tensor = None
        if targets is None:
            return output
        loss = self.contract.loss(output, targets)
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.loss_share
        # Every tp rank has the whole loss, and with it whole gradients; their shares add up to it.
        return loss - (1.0 - 1.0 / self.plain_copies) * loss.detach()

    def _with_received(self, _block: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        """The arguments of a block with the stream that came from the stage before."""
        name, stream = self._model.stream_argument, self._received.tensor
        if name.isdigit():
            place = int(name)
            return (*arguments[:place], stream, *arguments[place + 1 :]), keywords
        return arguments, {**keywords, name: stream}

    # ---- what is elsewhere -----------------------------------------------------------------------------

    def _leave_out(self) -> None:
        model, stage = self._model, self._stage
        holder = self.module.get_submodule(model.block_list)
        for index, (name, block) in enumerate(blocks_of(self.module, model.block_list).items()):
            if index == 0 < stage.first:
                setattr(holder, name, _Received(block, model, self._received))
            elif index < stage.first:
                setattr(holder, name, _PassOn(block, model))
            elif index >= stage.end:
                setattr(holder, name, _End(block, model))
        if not stage.embedding:
            for name in set(model.before.parameter_names) - set(model.after.parameter_names if stage.head else ()):
                shape = self.module.get_parameter(name).shape
                for every in (name, *self._tied_names.pop(name, ())):
                    owner, attribute = _owner(self.module, every)
                    del owner._parameters[attribute]
                    self._placeholders.append((owner, attribute, shape))
        if not stage.head:
            for name in set(model.after.parameter_names) - set(model.before.parameter_names):
                owner, attribute = _owner(self.module, name)
                owner.register_parameter(attribute, None)


_PLAIN = (str, int, float, bool)


class _Stream:
    """What came from the stage before, while a forward runs."""

    tensor: torch.Tensor | None = None


class _LocalBlocks(MutableMapping[str, nn.Module]):
    """The stage's blocks by their index in the whole module; to set one replaces it in the module."""

    def __init__(self, holder: nn.Module, names: Sequence[str], stage: Stage) -> None:
        self._holder = holder
        self._names = {str(index): names[index] for index in range(stage.first, stage.end)}

    def __getitem__(self, index: str) -> nn.Module:
        return self._holder.get_submodule(self._names[index])

    def __setitem__(self, index: str, block: nn.Module) -> None:
        setattr(self._holder, self._names[index], block)

    def __delitem__(self, index: str) -> None:
        raise TypeError("a stage keeps its blocks")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _StandIn(nn.Module):
    """In the place of a block that is another stage's. It has that block's plain attributes, by which some modules
    choose what they pass to it."""

    def __init__(self, block: nn.Module, model: TracedModel) -> None:
        super().__init__()
        self._argument, self._returns = model.stream_argument, model.block_returns
        self._plain = {name: value for name, value in vars(block).items() if isinstance(value, _PLAIN)}
        self._block_class = type(block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self._plain:
                return self._plain[name]
            value = getattr(self._block_class, name, self)
            if isinstance(value, _PLAIN):
                return value
            raise

    def _given(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
        return arguments[int(self._argument)] if self._argument.isdigit() else keywords[self._argument]

    def _packed(self, stream: torch.Tensor) -> Any:
        return (stream, *[None] * (self._returns - 1)) if self._returns else stream


class _PassOn(_StandIn):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self._packed(self._given(arguments, keywords))


class _Received(_StandIn):
    def __init__(self, block: nn.Module, model: TracedModel, received: _Stream) -> None:
        super().__init__(block, model)
        self._received = received

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
        assert self._received.tensor is not None, "a stage past the first is given the stream"
        return self._packed(self._received.tensor)


class _End(_StandIn):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        raise _StageOver(self._given(arguments, keywords))


class _StageOver(Exception):
    """Leaves the module's forward with the stream."""

    def __init__(self, stream: torch.Tensor) -> None:
        super().__init__()
        self.stream = stream


def _leave_with_output(_block: nn.Module, _arguments: Any, output: Any) -> None:
    raise _StageOver(stream_of(output))


def check_as_planned(module: nn.Module, model: TracedModel) -> None:
    """Raise InputError where the factory makes another module today than the one that was planned."""
    of_ends = {*model.before.parameter_names, *model.after.parameter_names}
    has_list = any(name == model.block_list for name, _ in module.named_modules())
    total = sum(parameter.numel() for parameter in module.parameters())
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if not has_list or not of_ends <= known or total != model.parameters:
        raise InputError(
            f"{model.factory} makes another module than the plan is for",
            where="plan: model",
            expected=f"{model.name} with {model.parameters:,} parameters and {model.layers} blocks, {model.block_list}",
            got=f"{type(module).__name__} with {total:,} parameters",
            hint="plan again",
        )


def _tied_names(module: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter that has several -> its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute
