"""Reports on one hardware profile: their exact text, the figures in it by hand, and plots that read without colour."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from planner.profile_figures import best_attention, best_gemm, bus_bandwidth, gemm_errors, quantile
from planner.profile_plots import Axis, Series, plot
from planner.profile_report import difference_report, profile_report, show_report
from planner.quantity_text import seconds_text, size_text
from profiles.catalogue import list_catalogue, resolve_hardware_path
from profiles.hardware import HardwareProfile, load_hardware
from profiles.points import (
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmModel,
    GemmPoint,
    MemoryPoint,
    OverlapPoint,
)
from tests.oracles.small_world import small_hardware

KIB, MIB = 2**10, 2**20


def text(report: RenderableType, width: int = 100) -> str:
    """What a terminal without colours shows, without the blanks at the ends of lines."""
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def cube(side: int, rate: float, **changes: Any) -> GemmPoint:
    """A square product at `rate` FLOP/s."""
    values: dict[str, Any] = {"dtype": "fp32", "operation": "forward", "seconds": 2 * side**3 / rate, "spread": 0.02}
    return GemmPoint(m=side, n=side, k=side, **(values | changes))


def collective(operation: str, ranks: int, size: int, seconds: float, **changes: Any) -> CollectivePoint:
    return CollectivePoint(operation=operation, ranks=ranks, bytes=size, seconds=seconds, **changes)


def measured() -> HardwareProfile:
    """fp32 measured, bf16 modelled; two ranks a node and four in all."""
    slow = 2 * 128**3 / 5e10  # seconds of the grid's 128³
    norm = MemoryPoint(dtype="fp32", operation="rmsnorm", direction="forward", elements=4096, seconds=4e-6, spread=0.1)
    attention = AttentionPoint(
        dtype="fp32", direction="forward", batch=1, heads=4, sequence=1024, head_dim=64, seconds=0.01, spread=0.3
    )
    return small_hardware(
        name="local",
        device="Made Up 9000",
        devices_per_node=2,
        host_to_device_bytes_per_second=5e9,
        corrections={"memory": 1.25},
        provenance={
            "kind": "measured",
            "date": "2026-03-04",
            "ranks": 4,
            "libraries": {"torch": "2.13.0", "numpy": "2.0"},
            "conditions": {"before": {"gpus": [{"sm_clock_hertz": 1.5e9, "temperature_celsius": 40.0}]},
                           "after": {"gpus": [{"sm_clock_hertz": 1.4e9, "temperature_celsius": 61.0}]}},
            "complete": False,
            "cases": {"skipped": {f"gemm/{i}": "no memory" for i in range(5)}, "done": ["links/1"]},
            "topology": {"gpus": [{"temperature_celsius": 99.0}]},
        },
        peak_flops_per_second={"fp32": 1e11, "bf16": 2e11},
        gemm_models=(GemmModel(dtype="bf16", achievable_flops_per_second=1.6e11, units=4, source="a paper"),),
        attention_models=(),
        gemm=(cube(128, 5e10), cube(512, 8e10)),
        gemm_checks=(
            cube(128, 5e10, seconds=slow * 2),
            cube(128, 5e10, seconds=slow),
            cube(128, 5e10, seconds=slow * 0.8),
        ),
        attention=(attention, replace(attention, direction="backward", seconds=0.04)),
        memory=(norm,),
        contention_points=(ContentionPoint(active=1, slowdown=1.0), ContentionPoint(active=4, slowdown=1.35)),
        overlap=(
            OverlapPoint(operation="all_reduce", ranks=4, bytes=MIB, compute_slowdown=1.2, communication_slowdown=1.4),
            OverlapPoint(operation="all_reduce", ranks=4, bytes=KIB, compute_slowdown=1.3, communication_slowdown=1.6),
        ),
        # α-β without a remainder: 2(n-1)·10 µs + 2(n-1)/n · s / (1 GB/s)
        collectives=(
            *(collective("all_reduce", 2, s, 2e-5 + s / 1e9, spread=0.04) for s in (4096, 65536, MIB)),
            *(collective("all_reduce", 4, s, 6e-5 + 1.5 * s / 5e8, spread=0.04) for s in (4096, 65536, MIB)),
            collective("all_to_all", 2, 65536, 5e-5),
            collective("all_to_all", 2, 65536, 7e-5, uneven=True),
        ),
    )  # fmt: skip


# ---- figures by hand -------------------------------------------------------------------------------------


def test_errors_of_the_grid_on_the_shapes_held_out() -> None:
    errors = gemm_errors(measured(), "fp32")
    assert errors == pytest.approx([0.0, 0.25, 0.5])  # 1/1, 1/0.8 and 1/2 of what was measured
    assert quantile(errors, 0.5) == pytest.approx(0.25)
    assert quantile(errors, 0.9) == pytest.approx(0.25 + 0.8 * 0.25)
    corrected = replace(measured(), corrections={"gemm": 2.0})
    assert gemm_errors(corrected, "fp32") == pytest.approx([0.0, 1.0, 1.5])
    assert gemm_errors(measured(), "bf16") == []
    unknown = replace(measured(), gemm_checks=(cube(128, 1e10, dtype="fp16"), cube(128, 1e10, operation="input_grad")))
    assert gemm_errors(unknown, "fp16") == gemm_errors(unknown, "fp32") == []


def test_best_rates_are_measured_before_modelled() -> None:
    hardware = measured()
    assert best_gemm(hardware, "fp32") == pytest.approx(8e10)
    assert best_gemm(hardware, "bf16") == pytest.approx(1.6e11)
    assert best_gemm(hardware, "fp8") is None
    # 4·b·a·s²·d forward and 10·b·a·s²·d backward, half of it below the diagonal
    assert best_attention(hardware, "fp32", "forward") == pytest.approx(2 * 4 * 1024**2 * 64 / 0.01)
    assert best_attention(hardware, "fp32", "backward") == pytest.approx(5 * 4 * 1024**2 * 64 / 0.04)
    full = replace(hardware, attention=tuple(replace(p, causal=False) for p in hardware.attention))
    assert best_attention(full, "fp32", "forward") == pytest.approx(4 * 4 * 1024**2 * 64 / 0.01)
    assert best_attention(hardware, "bf16", "forward") is None
    assert best_attention(small_hardware(flops=6e10), "fp32", "backward") == pytest.approx(2e10)


@pytest.mark.parametrize(
    ("operation", "share"),
    [
        ("all_reduce", 1.5),
        ("replicate_all_reduce", 1.5),
        ("all_gather", 0.75),
        ("fsdp_reduce_scatter", 0.75),
        ("all_to_all", 0.75),
        ("broadcast", 1.0),
        ("send_recv", 1.0),
    ],
)
def test_bus_bandwidth_as_nccl_tests_prints_it(operation: str, share: float) -> None:
    assert bus_bandwidth(collective(operation, 4, 10**9, 0.5)) == pytest.approx(share * 2e9)


def test_words() -> None:
    assert [seconds_text(s) for s in (2.5, 0.0125, 7.25e-6)] == ["2.5 s", "12.5 ms", "7.25 µs"]
    assert [size_text(s) for s in (8, 1024, 1048560, 3 * 2**20, 2**33)] == ["8 B", "1 KiB", "1 MiB", "3 MiB", "8 GiB"]


# ---- one profile -----------------------------------------------------------------------------------------

MEASURED = """\
Made Up 9000 (local), nccl, 4 ranks at once, 2 a node, 953.7 MiB each
measured, 2026-03-04, torch 2.13.0, SM clock 1.4 to 1.5 GHz, GPU 40 to 61 °C
not complete: `cli.py profile --resume` goes on from here
skipped, 5: gemm/0, no memory; gemm/1, no memory; gemm/2, no memory; gemm/3, no memory and 1 more

