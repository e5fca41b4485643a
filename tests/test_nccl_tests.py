"""Files of nccl-tests and rccl-tests: every format's numbers, errors with their line, and no traceback on any bytes.

Numbers in the samples: all_gather_old.txt from NVIDIA/nccl issue 644, several.log from ROCm/rccl pull request 2075
(the reduce_scatter part from NVIDIA/nccl-tests issue 128), the 8 MiB row of all_reduce_two_nodes.log and
rccl_all_reduce.csv from crickett-hpe/hpc-ai-envs pull request 30; the rest is made up in the programs' formats.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.cluster import COLLECTIVES
from profiles.input_error import InputError
from profiles.nccl_reports import NcclTestRun
from profiles.nccl_tests import read_nccl_tests

SAMPLES = Path(__file__).parent / "data" / "nccl_tests"
COLUMNS = "# size count type redop root time algbw busbw #wrong time algbw busbw #wrong\n"
ROW = "1024 256 float sum -1 20.5 0.05 0.05 0 21.5 0.05 0.05 0\n"
DEVICES = "#  Rank  0 Group  0 Pid 1 on a device  0 [0x07] X\n#  Rank  1 Group  0 Pid 2 on a device  1 [0x08] X\n"
END = "# Out of bounds values : 0 OK\n"


def read(tmp_path: Path, text: str, name: str = "all_reduce.txt") -> tuple[NcclTestRun, ...]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_nccl_tests(tmp_path / name)


def refused(tmp_path: Path, text: str, name: str = "all_reduce.txt") -> InputError:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, name)
    assert str(tmp_path / name) in caught.value.where
    return caught.value


def facts(run: NcclTestRun) -> tuple[str, int, int | None, str | None]:
    return run.operation, run.ranks, run.ranks_per_node, run.device


# ---- what is read ----------------------------------------------------------------------------------------


def test_new_text_under_mpirun_with_messages_of_nccl_between() -> None:
    (run,) = read_nccl_tests(SAMPLES / "all_reduce_two_nodes.log")
    assert facts(run) == ("all_reduce", 16, 8, "AMD Instinct MI300X")
    assert run.points == ((8388608, pytest.approx(91.10e-6)), (67108864, pytest.approx(412.5e-6)))
    assert run.version == "rccl-tests: Version develop:5272cd1, RCCL version 2.22.3+hip6.4"
    assert run.notes == ()


def test_old_text_without_redop_and_root_says_its_operation_in_the_file_name() -> None:
    (run,) = read_nccl_tests(SAMPLES / "all_gather_old.txt")
    assert facts(run) == ("all_gather", 8, 8, "GeForce RTX 3090")
    assert run.points[-1] == (134217728, pytest.approx(16059e-6))
    # The size column is the gathered tensor: 4194304 floats of each of 8 ranks.
    assert run.points[-1][0] == 4194304 * 4 * 8


def test_several_runs_in_one_file_and_one_that_no_layout_uses() -> None:
    runs = read_nccl_tests(SAMPLES / "several.log")
    assert [run.operation for run in runs] == ["all_to_all", "broadcast", "reduce_scatter"]
    assert [run.ranks for run in runs] == [2, 2, 8]
    assert runs[0].points[0] == (32768 * 4 * 2, pytest.approx(42.91e-6))  # a rank's whole buffer
    assert runs[2].points == ((128, pytest.approx(32.31e-6)), (256, pytest.approx(24.01e-6)))  # not the empty sizes
    assert runs[0].notes == ("line 18: scatter_perf was left out, no layout uses it",)


def test_csv_takes_the_median_out_of_place() -> None:
    (run,) = read_nccl_tests(SAMPLES / "rccl_all_reduce.csv")
    assert facts(run) == ("all_reduce", 8, None, None)
    assert run.points == ((8388608, pytest.approx(92.1e-6)),)


def test_json_lists_one_device_a_process() -> None:
    (run,) = read_nccl_tests(SAMPLES / "sendrecv.json")
    assert facts(run) == ("send_recv", 8, 4, "NVIDIA H100 80GB HBM3")
    assert run.points == ((1048576, pytest.approx(40.25e-6)),)


def test_groups_that_ran_at_once_count_one_groups_ranks(tmp_path: Path) -> None:
    devices = "".join(f"# Rank {r} Group {r % 4} Pid {r} on n{r // 4} device 0 [0x1] X\n" for r in range(8))
    (run,) = read(tmp_path, devices + COLUMNS + ROW + END)
    assert (run.ranks, run.ranks_per_node, run.groups) == (2, 1, 4)


@pytest.mark.parametrize("prefix", ["", "[1,0]<stdout>:", "[0] ", "0: ", "[prterun-n-1@1,0]<stdout>: "])
def test_a_launchers_prefix_is_taken_off(tmp_path: Path, prefix: str) -> None:
    text = "".join(prefix + line for line in (DEVICES + COLUMNS + ROW + END).splitlines(keepends=True))
    (run,) = read(tmp_path, text)
    assert (run.ranks, run.points) == (2, ((1024, pytest.approx(20.5e-6)),))


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("# size count type time algbw busbw error time algbw busbw error timestamp\n",
         "1024 256 float 20.5 0.05 0.05 1e-06 21 0.05 0.05 1e-06 2026-01-05 10:00:00\n"),
        (COLUMNS, "1024 256 float 20.5 0.05 0.05 N/A 21 0.05 0.05 N/A\n"),
        ("# size count type redop root time algbw busbw #wrong i_min i_max time algbw busbw #wrong i_min i_max\n",
         "1024 256 fp8_e4m3 sum -1 20.5 0.05 0.05 0 19 22 21 0.05 0.05 0 19 23\n"),
    ],
)  # fmt: skip
def test_columns_follow_their_names(tmp_path: Path, columns: str, row: str) -> None:
    assert read(tmp_path, DEVICES + columns + row + END)[0].points == ((1024, pytest.approx(20.5e-6)),)


def test_what_a_file_does_not_say_is_added_as_a_line(tmp_path: Path) -> None:
    line = "# meshwright: operation=all_gather ranks=16 ranks_per_node=8\n"
    (run,) = read(tmp_path, line + COLUMNS + ROW, "out.txt")
    assert facts(run) == ("all_gather", 16, 8, None)
    assert run.notes == ("line 1: the run has no closing lines, it may have been cut short",)


# ---- what is refused -------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_read_names_line_columns_and_a_way_out(tmp_path: Path) -> None:
    error = refused(tmp_path, DEVICES + COLUMNS + ROW + ROW[:30])
    assert error.lines() == [
        ("error", "a row that cannot be read"),
        ("where", f"{tmp_path / 'all_reduce.txt'}:5"),
        ("expected", "columns size count type redop root time algbw busbw #wrong time algbw busbw #wrong"),
        ("got", "'1024 256 float sum -1 20.5 0.0'"),
        ("try", "where the file was cut short here, delete the line; else run the test again"),
    ]


def test_missing_ranks_say_how_to_add_them(tmp_path: Path) -> None:
    error = refused(tmp_path, COLUMNS + ROW)
    assert error.what == "the number of ranks is missing"
    assert error.hint == "add the line '# meshwright: operation=all_reduce ranks=16 ranks_per_node=8'"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "has no run that can be used"),
        ("\x00\xff\x00" * 99, "has no run that can be used"),
        (DEVICES, "has no run that can be used"),
        (DEVICES + COLUMNS, "a run without times"),
        (ROW, "a row before any column names"),
        (DEVICES.replace("Pid 2", "Pi"), "a device line that cannot be read"),
        (DEVICES.replace("Rank  1", "Rank  0") + COLUMNS + ROW, "do not name every rank once"),
        (DEVICES.splitlines()[0] + "\n" + COLUMNS + ROW, "one rank alone sends nothing"),
        (DEVICES + COLUMNS[:40] + "\n" + ROW, "column names that cannot be read"),
        (DEVICES + COLUMNS.replace("time", "cputime") + ROW, "these are times of the CPU"),
        (DEVICES + COLUMNS + ROW.replace(" 0 21.5", " 3 21.5"), "a wrong result"),
        (DEVICES + COLUMNS + ROW.replace("20.5", "N/A"), "a row that cannot be read"),
        (DEVICES + COLUMNS + ROW.replace("20.5", "0.00"), "a time that cannot be"),
        (DEVICES + COLUMNS + ROW + "# Out of bounds values : 2 FAILED\n", "gave wrong results"),
        (DEVICES + "# (B) (elements) (ms) (GB/s)\n" + COLUMNS + ROW, "the time column has another unit"),
        ("# bytes N type op time algbw busbw res\n", "the tests of NCCL 1 are not read"),
        ("# meshwright: rank=2\n" + COLUMNS + ROW, "this line adds nothing that is known"),
        ("# meshwright: ranks=6 ranks_per_node=4\n" + COLUMNS + ROW, "the ranks do not fill whole nodes"),
        ("# Collective test starting: hypercube_perf\n" + DEVICES + COLUMNS + ROW, "has no run that can be used"),
        ("# Collective test starting: wave_perf\n" + DEVICES + COLUMNS + ROW, "collective was measured is unknown"),
        ('{"args": [], "config": {}}', "the key config.devices is missing"),
        ("[{}", "is not valid JSON"),
        ("numCycle,collective,size,inplace,time\n0,AllReduce,8,0\n", "a row that cannot be read"),
        ("numCycle,collective,ranks,ranksPerNode,gpusPerRank,size,inplace,time\n0,AllReduce,16,8,1,8,0,9\n",
         "how many ranks made a group cannot be told"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_an_input_error(tmp_path: Path, text: str, what: str) -> None:
    assert what in refused(tmp_path, text).what


def test_an_operation_named_nowhere_is_missing(tmp_path: Path) -> None:
    error = refused(tmp_path, DEVICES + COLUMNS + ROW, "out.txt")
    assert error.what == "which collective was measured is missing"


def test_no_such_file_has_a_near_match(tmp_path: Path) -> None:
    (tmp_path / "all_reduce.txt").write_text("")
    with pytest.raises(InputError, match=r"is .*all_reduce.txt meant"):
        read_nccl_tests(tmp_path / "all_reduc.txt")


# ---- any bytes -------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 60), st.binary(max_size=6) | st.sampled_from([b"\n", b"9", b" ", b"null", b"-"])
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(path.name for path in SAMPLES.iterdir())), edits=EDITS, keep=st.floats(0, 1))
def test_a_damaged_file_is_read_or_refused(name: str, edits: list[tuple[float, int, bytes]], keep: float) -> None:
    data = (SAMPLES / name).read_bytes()
    for place, length, insert in edits:
        at = int(place * len(data))
        data = data[:at] + insert + data[at + length :]
    if keep < 0.5:
        data = data[: int(2 * keep * len(data))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            runs = read_nccl_tests(path)
        except InputError:
            return  # and nothing else: any other error fails the test
    for run in runs:
        assert run.operation in COLLECTIVES
        assert run.ranks >= 2
        assert all(size > 0 and 0 < seconds < math.inf for size, seconds in run.points)
        assert len(run.points) > 0
