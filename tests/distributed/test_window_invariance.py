"""The sacred test for windows, sinks, stretched positions and biases of experts: no layout changes loss or norm."""

from __future__ import annotations

from typing import Any

import pytest

from profiles.attention_spec import SlidingWindow
from tests.distributed.layout_runs import plan_of, require_the_layout_changes_nothing
from tests.plans import tiny_gpt_oss, tiny_llama
from tests.thinned import every

MODELS = {
    "gpt-oss": tiny_gpt_oss(heads=8, kv_heads=4),  # more than the hidden size, as there
    "mistral": tiny_llama(name="tiny-mistral", family="mistral", sliding_window=SlidingWindow(length=6)),
}


SP = {"tp": 2, "sequence_parallel": True}
CP = {"cp": 2, "cp_style": "all-to-all"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt-oss", SP | {"dp": 2, "ep": 2, "etp": 2, "zero": 1}),
    ("gpt-oss", CP | {"ep": 2, "zero": 3}),
    ("mistral", CP | {"dp": 2, "recompute": (2,), "selective": (2,)}),
    ("gpt-oss", {}),
    ("gpt-oss", {"dp": 2, "ep": 2, "zero": 3}),
    ("gpt-oss", {"dp": 4, "zero": 3}),
    ("gpt-oss", {"dp": 4, "ep": 2, "zero": 1, "dp_shard": 2}),
    ("gpt-oss", SP | {"etp": 2}),
    ("gpt-oss", SP | {"ep": 2, "recompute": (4,)}),
    ("gpt-oss", SP | CP | {"ep": 2, "etp": 2, "zero": 2}),
    ("gpt-oss", SP | CP | {"dp": 2, "ep": 4, "zero": 3}),
    ("gpt-oss", {"pp": 2, "dp": 2, "ep": 2, "schedule": "zbv", "virtual_stages": 2}),
    ("gpt-oss", {"pp": 2, "dp": 2, "ep": 2, "zero": 1, "schedule": "interleaved-1f1b", "virtual_stages": 2}),
    ("gpt-oss", SP | {"pp": 2, "etp": 2, "schedule": "gpipe"}),
    ("mistral", {}),
    ("mistral", {"tp": 4}),
    ("mistral", SP | {"pp": 2, "schedule": "zb1p"}),
    ("mistral", CP | {"dp": 2, "zero": 2}),
]


# Two of them in `make test`, since each takes seconds; all in `make test-full`.
@pytest.mark.parametrize(("model", "case"), every(len(CASES), CASES), ids=str)
def test_loss_and_norm_do_not_depend_on_the_layout(model: str, case: dict[str, Any]) -> None:
    require_the_layout_changes_nothing(plan_of(MODELS[model], **case))