compute, GFLOP/s; error of the GEMM grid on the shapes held out from it
dtype  GEMM points  best  peak  held out  error p50    p90  attention points  forward  backward
fp32             2    80   100         3      25.0%  45.0%                 2     53.7      33.6
bf16      modelled   160   200                                          none

memory bandwidth  10 GB/s, to device 5 GB/s
overheads         launch 1 µs, microbatch 10 µs, tp shard 1 µs, with sequence 2 µs
overlap           compute × 1.25, communication × 1.50; measured 1.20 to 1.30 and 1.40 to 1.60
stragglers        × 1.000
contention        1 computing × 1.00, 4 computing × 1.35
memory held       context 0.0 MiB, a communicator 0.0 MiB, allocator slack 5.0%
corrections       memory × 1.250

communication, 4 of 4 groups and 3 of 3 sizes; bus bandwidth in GB/s at the largest
operation          ranks  stride    4 KiB   64 KiB    1 MiB    bus
all reduce             2       1  24.1 µs  85.5 µs  1.07 ms  0.981
all reduce             4       1  72.3 µs   257 µs  3.21 ms  0.491
all to all             2       1             50 µs           0.655
all to all uneven      2       1             70 µs

communication as α-β with a ramp
operation                 points              once  a step  GB/s  ramp  error p50  worst
all reduce                     3              0 ms   10 µs     1  none         0%     0%
all reduce, across nodes       3              0 ms   10 µs   0.5  none         0%     0%
all to all                     1  two sizes needed

