"""python cli.py plan --model examples.small_vit:build --cluster local --global-batch 64 --seq 65 -o plan.yaml

A vision transformer of plain torch, with what training needs of a module beside its forward: samples and a loss. Its
samples are images that it draws itself, each class with its own brightness; a real one would read a data set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 10


class Patches(nn.Module):
    """Images [batch, 3, side, side] -> [batch, 1 + patches, width], the first token a learned one."""

    def __init__(self, width: int, side: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, width) * 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(images), -1, -1), patches], 1) + self.positions


class VisionBlock(nn.Module):
    """Attention of every token to every other, then a feed-forward of four times the width: [batch, tokens, width]."""

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

    def __init__(self, width: int, heads: int, blocks: int, side: int, patch: int) -> None:
        super().__init__()
        self.side = side
        self.patches = Patches(width, side, patch)
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return self.classes(self.norm(x)[:, 0])

    def example_batch(self, batch_size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [batch_size, 3, side, side] and their classes: the same ones for the same arguments."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = torch.randint(0, CLASSES, (batch_size,), generator=generator)
        images = torch.randn(batch_size, 3, self.side, self.side, generator=generator)
        return images + target.view(-1, 1, 1, 1) / CLASSES, target

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the samples, each with the same weight."""
        return F.cross_entropy(output, target)


def build() -> nn.Module:
    """8 blocks of width 256 on images of 32 × 32 in patches of 4: 65 tokens, 6 million parameters."""
    return VisionTransformer(width=256, heads=8, blocks=8, side=32, patch=4)
