"""torchtitan's training step (0.2.2) without its trainer, which needs an accelerator: its model, parallelisation,
pipeline, loss, optimizer and clipping, put together as `Trainer.train_step` does.

Its Llama pairs neighbouring elements of a head for the rotary positions, the runtime the two halves, so the rows of wq
and wk are put in another order. Its gradients in a pipeline are those of the sum over tokens, which its trainer does
not divide; here the loss function divides, so that both sides train alike.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from plain_loops import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, Loop, Values
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims, parallel_dims, utils
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from planner.plan import Plan
from profiles.model import ModelSpec
from runtime.parameters import cut

if not torch.cuda.is_available():
    parallel_dims.device_type = utils.device_type = "cpu"  # it takes CUDA for granted

_NAMES = {
    "tok_embeddings.": "embedding.tokens.",
    "layers.": "blocks.",
    "ffn_norm.": "mlp_norm.",
    "feed_forward.": "mlp.",
    "output.": "head.",
}


class Titan:
    """A step of torchtitan's, on one rank; `mixed` in bf16 with float32 weights, `compiled` its blocks and loss.

    Without `values` its own first values are kept.
    """

    def __init__(
        self, plan: Plan, values: Values, device: torch.device, *, mixed: bool = False, compiled: bool = False
    ) -> None:
        logging.getLogger().setLevel(logging.WARNING)  # where it logs
        layout, config = plan.layout, config_of(plan)
        if mixed:
            config.training.mixed_precision_param = "bfloat16"
        config.compile.enable = compiled
        self.plan, self.config = plan, config
        self.dims = ParallelDims(
            dp_replicate=1,
            dp_shard=layout.dp,
            cp=1,
            tp=layout.tp,
            pp=layout.pp,
            ep=1,
            etp=1,
            world_size=layout.world_size,
        )
        arguments = model_arguments(plan.model, plan.job.sequence)
        with torch.device("meta"):
            model = Transformer(arguments)
        self.loss = build_cross_entropy_loss(config, parallel_dims=self.dims)
        self.last = True
        if self.dims.pp_enabled:
            self.schedule, self.parts, self.first, self.last = pipeline_llm(
                model, self.dims, config, device, arguments, parallelize_llama, self._divided_loss
            )
        else:
            self.parts = [parallelize_llama(model, self.dims, config)]
        for part in self.parts:
            part.to_empty(device=device)
            with torch.no_grad():
                part.init_weights(buffer_device=None)
            if values:
                fill(part, plan.model, values)
            for module in part.modules():
                if isinstance(module, FSDPModule) and device.type == "cpu":
                    module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        self.optimizers = build_optimizers(self.parts, config.optimizer, self.dims)
        self.context = utils.get_train_context(self.dims.tp_enabled)
        self.autocast: Any = nullcontext()
        if mixed:
            self.autocast = utils.maybe_enable_amp(self.dims, config.training.mixed_precision_param, device.type)

    def _divided_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits, targets) / self.plan.job.tokens

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizers.zero_grad()
        tokens: Any = torch.tensor(targets.numel())
        tokens = utils.dist_sum(tokens, self.dims.get_mesh("batch")) if self.dims.dp_enabled else float(tokens)
        if self.dims.pp_enabled:
            losses = self._pipeline(inputs, targets)
        else:
            losses = [self._forward_backward(*piece, tokens) for piece in self._pieces(inputs, targets)]
        utils.clip_grad_norm_(
            [parameter for part in self.parts for parameter in part.parameters()],
            CLIP_NORM,
            foreach=True,
            pp_mesh=self.dims.get_optional_mesh("pp"),
        )
        self.optimizers.step()
        if not losses:
            return 0.0
        total = torch.sum(torch.stack(losses))
        return (total.full_tensor() if isinstance(total, DTensor) else total).item() / self.plan.layout.tp

    def _pieces(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return zip(inputs.chunk(self.plan.microbatches), targets.chunk(self.plan.microbatches), strict=True)

    def _forward_backward(self, inputs: torch.Tensor, targets: torch.Tensor, tokens: Any) -> torch.Tensor:
        with self.context():
            with self.autocast:
                logits = self.parts[0](inputs)
                loss = self.loss(logits, targets) / tokens
            del logits
            loss.backward()
        return loss.detach()

    def _pipeline(self, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        losses: list[torch.Tensor] = []
        with self.context():
            self.schedule.step(
                *((inputs,) if self.first else ()),
                target=targets if self.last else None,
                losses=losses if self.last else None,
                return_outputs=False,
            )
        return [loss.detach() for loss in losses]


def titan(plan: Plan, values: Values, device: torch.device) -> Loop:
    return Titan(plan, values, device)


def config_of(plan: Plan) -> JobConfig:
    """Its defaults but for what makes the two sides do the same: recomputation, float32, our optimizer's numbers."""
    layout, config = plan.layout, JobConfig()
    config.training.seq_len = plan.job.sequence
    config.training.local_batch_size = plan.job.global_batch // layout.dp
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = plan.stages[0].recompute_mode(0)
    config.parallelism.tensor_parallel_degree = layout.tp
    config.parallelism.pipeline_parallel_degree = layout.pp
    config.parallelism.pipeline_parallel_schedule = {"1f1b": "1F1B", "gpipe": "GPipe"}[layout.schedule]
    config.parallelism.pipeline_parallel_microbatch_size = layout.micro_batch
    config.optimizer.lr = LEARNING_RATE
    config.optimizer.weight_decay = WEIGHT_DECAY
    return config


def model_arguments(model: ModelSpec, sequence: int) -> TransformerModelArgs:
    """The same shape; factors that leave ffn_hidden_size and the frequencies as they are."""
    return TransformerModelArgs(
        dim=model.hidden_size,
        n_layers=model.layers,
        n_heads=model.heads,
        n_kv_heads=model.kv_heads,
        vocab_size=model.vocab_size,
        multiple_of=1,
        ffn_dim_multiplier=(model.ffn_hidden_size + 0.5) / int(8 * model.hidden_size / 3),
        norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        max_seq_len=sequence,
    )


def fill(part: torch.nn.Module, model: ModelSpec, values: Values) -> None:
    """Give a part this rank's shards of the first values."""
    with torch.no_grad():
        for path, parameter in part.named_parameters():
            name = path
            for theirs, ours in _NAMES.items():
                name = name.replace(theirs, ours)
            whole = values[name]
            if name.endswith(("wq.weight", "wk.weight")):
                halves = whole.view(-1, 2, model.head_dim // 2, whole.shape[-1])
                whole = halves.transpose(1, 2).reshape(whole.shape)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(cut(whole, parameter))
