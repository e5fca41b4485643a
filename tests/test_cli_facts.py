"""The command line on facts: the catalogue, profiles, nccl-tests output and published runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import run


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "profile", "--list")
    assert code == 0
    for name in ("deepseek-v3", "dgx-h100", "mi300x"):
        assert name in out
    code, out, _ = run(capsys, monkeypatch, "profile", "--list", "--json")
    assert code == 0
    assert {"name": "gpt3-175b", "parameters": 174615846912} in json.loads(out)["models"]


def test_profiles_are_shown_and_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "profile", "--show", "h100-sxm-80gb")
    assert code == 0
    assert "NVIDIA H100-SXM5-80GB" in out
    code, out, _ = run(capsys, monkeypatch, "profile", "--show", "h100-sxm-80gb", "--against", "a100-sxm-80gb")
    assert code == 0
    assert "a100-sxm-80gb" in out


def test_nccl_tests_fill_a_profile_and_its_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes' all-reduce: the cluster, profiled as one node of one device, becomes two of eight."""
    from profiles.catalogue import resolve_cluster, resolve_hardware_path
    from profiles.cluster import load_cluster_file, save_cluster
    from profiles.hardware import load_hardware, save_hardware

    hardware, cluster = tmp_path / "h.yaml", tmp_path / "h.cluster.yaml"
    save_hardware(load_hardware(resolve_hardware_path("h100-sxm-80gb")), hardware)
    save_cluster(resolve_cluster("dgx-h100"), cluster)
    text = tmp_path / "all_reduce.txt"
    rows = "".join(
        f"{size} {size // 4} float sum -1 {time} 1.0 1.0 0 {time} 1.0 1.0 0\n"
        for size, time in ((2**20, 300), (2**30, 6e3))
    )
    text.write_text("# meshwright: operation=all_reduce ranks=16 ranks_per_node=8\n" + HEADER + rows)
    code, _, err = run(capsys, monkeypatch, "profile", "--nccl-tests", str(text), "-o", str(hardware))
    assert code == 0, err
    assert load_hardware(hardware).collective_seconds("all_reduce", 16, 2**30) == pytest.approx(6e-3)
    fitted = load_cluster_file(cluster)
    assert fitted.nodes == 2
    assert "fit of 2 points" in fitted.links[-1].source


HEADER = """#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""


# ---- validate ---------------------------------------------------------------------------------------------------

RUNS = Path(__file__).parent / "data" / "published_runs" / "small.csv"


def test_validate_prints_one_document_or_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "validate", str(RUNS), "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == ["rows", "summary", "sweeps"]
    code, out, err = run(capsys, monkeypatch, "validate", str(RUNS))
    assert (code, err) == (0, "")
    assert "sc21_t1_76.1B" in out
    assert "free constants in the whole model" in " ".join(out.split())


def test_validate_names_what_it_cannot_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "runs.csv"
    broken.write_text(RUNS.read_text().replace("A100-SXM-80GB,32,", "A100-SXM-80GB,thirty,", 1))
    for path, texts in (
        (broken, ["line 2, column num_gpus", "a whole number >= 1", "'thirty'"]),
        (tmp_path / "run.csv", ["does not exist", "is", "runs.csv meant?"]),
        (tmp_path, ["no finished run in"]),
    ):
        code, out, err = run(capsys, monkeypatch, "validate", str(path))
        assert (code, out) == (2, "")
        assert all(text in " ".join(err.split()) for text in texts), err
