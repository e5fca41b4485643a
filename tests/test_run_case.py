"""Published runs as cases: model, cluster, layout and layers out of the columns, and each reason to skip a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.run_case import RunCase, RunFacts, SkippedRunError, case_of, fill_by_cost, load_run_facts, split_layers
from profiles.catalogue import list_catalogue, resolve_cluster
from profiles.published_cluster import NOMINAL_GBPS, NoDeviceError, hardware_of
from profiles.published_runs import load_published_runs

from .published import SMALL, write_runs


@pytest.fixture(scope="module")
def facts() -> RunFacts:
    return load_run_facts()


def case(tmp_path: Path, facts: RunFacts, **cells: str) -> RunCase:
    return case_of(load_published_runs(write_runs(tmp_path / "runs.csv", cells))[0], facts)


def test_a_full_row_becomes_a_case_with_nothing_assumed(tmp_path: Path, facts: RunFacts) -> None:
    found = case(tmp_path, facts)
    assert found.layout.to_dict() == {
        "tp": 2,
        "cp": 1,
        "cp_style": "none",
        "pp": 2,
        "dp": 2,
        "dp_shard": 1,
        "ep": 1,
        "etp": 1,
        "sequence_parallel": False,
        "zero": 0,
        "micro_batch": 2,
        "schedule": "1f1b",
        "virtual_stages": 1,
    }
    assert (found.job.global_batch, found.job.sequence, found.job.precision) == (32, 1024, "fp16")
    assert (found.recompute, found.chunk_layers, found.hardware) == ("full", (12, 12), "a100-sxm-80gb")
    assert (found.assumptions, found.warnings, found.layout_stated) == ((), (), True)


SKIPPED = {
    "no layout": ({"tp": ""}, "tp or pp not stated"),
    "no batch": ({"global_batch": ""}, "global_batch not stated"),
    "no micro batch": ({"micro_batch": "", "pp": "1", "dp": "4"}, "micro_batch not stated"),
    "no devices": ({"dp": "", "num_gpus": ""}, "neither dp nor num_gpus stated"),
    "devices that do not divide": ({"dp": "", "num_gpus": "10"}, "tp·pp·cp = 4 does not divide 10 GPUs"),
    "another world": ({"num_gpus": "16"}, "tp·cp·pp·dp = 8 and 16 GPUs"),
    "a batch that does not divide": ({"global_batch": "34"}, "global_batch 34 is no multiple of micro_batch·dp = 4"),
    "heads that do not divide": (
        {"heads": "17", "kv_heads": "17", "hidden": "2176"},
        "tp=2 does not divide 17 heads",
    ),
    "more stages than layers": ({"layers": "2", "vpp": "3"}, "2 layers do not fill 6 stages"),
    "a schedule of theirs": ({"notes": "schedule=ZB-2p; fast"}, "schedule zb-2p: none of ours"),
    "chunks left open": (
        {"vpp": "", "notes": "Interleaved 1F1B (chunks not stated)"},
        "interleaved, and vpp not stated",
    ),
    "no architecture": ({"layers": "", "seq": ""}, "layers and seq not stated"),
    "widths that contradict": ({"hidden": "2050"}, "hidden 2050, heads 16 and kv_heads 16 do not divide"),
    "an unknown device": ({"gpu": "TPUv4"}, "no hardware profile for TPUv4"),
    "no device": ({"gpu": ""}, "no hardware profile for a GPU that is not named"),
    "parts of nodes": ({"num_gpus": "12", "dp": "3", "global_batch": "12"}, "12 devices do not fill nodes of 8"),
    "no such precision": (
        {"gpu": "V100-SXM3-32GB", "precision": "bf16"},
        "the hardware profile v100-sxm-32gb has no figures for bf16",
    ),
    "chunks of a schedule that has none": (
        {"vpp": "3", "notes": "schedule=1F1B"},
        "schedule 1f1b and vpp=3 contradict each other",
    ),
    "too few microbatches for DualPipeV": (
        {"global_batch": "12", "notes": "schedule=DualPipeV"},
        "dualpipev with 3 microbatches and pp=2: it needs at least as many microbatches as its 4 stages",
    ),
    "a schedule without a name": ({"notes": "schedule="}, "schedule (none): none of ours"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_row_that_states_too_little_says_why(tmp_path: Path, facts: RunFacts, name: str) -> None:
    cells, reason = SKIPPED[name]
    with pytest.raises(SkippedRunError) as info:
        case(tmp_path, facts, **cells)
    assert str(info.value) == reason


def test_an_unknown_software_or_model_is_no_reason_to_skip(tmp_path: Path, facts: RunFacts) -> None:
    found = case(tmp_path, facts, software="ours-2022", model_name="Nameless")
    assert found.software.name == "megatron-2021"
    assert found.warnings == ("software ours-2022 is not in the catalogue: megatron-2021 stands in for it",)
    assert (found.model.name, found.model.activation, found.model.tied_embeddings) == ("Nameless", "gelu_tanh", True)


def test_what_a_row_leaves_open_is_filled_in_and_listed(tmp_path: Path, facts: RunFacts) -> None:
    blank = dict.fromkeys(("vpp", "sp", "zero_stage", "dist_opt", "recompute", "micro_batch", "precision", "vocab"), "")
    found = case(tmp_path, facts, **blank, software="megatron-2023", ffn="", dp="")
    assert found.assumptions == (
        "ffn 8192",
        "vocab 50257",
        "micro_batch 1",
        "vpp 1",
        "zero 0",
        "sequence parallelism on",
        "precision bf16",
        "the least recomputation that fits",
    )
    assert (found.recompute, found.layout.micro_batch, found.layout.dp) == (None, 1, 2)
    assert not found.layout_stated
    assert "sequence parallelism off" in case(tmp_path, facts, sp="").assumptions  # of 2021
    assert case(tmp_path, facts, gpu="V100", precision="").job.precision == "fp16"


def test_only_blanks_that_matter_make_a_layout_incomplete(tmp_path: Path, facts: RunFacts) -> None:
    assert case(tmp_path, facts, pp="1", vpp="", tp="1", sp="", dp="8", zero_stage="0", dist_opt="").layout_stated
    assert not case(tmp_path, facts, vpp="").layout_stated
    assert not case(tmp_path, facts, recompute="").layout_stated


def test_degrees_and_schedules(tmp_path: Path, facts: RunFacts) -> None:
    assert case(tmp_path, facts, vpp="3").layout.schedule == "interleaved-1f1b"
    assert case(tmp_path, facts, notes="schedule=ZB-1p; x").layout.schedule == "zb1p"
    assert case(tmp_path, facts, notes="schedule=1F1B; x").layout.schedule == "1f1b"
    assert case(tmp_path, facts, notes="schedule=1F1B-I; x").layout.schedule == "1f1b"  # of one chunk
    assert case(tmp_path, facts, notes="schedule=ZB-V").layout.virtual_stages == 2
    assert case(tmp_path, facts, global_batch="4").layout.schedule == "1f1b"  # one microbatch, two stages
    assert case(tmp_path, facts, dist_opt="true").layout.zero == 1
    assert case(tmp_path, facts, dist_opt="true").layout.dp_shard == 2
    assert case(tmp_path, facts, pp="4", dp="1", zero_stage="1").layout.zero == 0  # one copy: nothing to shard
    assert not case(tmp_path, facts, tp="1", dp="4", sp="true").layout.sequence_parallel
    ring = case(tmp_path, facts, cp="2", dp="1", zero_stage="3")
    assert (ring.layout.cp_style, ring.layout.zero) == ("ring", 3)
    assert case(tmp_path, facts, precision="fp8-rowwise", gpu="H100-SXM-80GB").job.precision == "fp8"
    assert case(tmp_path, facts, precision="bf16/fp16").job.precision == "bf16"


@pytest.mark.parametrize(
    ("layers", "chunks", "split"),
    [
        (24, 4, (6, 6, 6, 6)),
        (22, 8, (2, 3, 3, 3, 3, 3, 3, 2)),  # arXiv 2401.10241
        (126, 8, (15, *[16] * 6, 15)),  # arXiv 2407.21783
        (10, 4, (2, 3, 3, 2)),
        (7, 3, (2, 3, 2)),
        (9, 4, (2, 3, 2, 2)),
        (5, 1, (5,)),
        (0, 2, (0, 0)),
    ],
)
def test_layers_are_split_as_trainers_do(layers: int, chunks: int, split: tuple[int, ...]) -> None:
    assert split_layers(layers, chunks) == split


def test_nanotron_fills_stages_up_to_their_share_of_the_costs(tmp_path: Path, facts: RunFacts) -> None:
    """Llama of 80B over 16 stages and of 3.57B over 2, its head as costly as 3.6 layers."""
    assert fill_by_cost(80, 16, layer=973, head=1074) == (6, *[5] * 13, 6, 3)
    assert fill_by_cost(28, 2, layer=1132, head=4027) == (16, 12)
    assert fill_by_cost(4, 1, layer=3, head=9) == (4,)
    llama = {"model_name": "Llama-3.57B", "layers": "28", "hidden": "3072", "ffn": "8192", "heads": "32", "tp": "1"}
    llama |= {"kv_heads": "32", "vocab": "131072", "params_B": "3.57355", "pp": "2", "num_gpus": "2", "dp": "1"}
    for software, layers in (("nanotron-2024", (16, 12)), ("megatron-2021", (14, 14))):
        assert case(tmp_path, facts, **(llama | {"software": software})).chunk_layers == layers


def test_no_split_loses_a_layer() -> None:
    for chunks in range(1, 20):
        for layers in range(chunks, 60):
            split = split_layers(layers, chunks)
            assert (sum(split), len(split)) == (layers, chunks)
            assert max(split) - min(split) <= 1


def test_the_vocabulary_is_padded_by_trainers_that_pad(tmp_path: Path, facts: RunFacts) -> None:
    assert case(tmp_path, facts, vocab="50257").model.vocab_size == 50432  # 197 · 128 · 2
    assert case(tmp_path, facts, vocab="50257", software="fsdp1-2023").model.vocab_size == 50257


def test_names_of_llamas_kind_are_gated_and_tied_only_where_the_count_says_so(tmp_path: Path, facts: RunFacts) -> None:
    llama = {"model_name": "Llama-1.2B", "ffn": "8192", "kv_heads": "4", "vocab": "128256"}
    untied = case(tmp_path, facts, **llama).model
    assert (untied.activation, untied.norm, untied.positions, untied.kv_heads) == ("swiglu", "rmsnorm", "rope", 4)
    assert not untied.tied_embeddings
    tied_count = (untied.parameters - 128256 * 2048) / 1e9
    assert case(tmp_path, facts, **llama, params_B=f"{tied_count:.2f}").model.tied_embeddings
    assert not case(tmp_path, facts, **llama, params_B=f"{untied.parameters / 1e9:.2f}").model.tied_embeddings


def test_experts_take_from_the_catalogue_what_no_column_has(facts: RunFacts) -> None:
    row = next(run for run in load_published_runs(SMALL) if run.model_name == "deepseekv2-L4")
    found = case_of(row, facts)
    assert found.model.layers == 4
    assert found.model.experts is not None
    assert (found.model.experts.ffn_hidden_size, found.model.experts.shared) == (1536, 2)
    assert found.model.latent_attention is not None
    assert "what no column has as deepseek-v2" in found.assumptions


def test_parameters_are_as_stated(facts: RunFacts) -> None:
    """Architectures out of the columns come to the stated count, within its rounding."""
    runs = [run for run in load_published_runs(SMALL) if run.params_B and run.tp and "ZB-2p" not in run.notes]
    assert len(runs) > 15
    for run in runs:
        assert case_of(run, facts).model.parameters / 1e9 == pytest.approx(run.params_B, rel=0.05), run.id


# ---- devices and links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("A100-SXM-80GB", "a100-sxm-80gb"),
        ("A100-SXM-40GB", "a100-sxm-40gb"),
        ("A100-SXM", "a100-sxm-80gb"),
        ("A100 (Ampere, 80GB assumed)", "a100-sxm-80gb"),
        ("A100-PCIe-80GB", "a100-pcie-80gb"),
        ("V100-SXM3-32GB (DGX-2H)", "v100-sxm-32gb"),
        ("Tesla V100 16GB", "v100-sxm-16gb"),
        ("H100-96GB HBM2e 500W (Grand Teton)", "h100-sxm-96gb-500w"),
        ("H100-96GB", "h100-sxm-80gb"),  # no limit named
        ("H100 500WX", "h100-sxm-80gb"),
        ("H200-SXM", "h200-sxm"),
        ("H800-SXM-80GB", "h100-sxm-80gb"),
        ("A800", "a100-sxm-80gb"),
        ("GB200", "gb200"),
        ("B200", "b200-sxm"),
    ],
)
def test_the_profile_that_a_name_means(gpu: str, name: str) -> None:
    assert hardware_of(gpu, list_catalogue("hardware")) == name


def test_a_chip_that_nobody_profiled_is_refused() -> None:
    with pytest.raises(NoDeviceError, match="no hardware profile for MI250X"):
        hardware_of("MI250X", list_catalogue("hardware"))


def test_every_cluster_has_its_nominal_bandwidths_and_achieves_less() -> None:
    assert sorted(NOMINAL_GBPS) == list_catalogue("clusters")
    for name, (intra, inter) in NOMINAL_GBPS.items():
        links = resolve_cluster(name).links
        assert 0.05 < links[0].bandwidth_bytes_per_second / (intra * 1e9) < 1.0, name
        assert (inter is not None) == (links[-1].tier == "network"), name
        if inter is not None:
            assert 0.8 < links[-1].bandwidth_bytes_per_second / (inter * 1e9) < 1.0, name


def test_links_achieve_of_the_rows_bandwidth_what_they_achieve_of_the_catalogues(
    tmp_path: Path, facts: RunFacts
) -> None:
    known = resolve_cluster("dgx-a100")
    wide = {"num_gpus": "64", "dp": "16", "global_batch": "64"}
    same = case(tmp_path, facts, **wide).cluster
    assert [link.bandwidth_bytes_per_second for link in same.links] == [
        link.bandwidth_bytes_per_second for link in known.links
    ]
    half = case(tmp_path, facts, **wide, intra_bw_GBps="150", inter_bw_GBps_per_gpu="12.5").cluster
    assert [link.bandwidth_bytes_per_second for link in half.links] == pytest.approx(
        [link.bandwidth_bytes_per_second / 2 for link in known.links]
    )
    assert [link.latency_seconds for link in half.links] == [link.latency_seconds for link in known.links]
    assert (half.nodes, half.devices_per_node, half.devices) == (8, 8, 64)


def test_nodes_of_another_width_and_devices_of_another_memory(tmp_path: Path, facts: RunFacts) -> None:
    narrow = case(tmp_path, facts, gpus_per_node="4").cluster
    assert [link.span for link in narrow.links] == [4, 8]
    assert narrow.nodes == 2
    # What a switch does for just eight devices says nothing of four.
    switched = {"gpu": "H100-SXM-80GB", "precision": "bf16"}
    assert any(o.ranks == 8 for o in case(tmp_path, facts, **switched).cluster.links[0].operations)
    assert not any(o.ranks for o in case(tmp_path, facts, **switched, gpus_per_node="4").cluster.links[0].operations)
    part = case(tmp_path, facts, num_gpus="4", dp="1").cluster
    assert (part.nodes, part.devices, len(part.links)) == (1, 4, 1)
    larger = case(tmp_path, facts, gpu="H100-96GB HBM2e", precision="bf16").cluster
    assert larger.memory_bytes == pytest.approx(resolve_cluster("dgx-h100").memory_bytes * 96 / 80)
    pcie = case(tmp_path, facts, gpu="A100-PCIe-80GB", intra_bw_GBps="").cluster
    assert [link.tier for link in pcie.links] == ["socket", "node"]
    unstated = case(tmp_path, facts, num_gpus="16", dp="4", inter_bw_GBps_per_gpu="", gpus_per_node="")
    assert unstated.assumptions == ("gpus_per_node 8", "network as dgx-a100")


def test_runs_of_a_site_that_measured_its_network_are_predicted_with_it(tmp_path: Path, facts: RunFacts) -> None:
    h100 = {"gpu": "H100-SXM-80GB", "intra_bw_GBps": "450", "inter_bw_GBps_per_gpu": "50"}
    for source, near in (("nanotron scripts", "aws-p5"), ("NeMo docs", "dgx-h100")):
        assert case(tmp_path, facts, **(h100 | {"source": source})).cluster.name == f"{near} of the row"
