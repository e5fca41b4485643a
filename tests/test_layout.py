"""Layout: what follows from its degrees, its line for people, and its keys in a file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.layout import Layout
from profiles.input_error import InputError
from profiles.store import Reader


def test_world_and_microbatches() -> None:
    layout = Layout(tp=2, pp=3, dp=4, micro_batch=2)
    assert layout.world_size == 24
    assert layout.microbatches(48) == 6


def test_the_grid_of_experts_lies_over_the_same_ranks() -> None:
    """[Note: Expert grid]: etp·ep·edp = tp·cp·dp, and state is cut over the replicas that HSDP leaves."""
    layout = Layout(tp=2, cp=2, dp=4, dp_shard=4, ep=4, etp=2, zero=1)
    assert (layout.edp, layout.shards, layout.expert_shards) == (2, 8, 2)
    assert (replace(layout, zero=0, dp_shard=1).shards, replace(layout, zero=0, dp_shard=1).expert_shards) == (1, 1)
    hsdp = replace(layout, dp_shard=2)
    assert (hsdp.shards, hsdp.expert_shards) == (4, 1)


def test_stages_go_round_the_ranks_or_in_a_v() -> None:
    assert [Layout(pp=2, virtual_stages=3).stages_of(rank) for rank in range(2)] == [(0, 2, 4), (1, 3, 5)]
    v = Layout(pp=3, virtual_stages=2, schedule="zbv")
    assert [v.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


@pytest.mark.parametrize(
    ("layout", "short"),
    [
        (Layout(), "mb1"),
        (
            Layout(tp=2, sequence_parallel=True, pp=4, dp=8, dp_shard=8, zero=1, micro_batch=2),
            "tp2·sp pp4 dp8 zero1 mb2 1f1b",
        ),
        (Layout(dp=8, dp_shard=4, zero=3), "dp8 zero3·hsdp4 mb1"),
        (Layout(dp=8, dp_shard=1), "dp8 zero0 mb1"),
        (
            Layout(tp=2, cp=2, cp_style="ring", pp=2, ep=4, etp=2, schedule="interleaved-1f1b", virtual_stages=3),
            "tp2 cp2·ring pp2·v3 ep4 etp2 mb1 interleaved-1f1b",
        ),
        (Layout(tp=8, pp=2, schedule="gpipe"), "tp8 pp2 mb1 gpipe"),
    ],
)
def test_a_layout_on_one_line(layout: Layout, short: str) -> None:
    assert layout.short() == short


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((axis, 0) for axis in ("tp", "cp", "pp", "dp", "dp_shard", "ep", "etp", "micro_batch", "virtual_stages")),
        ("tp", 2.0),
        ("zero", -1),
        ("zero", True),
        ("sequence_parallel", 1),
        ("schedule", "1f2b"),
        ("cp_style", "rings"),
    ],
)
def test_a_layout_that_is_none_names_the_key(key: str, value: object) -> None:
    document = Layout().to_dict()
    assert Layout.from_dict(Reader(document, source="p.yaml")) == Layout()
    with pytest.raises(InputError) as caught:
        Layout.from_dict(Reader(document | {key: value}, source="p.yaml", path="layout"))
    assert (caught.value.where, caught.value.got) == (f"p.yaml: layout.{key}", repr(value))


@pytest.mark.parametrize("key", list(Layout().to_dict()))
def test_every_key_of_a_layout_is_needed(key: str) -> None:
    document = Layout().to_dict()
    del document[key]
    with pytest.raises(InputError, match=f"the key layout.{key} is missing"):
        Layout.from_dict(Reader(document, source="p.yaml", path="layout"))