16 points, 14 with a spread (interquartile range over median): median 4.0%, 2 noisy, above 20%
"""


def test_the_report_of_a_measured_profile() -> None:
    shown = text(profile_report(measured()))
    assert shown == MEASURED.strip("\n")
    assert len(shown.splitlines()) < 40  # one screen
    assert max(map(len, shown.splitlines())) <= 100


def test_a_profile_says_what_it_lacks() -> None:
    bare = replace(measured(), gemm=(), attention=(), memory=(), collectives=(), gemm_checks=(), provenance={})
    shown = text(profile_report(bare))
    assert "fp32          none" in shown
    assert "no points: nothing was measured" in shown
    assert "communication as" not in shown
    one_size = replace(measured(), collectives=(collective("broadcast", 2, 1024, 1e-5),))
    assert "two sizes needed" in text(profile_report(one_size))
    silent = replace(bare, collectives=(collective("broadcast", 2, 1024, 1e-5),))
    assert "1 points, spread not recorded" in text(profile_report(silent))


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ({"overheads": ["messages"]}, "no time for 1: messages; `cli.py profile --resume` measures them"),
        ({"links": list("abc"), "overheads": list("de")}, "no time for 5: a, b, c, d and 1 more; `cli.py profile"),
        ({"overheads": []}, ""),
        (7, ""),
    ],
)
def test_what_there_was_no_time_for_is_said(left_out: object, expected: str) -> None:
    shown = text(profile_report(replace(measured(), provenance={"cases": {"left_out": left_out}})))
    assert expected in shown if expected else "no time" not in shown


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ({"gemm": "no memory", "fp8": "no kernel"}, "skipped, 2: gemm, no memory; fp8, no kernel"),
        (["a"], "skipped, 1: a"),
        (7, "skipped, 1: 7"),
    ],
)
def test_skipped_cases_in_any_form(skipped: object, expected: str) -> None:
    assert expected in text(profile_report(replace(measured(), provenance={"skipped": skipped})))


def test_the_sum_of_loss_and_norm_is_a_line_and_no_row_of_the_tables() -> None:
    points = (collective("broadcast", 2, 1024, 1e-5), collective("scalar_all_reduce", 2, 16, 2.5e-5))
    shown = text(show_report(replace(measured(), collectives=points)))
    assert f"summed over 2 ranks in {seconds_text(2.5e-5)}" in shown
    assert "1 of 1 groups and 1 of 1 sizes" in shown
    assert "scalar" not in shown


def test_many_sizes_share_a_screen_and_rounded_sizes_a_column() -> None:
    sizes = [2**power for power in range(3, 31)]
    points = [collective("all_reduce", 8, s, 1e-5 + s / 1e11) for s in sizes]
    points += [collective("all_reduce", 3, s // 24 * 24, 1e-5 + s / 1e11) for s in sizes[10:]]
    shown = text(profile_report(replace(measured(), collectives=tuple(points))))
    (header,) = [line for line in shown.splitlines() if line.startswith("operation") and "stride" in line]
    assert " ".join(header.split()) == "operation ranks stride 8 B 1 KiB 128 KiB 8 MiB 1 GiB bus"
    assert "2 of 2 groups and 5 of 28 sizes" in shown


def test_of_many_groups_the_smallest_and_the_largest_of_each_operation_are_listed() -> None:
    groups = [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
    operations = ("all_gather", "all_reduce", "broadcast", "send_recv")
    points = [collective(o, n, 1024, 1e-5, stride=stride) for o in operations for n, stride in groups]
    shown = text(profile_report(replace(measured(), collectives=tuple(points)))).splitlines()
    (title,) = [i for i, line in enumerate(shown) if "8 of 24 groups and 1 of 1 sizes" in line]
    rows = [line.split()[:4] for line in shown[title + 2 : title + 6]]
    assert rows == [
        ["all", "gather", "2", "1"],
        ["all", "gather", "8", "1"],
        ["all", "reduce", "2", "1"],
        ["all", "reduce", "8", "1"],
    ]


# ---- plots -----------------------------------------------------------------------------------------------


def test_a_plot_has_its_labels_and_the_ends_of_both_axes() -> None:
    series = [Series("one", ((1024.0, 1.0), (2.0**20, 80.0)), joined=True), Series("two", ((4096.0, 40.0),))]
    lines = text(plot(series, Axis("size", 2, size_text), "GB/s")).splitlines()
    assert lines[0] == "a one, b two"
    assert len(lines) == 21
    assert max(map(len, lines)) == 100
    assert lines[2].startswith("80┤")
    assert lines[2].rstrip("│").endswith("a")  # the largest value at the largest size
    assert lines[-4].lstrip().startswith("0┤")
    assert lines[-2].split("  ")[-1].strip() == "1 MiB"
    assert lines[-2].strip().startswith("1 KiB")
    assert lines[-1].split() == ["GB/s", "size"]
    assert sum(line.count("b") for line in lines[1:-2]) == 1
    assert any("·" in line for line in lines)


def test_a_plot_of_one_point_and_one_after_another() -> None:
    alone = [Series("alone", ((64.0, 3.0),))]
    first = text(plot(alone, Axis("m", 2, size_text), "GB/s"))
    assert first.splitlines()[-2].strip() == "64 B"
    text(plot([Series("other", ((1.0, 9.0), (9.0, 1.0)))], Axis("m", 10, str), "x"))
    assert text(plot(alone, Axis("m", 2, size_text), "GB/s")) == first


def test_show_draws_what_was_measured() -> None:
    shown = text(show_report(measured()))
    assert shown.startswith(text(profile_report(measured())))
    titles = ("FLOP/s of each", "of square products", "bus bandwidth of the")
    gemm, modelled, bandwidth = (shown.index(title) for title in titles)
    first = shown[gemm:modelled].splitlines()
    assert first[1] == "a fp32"
    assert first[3].startswith("100┤")  # 512³ is the best: 80 of 80 GFLOP/s
    # 2·128³ and 2·512³ FLOPs
    assert [line.split()[-2:] for line in first if line.strip().startswith("4.19 M")] == [["268", "M"]]
    assert sum(line.count("a") for line in first[2:-5]) == 2
    assert "% of best" in shown[gemm:modelled]
    assert "GEMM bf16: 160 GFLOP/s, 4 tiles at once; a paper" in shown
    assert "% of peak" in shown[modelled:bandwidth]
    last = shown[bandwidth:]
    assert "a all reduce (4 ranks), b all to all (2 ranks)" in last
    largest = bus_bandwidth(collective("all_reduce", 4, MIB, 6e-5 + 1.5 * MIB / 5e8)) / 1e9
    smallest = bus_bandwidth(collective("all_to_all", 2, 65536, 5e-5)) / 1e9
    top = max(largest, smallest)
    assert f"{top:.3g}┤" in last


def test_show_of_a_catalogue_profile_names_models_and_sources() -> None:
    shown = text(show_report(load_hardware(resolve_hardware_path("h100-sxm-80gb"))))
    assert "GEMM bf16: 794 TFLOP/s, 132 tiles at once; published: stas00/ml-engineering" in shown
    assert "peak: published: NVIDIA H100 data sheet, SXM5, dense" in shown
    assert "attention bf16: 346 and 297 TFLOP/s; nominal: peak times 0.35 forward" in shown
    assert "bf16 and fp16" in shown
    # bf16 at m = n = k = 16384: tiles of 256·128 fill their waves but for the last, each with its 2·16384 products at
    # 794.5 of 989.4 TFLOP/s and 2.7 writes of its result at 2.85 TB/s.
    top = max(float(line.split("┤")[0]) for line in shown.splitlines() if "┤" in line)
    products, writes = 2 * 16384 / 794.5e12, 2.7 * 2 / 2.8475e12
    assert 0.98 < top / (80.3 * products / (products + writes)) < 1.0
    assert "each measured product" not in shown
    assert "bus bandwidth" not in shown


@pytest.mark.parametrize("name", list_catalogue("hardware"))
def test_every_catalogue_profile_can_be_shown_and_compared(name: str) -> None:
    hardware = load_hardware(resolve_hardware_path(name))
    assert hardware.device in text(show_report(hardware))
    assert "all figures are the same" in text(difference_report(hardware, hardware))
    assert text(difference_report(hardware, measured()))


def test_plotext_and_torch_stay_away_until_a_plot_is_drawn() -> None:
    code = (
        "import sys, planner.profile_report, profiles.nccl_points;"
        "print([name for name in ('plotext', 'torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
