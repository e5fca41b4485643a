"""The command line: exit codes, one-screen errors, JSON that is alone on standard output, start-up time's causes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import run

PLAN = ["plan", "--model", "gpt2", "--cluster", "dgx-a100:1", "--global-batch", "64", "--seq", "1024"]
ESTIMATE = ["estimate", *PLAN[1:]]


BAD_INPUT = {
    "unknown model": ([*PLAN[:2], "gtp2", *PLAN[3:]], ["is gpt2 meant?", "--model"]),
    "unknown cluster": ([*PLAN[:4], "dgx-a10", *PLAN[5:]], ["is dgx-a100 meant?", "--cluster"]),
    "cluster of no nodes": ([*PLAN[:4], "dgx-a100:0", *PLAN[5:]], ["--cluster", "'0'"]),
    "negative batch": ([*PLAN[:6], "-4", *PLAN[7:]], ["--global-batch", "-4"]),
    "fractional batch": ([*PLAN[:6], "1.5", *PLAN[7:]], ["--global-batch", "1.5"]),
    "missing option": (PLAN[:5], ["--global-batch"]),
    "unknown verb": (["plam"], ["No such command 'plam'", "is 'plan', 'replan' meant? All of them: cli.py --help"]),
    "unknown option": ([*PLAN, "--tp", "8"], ["--tp"]),
    "unknown pin": ([*PLAN, "--pin", "tpp=8"], ["KEY=VALUE", "is 'tp' meant?"]),
    "pin that is no number": ([*PLAN, "--pin", "tp=two"], ["a whole number >= 1", "two"]),
    "contradicting pins": ([*PLAN, "--pin", "tp=2", "--pin", "tp=4"], ["pinned twice", "2 and 4"]),
    "pinned and banned": ([*PLAN, "--pin", "pp=2", "--ban", "pp"], ["both pinned and banned"]),
    "memory without a unit": ([*PLAN, "--memory-limit", "80Q"], ["76GiB", "80Q"]),
    "too many devices": ([*PLAN, "--devices", "12"], ["--devices", "12"]),
    "unknown precision": ([*PLAN, "--precision", "fp12"], ["--precision", "bf16"]),
    "layout that does not fill": ([*ESTIMATE, "--layout", "tp=3"], ["tp·cp·pp = 3", "8 devices"]),
    "heads not divisible": ([*ESTIMATE, "--layout", "tp=8,dp=1"], ["tp=8 does not divide 12 attention heads"]),
    "batch not divisible": ([*ESTIMATE, "--layout", "micro_batch=3"], ["64 is not a multiple of micro_batch·dp"]),
    "layout key twice": ([*ESTIMATE, "--layout", "tp=2,tp=4"], ["tp is given twice"]),
    "zero 2 in a pipeline": ([*ESTIMATE, "--layout", "pp=2,zero=2"], ["zero 2 is zero 1 there"]),
    "a range the wrong way round": ([*PLAN, "--pin", "tp=4..2"], ["LEAST..MOST", "4..2"]),
    "a range from nothing": ([*PLAN, "--pin", "tp=0..2"], ["a whole number >= 1"]),
    "one of several that is no schedule": ([*PLAN, "--pin", "schedule=1f1b|1f2b"], ["1f2b", "is '1f1b' meant?"]),
    "contradicting ranges": ([*PLAN, "--pin", "tp=2|4", "--pin", "tp=4..8"], ["pinned twice", "2|4 and 4..8"]),
    "a front of what": ([*PLAN, "--pareto", "time"], ["devices or memory", "time"]),
    "a front into a file": ([*PLAN, "--pareto", "memory", "-o", "p.yaml"], ["--pareto and -o do not go together"]),
    "imbalance below even": ([*PLAN, "--expert-imbalance", "0.5"], ["--expert-imbalance"]),
    "infinite imbalance": ([*PLAN, "--expert-imbalance", "inf"], ["a finite number >= 1", "inf"]),
    "infinite price": ([*PLAN, "--price", "inf"], ["a finite number >= 0", "inf"]),
    "explain nothing": (["explain"], ["Missing argument", "PLAN.YAML", "cli.py explain --help"]),
    "option without a value": (["plan", "--model"], ["--model", "cli.py plan --help"]),
    "steps below one": (["verify", "plan.yaml", "--steps=0"], ["greater than or equal to 1", "cli.py verify --help"]),
    "infinite learning rate": (["train", "--lr", "inf"], ["a finite number >= 0", "inf"]),
    "infinite minutes": (["train", "--checkpoint-minutes", "inf"], ["a finite number >= 0", "inf"]),
    "an endless timeout": (["verify", "plan.yaml", "--timeout", "1e30"], ["1 to 31,536,000", "1e30"]),
    "a seed of many digits": (["train", "--seed", "99999999999"], ["--seed", "4294967295", "99999999999"]),
    "no word for a number": (["plan", "--top", "x"], ["a valid integer", "cli.py plan --help"]),
    "explain no such plan": (["explain", "/nowhere/plan.yaml"], ["/nowhere/plan.yaml", "no such file"]),
    "no such plan": (["train", "/nowhere/plan.yaml"], ["/nowhere/plan.yaml", "no such file"]),
    "resume without a run": (["train", "--resume"], ["--run-dir"]),
    "show and quick": (["profile", "--show", "h100-sxm-80gb", "--quick"], ["--show and --quick do not go together"]),
    "against nothing": (["profile", "--against", "h100-sxm-80gb"], ["--show FIRST --against SECOND"]),
    "show an unknown profile": (["profile", "--show", "h100-sxm"], ["is h200-sxm meant?", "--show"]),
    "nccl-tests without a profile": (["profile", "--nccl-tests", "x.txt", "-o", "/nowhere/h.yaml"], ["no profile yet"]),
    "calibrate without a profile": (["profile", "--calibrate", "runs/x", "-o", "/nowhere/h.yaml"], ["/nowhere/h.yaml"]),
    "measure no such precision": (["profile", "--precision", "fp12"], ["--precision", "one of fp32, tf32, bf16, fp16"]),
    "resume without a profile": (["profile", "--resume", "-o", "/nowhere/h.yaml"], ["/nowhere/h.yaml does not exist"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_screen_and_exit_code_2(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, texts = BAD_INPUT[name]
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) <= 24
    assert "Traceback" not in err
    labels = [line.split()[0] for line in err.splitlines() if line[:1].isalpha()]
    assert labels == ["error", "where", "expected", "got", "try"], err
    flat = " ".join(err.split())
    for text in texts:
        assert text in flat, err


def test_json_errors_are_one_document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, *PLAN[:2], "gtp2", *PLAN[3:], "--json")
    assert code == 2
    assert json.loads(out)["error"]["try"] == "is gpt2 meant?"


def test_plan_json_is_the_plan_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, *PLAN, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == "meshwright.plan/v1"
    assert document["certificate"]["gap"] == 0
    assert sum(document["prediction"]["breakdown_seconds"].values()) == pytest.approx(
        document["prediction"]["step_seconds"], rel=1e-9
    )


def test_a_pin_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = run(capsys, monkeypatch, *PLAN, "--pin", "tp=2", "--pin", "zero=1", "--json")
    layout = json.loads(out)["layout"]
    assert (layout["tp"], layout["zero"]) == (2, 1)


def test_an_illegal_pin_says_which_rule(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, *PLAN, "--pin", "tp=8")
    assert code == 1
    assert "tp=8 does not divide 12 attention heads" in " ".join(err.split())


def test_estimate_that_does_not_fit_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["estimate", "--model", "llama2-70b", *ESTIMATE[3:], "--layout", "tp=8", "--json"]
    code, out, _ = run(capsys, monkeypatch, *arguments)
    document = json.loads(out)
    assert code == 0
    assert document["fits"] is False
    assert set(document) == {"layout", "fits", "prediction", "stages"}
    assert document["prediction"]["peak_memory_bytes"] > 80 * 2**30


@pytest.mark.full  # every remedy is a search of its own
def test_nothing_fits_says_how_much_is_missing_and_what_would_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["plan", "--model", "gpt3-175b", "--cluster", "dgx-a100:1", "--global-batch", "64", "--seq", "2048"]
    code, out, err = run(capsys, monkeypatch, *arguments)
    flat = " ".join(err.split())
    assert (code, out) == (1, "")
    assert "recomputing at will, stage 0 misses" in flat
    assert "nothing fits" in flat
    assert "stage" in flat
    assert "GiB" in flat
    assert re.search(r"\d+ devices, for example .*: step [0-9.]+ s, [0-9.]+ µs a token", flat)


def test_precision_that_the_runtime_lacks_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, *PLAN, "--precision", "fp16", "--target", "torchtitan")
    assert code == 1
    assert "does not train in fp16 today" in err


def test_a_loss_scale_is_of_fp16(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan_file: Path
) -> None:
    train = ["train", str(plan_file), "--run-dir", str(tmp_path / "run")]
    code, _, err = run(capsys, monkeypatch, *train, "--initial-loss-scale", "8")
    assert code == 2
    assert "--initial-loss-scale is of fp16, and the plan is in bf16, which has no loss scale" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def plan_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    code, _, _ = run(
        capsys, monkeypatch, *PLAN, "--pin", "pp=2", "--pin", "virtual_stages=1", "--ban", "recompute", "-o", str(path)
    )
    assert code == 0
    return path


def _edited(path: Path, edit: str) -> Path:
    document = yaml.safe_load(path.read_text())
    exec(edit, {"plan": document})
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            "plan['stages'][0]['layers'][1] -= 1; plan['stages'][0]['recompute']['none'] -= 1",
            "layers 9 to 9 are lost",
        ),
        ("plan['stages'][0]['layers'][1] += 1; plan['stages'][0]['recompute']['none'] += 1", "10 to 10 are doubled"),
        ("plan['model']['layers'] = 24", "layers are lost"),
        ("plan['layout']['tp'] = 5", "tp·cp·pp·dp"),
        ("plan['layout']['tpp'] = 1", "is 'tp' meant?"),
        ("plan['job']['global_batch'] = -1", "job.global_batch"),
        ("plan['job']['global_batch'] = 1.5", "job.global_batch"),
        ("del plan['model']['heads']", "model.heads"),
        ("plan['schema'] = 'meshwright.plan/v9'", "another version"),
        ("plan['stages'][1]['head'] = False", "the head on the last"),
    ],
)
def test_an_edited_plan_is_refused_before_anything_starts(
    edit: str, text: str, plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = plan_file.parent / "run"
    code, _, err = run(capsys, monkeypatch, "train", str(_edited(plan_file, edit)), "--run-dir", str(run_dir))
    assert code == 2
    assert text in " ".join(err.split())
    assert not run_dir.exists()


@pytest.mark.parametrize("content", ["layers: [1, 2", "", "just words", "{}", "schema: {a: b}", "\x00"])
def test_a_file_that_is_no_plan_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    code, _, err = run(capsys, monkeypatch, "train", str(path))
    assert code == 2
    assert str(path) in "".join(err.split())


def test_a_plan_for_another_model_is_refused(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "train", str(plan_file), "--model", "gpt2-medium")
    assert code == 2
    assert "the plan is for another model" in err


def test_under_torchrun_plan_and_run_folder_must_be_named(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    code, _, err = run(capsys, monkeypatch, "train", str(plan_file))
    assert code == 2
    assert "a plan file and --run-dir FOLDER" in err


def test_output_into_a_missing_place_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = run(capsys, monkeypatch, *PLAN, "-o", str(blocked / "plan.yaml"))
    assert code == 2
    assert "cannot be written" in err


def test_plan_and_help_never_import_torch() -> None:
    script = (
        "import sys, cli\n"
        f"for words in (['--help'], {PLAN!r}):\n"
        "    sys.argv = ['cli.py', *words]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code, end.code\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_planner_nor_solver() -> None:
    script = (
        "import sys, cli\nsys.argv = ['cli.py', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'pulp', 'yaml', 'numpy', 'networkx', 'planner.search'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---- the answers ------------------------------------------------------------------------------------------------


def test_explain_and_against_answer_in_words_and_in_json(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "explain", str(plan_file))
    assert (code, err) == (0, "")
    for words in ("what binds", "the best otherwise, and why it loses", "what would help, solved anew"):
        assert words in out
    code, out, _ = run(capsys, monkeypatch, "explain", str(plan_file), "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {"layout", "prediction", "stated_seconds", "binds", "runners_up", "helps", "faster"}
    assert document["helps"][0]["gain"] >= document["helps"][-1]["gain"]
    code, out, _ = run(capsys, monkeypatch, "explain", str(plan_file), "--against", "tp=2,pp=4", "--json")
    against = json.loads(out)["against"]
    assert code == 0
    assert (against["layout"]["tp"], against["layout"]["pp"]) == (2, 4)
    code, out, _ = run(capsys, monkeypatch, "explain", str(plan_file), "--against", "tp=8,pp=1")
    assert code == 0
    assert "tp=8 does not divide 12 attention heads" in out
    code, out, err = run(capsys, monkeypatch, "explain", str(plan_file), "--against", "tp=999")
    assert (code, out) == (2, "")
    assert "the settings do not fill the devices" in err


def test_a_front_is_one_document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, monkeypatch, *PLAN, "--pareto", "devices", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["pareto"], document["ended"]) == ("devices", None)
    assert [point["devices"] for point in document["points"]] == [8, 4, 2, 1]


def test_ranges_of_pins_are_kept_in_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    pins = ("--pin", "pp=2|4", "--pin", "micro_batch=1..2")
    code, out, _ = run(capsys, monkeypatch, *PLAN, *pins, "--expert-imbalance", "1.5", "-o", str(path), "--json")
    document = json.loads(out)
    assert code == 0
    assert document["job"]["pins"] == {"pp": [2, 4], "micro_batch": "1..2"}
    assert document["job"]["expert_imbalance"] == 1.5
    assert document["layout"]["pp"] in (2, 4)
    from planner.plan import load

    assert load(path).job.pins == {"pp": (2, 4), "micro_batch": range(1, 3)}
    assert json.loads(json.dumps(load(path).to_dict())) == document


@pytest.mark.full
def test_a_price_is_said_and_what_does_not_fit_has_remedies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run(capsys, monkeypatch, *PLAN, "--price", "2.5", "--top", "3")
    assert "per billion tokens at $2.5 a GPU-hour" in out
    assert "than the default a person would write" in out
    assert "differs in" in out
    assert len(out.splitlines()) <= 45
    code, out, _ = run(capsys, monkeypatch, *PLAN, "--memory-limit", "1GiB", "--json")
    assert code == 1
    assert {"change", "layout", "step_seconds", "seconds_per_token"} <= set(json.loads(out)["error"]["remedies"][0])


def test_allow_idle_never_makes_a_plan_slower(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for extra in ((), ("--allow-idle",)):
        _, out, _ = run(capsys, monkeypatch, *PLAN, *extra, "--json")
        steps.append(json.loads(out)["prediction"]["step_seconds"])
    assert steps[1] <= steps[0]
