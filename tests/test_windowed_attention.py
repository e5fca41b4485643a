"""Windows, sinks and the clamped SwiGLU beside the same written out, and YaRN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from profiles.attention_spec import RopeStretch
from runtime.gated import gated
from runtime.rotary import inverse_frequencies
from runtime.windowed_attention import windowed_attention

TOKENS = 12
STARTS = torch.tensor([[0] * TOKENS, [0] * 3 + [3] * 7 + [10] * 2])


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """The same by a mask over all scores."""
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    place = torch.arange(TOKENS)
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or TOKENS))
    seen = seen.expand(len(q), 1, -1, -1)
    if starts is not None:
        seen = seen & (place >= starts[:, None, :, None])
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1) @ v
    joined = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return joined.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 11, 12, 40])
def test_outputs_and_gradients_are_those_of_the_mask(window: int | None, has_sinks: bool, documents: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (2, 4, TOKENS, 6), "k": (2, 2, TOKENS, 6), "v": (2, 2, TOKENS, 6), "sinks": (4,)}
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) * 2 for shape in shapes.values()]
    q, k, v, sinks = [tensor.requires_grad_() for tensor in drawn]
    inputs = [q, k, v, *([sinks] if has_sinks else [])]
    starts = STARTS if documents else None
    given = sinks if has_sinks else None
    expected = written_out(q, k, v, given, starts, window)
    got = windowed_attention(q, k, v, window=window, sinks=given, starts=starts)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    of_outputs = torch.randn(got.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, of_outputs), torch.autograd.grad(expected, inputs, of_outputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_operation_is_what_torch_asks_of_one() -> None:
    q = torch.randn(2, 2, TOKENS, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.meshwright.windowed_attention.default, (q, q.detach(), q.detach(), sinks, None, 5))


def test_the_clamped_swiglu_is_that_of_gpt_oss_where_it_clamps() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sizes: dict[str, Any] = {"num_local_experts": 2, "hidden_size": 4, "intermediate_size": 50}
    theirs = GptOssExperts(GptOssConfig(**sizes))
    both = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * 8
    assert (both > 7).any()
    assert (both < -7).any()
    torch.testing.assert_close(gated("clamped_swiglu", both[:, ::2], both[:, 1::2]), theirs._apply_gate(both))


def test_a_stretch_of_yarn_leaves_fast_pairs_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(16, 10000.0, None)
    yarn = RopeStretch(kind="yarn", factor=8.0, original_max_positions=64)
    shares = inverse_frequencies(16, 10000.0, yarn) / plain
    assert shares[0] == 1.0
    assert shares[-1] == pytest.approx(1 / 8)
    assert (shares.diff() <= 0).all()
    assert yarn.magnitude == pytest.approx(1.2079, abs=1e-4)  # 0.1 ln 8 + 1
