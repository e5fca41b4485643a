"""Factories of modules for the tests of `--model package.module:factory`, good ones and such as are refused."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from examples.small_vit import VisionTransformer


def tiny_hf_llama(**changes: Any) -> nn.Module:
    """A LlamaForCausalLM of 4 blocks of width 32, as `tests.plans.tiny_llama` is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def planless_hf_llama() -> nn.Module:
    module = tiny_hf_llama()
    module.config.base_model_tp_plan = None
    return module


def tied_hf_llama() -> nn.Module:
    return tiny_hf_llama(tie_word_embeddings=True)


def tiny_vit() -> nn.Module:
    return VisionTransformer(width=32, heads=4, blocks=4, side=16, patch=4)


def small_hf_llama() -> nn.Module:
    """Wide enough that what no formula counts (ids, norms' statistics) is a fraction of a percent."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 1024}
    return tiny_hf_llama(**sizes, num_key_value_heads=4, max_position_embeddings=256)


def small_vit() -> nn.Module:
    return VisionTransformer(width=256, heads=8, blocks=4, side=16, patch=4)


# ---- other chains ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block that takes its stream by keyword, a scale beside it, and gives a tuple."""

    kind = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, scale: torch.Tensor, *, stream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return stream + scale * self.linear(stream), None


class Rows(nn.Module):
    """Embedding, blocks and head over rows of 6 token ids; what is odd about one is a subclass's `between`."""

    block: type[nn.Module] = Residual

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.table.weight.data.mul_(0.5)
        self.shift = nn.Parameter(torch.randn(8) * 0.1)
        self.register_buffer("scale", torch.linspace(0.5, 1.0, 8), persistent=False)
        self.layers = nn.ModuleDict({f"layer{index}": self.block() for index in range(3)})
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.shift
        scale = self.scale * (ids >= 0).all()
        for layer in self.layers.values():
            assert layer.kind == "plain"
            x, _ = layer(scale, stream=x)
        return self.head(x)

    def example_batch(self, batch_size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + step)
        ids = torch.randint(0, 16, (batch_size, 7), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())


def rows() -> nn.Module:
    return Rows()


class Halved(Residual):
    """A gate and what it gates out of one linear: nothing that tp could cut column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, scale: torch.Tensor, *, stream: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, value = self.up(stream).chunk(2, -1)
        return super().forward(scale, stream=stream + self.down(F.silu(gate) * value))


class Scaled(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(16))

    def forward(self, scale: torch.Tensor, *, stream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(scale, stream=stream + self.down(self.width * self.up(stream)))


class HalvedRows(Rows):
    block = Halved


class ScaledRows(Rows):
    block = Scaled


def halved() -> nn.Module:
    return HalvedRows()


def scaled() -> nn.Module:
    return ScaledRows()


# ---- such as are refused -----------------------------------------------------------------------------------


class Skipping(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = first = self.table(ids)
        for index, layer in enumerate(self.layers.values()):
            x, _ = layer(self.scale, stream=x)
            first = x if index == 0 else first
        return self.head(x + first)


class Twice(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in (*self.layers.values(), self.layers["layer0"]):
            x, _ = layer(self.scale, stream=x)
        return self.head(x)


class Between(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers.values():
            x = layer(self.scale, stream=x)[0] * 2
        return self.head(x)


class Conditioned(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers.values():
            x, _ = layer(self.scale + self.shift, stream=x)
        return self.head(x)


class Dropping(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)


class DroppingRows(Rows):
    block = Dropping


class NoisyRows(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + torch.rand(16)


class Raising(Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.view(-1, 5))


class BadSamples(Rows):
    def example_batch(self, batch_size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)


class OddPlan(Rows):
    tp_plan: ClassVar[dict[str, str]] = {"linear": "diagonal"}


class NoLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


class Unlike(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])


def broken() -> nn.Module:
    raise OSError("no weights here")


def a_number() -> int:
    return 3
