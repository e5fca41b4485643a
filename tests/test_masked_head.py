"""The head of a masked language model: predicted tokens alone, transform, bias, and places that are left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from planner.plan import Stage
from profiles.model import ModelSpec
from runtime import loss
from runtime.bert_parts import with_targets
from runtime.loss import LossWay
from runtime.parameters import initialise
from runtime.transformer import Chunk, build_chunk
from tests.plans import tiny_bert, tiny_gpt2, tiny_megatron_bert

BATCH, SEQUENCE = 3, 40
TARGETS = 6  # of each row


def whole(model: ModelSpec) -> Chunk:
    chunk = build_chunk(model, Stage.whole(model)).double().to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=model.layers, seed=1)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return chunk


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 61, (BATCH, SEQUENCE), generator=generator)
    chosen = torch.rand(ids.shape, generator=generator).argsort() < TARGETS
    return ids, torch.randint(0, 61, ids.shape, generator=generator).masked_fill(~chosen, -1)


def test_the_tokens_with_a_target_come_in_order_and_others_fill_up() -> None:
    targets = torch.tensor([[-1, 5, -1, 7], [-1, -1, 3, -1]])
    x = torch.arange(8.0).view(2, 4, 1)
    chosen, wanted = with_targets(x, targets, 2)
    assert chosen.flatten().tolist() == [1, 3, 6, 4]
    assert wanted.tolist() == [5, 7, 3, -1]


@pytest.mark.parametrize("room", [TARGETS, TARGETS + 5, SEQUENCE], ids=["just enough", "more than that", "all"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "logits again"])
@pytest.mark.parametrize("piece", [1024, 4], ids=["whole", "pieces"])
@pytest.mark.parametrize("model", [tiny_bert(layers=1), tiny_megatron_bert(layers=1)], ids=["bert", "megatron"])
def test_the_loss_is_torchs_of_the_whole_logits(
    model: ModelSpec, piece: int, again: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOSS_TOKENS", piece)
    ids, targets = batch()
    chunk = whole(model)
    expected = F.cross_entropy(chunk(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    theirs = {
        name: parameter.grad.clone() for name, parameter in chunk.named_parameters() if parameter.grad is not None
    }
    chunk.zero_grad()
    assert chunk.head is not None
    chunk.head.way = LossWay(tokens_per_step=BATCH * TARGETS, predicted=room, logits_again=again)
    ours = chunk(ids, targets)
    ours.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
    assert theirs["head.bias"].abs().max() > 1e-3
    assert theirs["head.transform.weight"].abs().max() > 1e-3
    assert theirs["embedding.token_types.weight"][1].abs().max() == 0


def test_every_token_attends_to_the_later_ones_too() -> None:
    ids, _ = batch()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    for model, sees in ((tiny_bert(), True), (tiny_megatron_bert(), True), (tiny_gpt2(), False)):
        chunk = whole(replace(model, layers=1))
        with torch.no_grad():
            difference = (chunk(ids) - chunk(changed))[:, 0].abs().max().item()
        assert (difference > 1e-6) == sees, model.name
