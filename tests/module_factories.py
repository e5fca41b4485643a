"""Factories of modules for the tests of `--model package.module:factory`, good ones and such as are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, SIDE, PATCH = 10, 16, 4


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


def tied_hf_llama() -> nn.Module:
    return tiny_hf_llama(tie_word_embeddings=True)


class Patches(nn.Module):
    """Images [batch, 3, SIDE, SIDE] -> [batch, 1 + patches, width], the first token a learned one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, width) * 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(images), -1, -1), patches], 1) + self.positions


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A ViT (arXiv 2010.11929) that classifies by its first token, trained on images that it makes itself."""

    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 4) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classes(self.norm(self.blocks(self.patches(images)))[:, 0])

    def example_batch(self, batch_size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = torch.randint(0, CLASSES, (batch_size,), generator=generator, device="cpu")
        images = torch.randn(batch_size, 3, SIDE, SIDE, generator=generator, device="cpu")
        return images + target.view(-1, 1, 1, 1) / CLASSES, target

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target)


def tiny_vit() -> nn.Module:
    return VisionTransformer()


def small_hf_llama() -> nn.Module:
    """Wide enough that what no formula counts (ids, norms' statistics) is a fraction of a percent."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 1024}
    return tiny_hf_llama(**sizes, num_key_value_heads=4, max_position_embeddings=256)


def small_vit() -> nn.Module:
    return VisionTransformer(width=256, heads=8)
