"""The sacred test for models with experts: no grid of experts changes loss or gradient norm beyond rounding."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.layout_runs import plan_of, require_the_layout_changes_nothing
from tests.distributed.pairwise import EXPERTS, legal_settings, pairwise_settings
from tests.plans import tiny_experts, tiny_latent, tiny_shared_experts
from tests.thinned import every

MODELS = {model.name: model for model in (tiny_experts(), tiny_shared_experts(), tiny_latent())}


SP = {"tp": 2, "sequence_parallel": True}
# Of ep, etp and edp each alone and with each other, with tp, dp, every zero level, HSDP, pipelines and recomputation.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny-experts", {}),
    ("tiny-experts", {"dp": 2}),
    ("tiny-shared", {"dp": 2, "ep": 2}),
    ("tiny-experts", {"dp": 2, "ep": 2, "zero": 1}),
    ("tiny-shared", {"dp": 2, "ep": 2, "zero": 3}),
    ("tiny-experts", {"dp": 4, "ep": 2, "zero": 0}),
    ("tiny-shared", {"dp": 4, "ep": 2, "zero": 3}),
    ("tiny-experts", {"dp": 4, "ep": 4, "zero": 2}),
    ("tiny-shared", {"dp": 4, "ep": 2, "zero": 1, "dp_shard": 2}),
    ("tiny-shared", {"dp": 4, "zero": 3, "ep": 1}),
    ("tiny-experts", SP),
    ("tiny-shared", SP | {"etp": 2}),
    ("tiny-experts", SP | {"etp": 2, "recompute": (4,)}),
    ("tiny-shared", SP | {"ep": 2}),
    ("tiny-experts", SP | {"dp": 2, "ep": 2, "etp": 2, "zero": 1}),
    ("tiny-shared", SP | {"dp": 2, "ep": 4, "zero": 3}),
    ("tiny-experts", SP | {"dp": 2, "ep": 2, "zero": 0}),
    ("tiny-shared", SP | {"pp": 2, "ep": 2}),
    ("tiny-experts", {"pp": 2, "dp": 2, "ep": 2, "zero": 1}),
    ("tiny-shared", {"pp": 2, "dp": 2, "ep": 2, "zero": 0, "schedule": "gpipe"}),
    ("tiny-experts", {"pp": 2, "dp": 2, "ep": 2, "zero": 1, "schedule": "interleaved-1f1b", "virtual_stages": 2}),
    ("tiny-shared", {"pp": 2, "dp": 2, "ep": 2, "zero": 3, "schedule": "looped-bfs", "virtual_stages": 2}),
    ("tiny-shared", {"pp": 2, "dp": 2, "ep": 2, "zero": 1, "schedule": "zb1p"}),
    ("tiny-experts", {"pp": 2, "dp": 2, "ep": 2, "zero": 0, "schedule": "zbv", "virtual_stages": 2}),
    ("tiny-shared", {"pp": 2, "dp": 2, "ep": 2, "zero": 1, "schedule": "dualpipev", "virtual_stages": 2}),
    ("tiny-shared", {"recompute": (4,)}),
    ("tiny-latent", {}),
    ("tiny-latent", {"dp": 2, "ep": 2, "zero": 3}),
    ("tiny-latent", SP | {"ep": 2}),
    ("tiny-latent", SP | {"etp": 2, "dp": 2, "zero": 1, "recompute": (4,)}),
    ("tiny-latent", {"pp": 2, "dp": 2, "ep": 2, "zero": 1}),
    ("tiny-shared", {"cp": 2, "cp_style": "ring", "ep": 2}),
    ("tiny-experts", SP | {"cp": 2, "cp_style": "ring", "ep": 4, "zero": 1}),
    ("tiny-latent", {"cp": 2, "cp_style": "ring", "ep": 2, "zero": 3}),
    ("tiny-latent", SP | {"cp": 2, "cp_style": "all-to-all", "etp": 2, "ep": 2, "zero": 2}),
    ("tiny-latent", {"cp": 2, "cp_style": "all-to-all", "pp": 2, "recompute": (2, 2)}),
    ("tiny-shared", {"cp": 2, "cp_style": "ring", "dp": 4, "dp_shard": 2, "ep": 4, "zero": 3}),
]


# Every twelfth of them in `make test`, since each takes seconds; all in `make test-full`.
@pytest.mark.parametrize(("model", "case"), every(12, CASES, first=7), ids=str)
def test_loss_and_norm_do_not_depend_on_the_grid(model: str, case: dict[str, Any]) -> None:
    require_the_layout_changes_nothing(plan_of(MODELS[model], **case))


GENERATED = {str(setting): setting for setting in pairwise_settings(EXPERTS)}


def test_every_pair_of_settings_that_is_trained_is_tried() -> None:
    tried = {pair for setting in GENERATED.values() for pair in setting.pairs}
    assert tried == {pair for setting in legal_settings(EXPERTS) for pair in setting.pairs}
    assert len(GENERATED) >= 30


@pytest.mark.parametrize("name", every(34, GENERATED, first=6))
def test_loss_and_norm_do_not_depend_on_a_generated_layout(name: str) -> None:
    require_the_layout_changes_nothing(GENERATED[name].plan())
