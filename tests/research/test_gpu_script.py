"""benchmarks/gpu.sh and its steps, on a CPU and on sizes that take no time: so that they run once there is a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Plan, Record, main
from benchmarks.gpu_ways import SOLVERS, WAYS
from qrnn_layer import METHODS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
POINTWISE = {name for name in SOLVERS if "pointwise" in name}  # on CUDA alone
TINY = Plan(
    shapes=((2, 16, 3),),
    longest_compiled_loop=8,
    width=4,
    batches=(2, 3),
    lengths=(4,),
    copy_size=8,
    matrix_size=8,
    launches=2,
    budget=0.0,
    cell_budget=0.0,
    backend="eager",  # traces as the compiler does, and generates no code
)


def rows(folder: Path, step: str, *flags: str) -> list[dict]:
    """Run a step, and return what it wrote."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        assert main([step, str(folder), "--device", "cpu", *flags], TINY) == 0
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.compiler.reset()
    content = json.loads((folder / f"{step}.json").read_text())
    assert {"command", "commit", "machine", "versions", "seed"} <= set(content["provenance"])
    return content["rows"]


# --- the steps -------------------------------------------------------------------------------------------------------


def test_a_failed_test_stops_no_other(tmp_path, monkeypatch):
    tests = "import pytest\ndef test_a(): assert 0, 'why'\ndef test_b(): pass\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "test_three.py").write_text(tests)
    monkeypatch.setattr(gpu, "TESTS", tmp_path / "test_three.py")
    found = rows(tmp_path, "tests")
    assert [(row["test"], row["outcome"]) for row in found] == [
        ("test_a", "failed"),
        ("test_b", "passed"),
        ("test_c", "skipped"),
    ]
    assert "why" in found[0]["text"] and found[0]["seconds"] >= 0


def test_every_method_is_measured_and_right_or_says_why_not():
    found = gpu.method_rows((2, 16, 3), False, TINY, "cpu")
    assert {row["what"] for row in found} == {"copy", *METHODS, *SOLVERS}
    assert {(row["what"], "skipped" in row) for row in found} == {
        (name, name in POINTWISE) for name in ("copy", *METHODS, *SOLVERS)
    }
    for row in found:
        if "errors" in row:
            assert len(row["errors"]) == {"forward": 1, "forward + backward": 3}[row["part"]]
            assert max(row["errors"]) < 1e-5, row
            assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]


def test_methods_are_measured_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WAYS", {name: WAYS[name] for name in ("loop", "scan", *POINTWISE)})
    found = rows(tmp_path, "methods")
    for part in ("forward", "forward + backward"):
        forms = {(row["what"], row["form"]) for row in found if row["part"] == part and "skipped" not in row}
        assert forms == {("copy", "eager"), ("loop", "eager"), ("scan", "eager"), ("scan", "compiled")}
    reasons = {row["skipped"] for row in found if row["what"] == "loop" and "skipped" in row}
    assert reasons == {"slow: not tried beyond T = 8"}
    limits = json.loads((tmp_path / "methods.json").read_text())["limits"]
    assert {"gb_per_s", "us_a_launch", "tflop_per_s"} < {key for row in limits for key in row}


def test_a_way_that_is_wrong_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WAYS", {"wrong": lambda log_f, x, h0: x + h0.unsqueeze(1) * log_f})
    errors = [row["errors"] for row in rows(tmp_path, "methods") if row["what"] == "wrong"]
    assert errors and all(max(found) > 0.1 for found in errors)


def test_every_cell_of_the_grid_is_compared_with_tf32_and_without(tmp_path):
    found = rows(tmp_path, "fig4")
    assert not [row for row in found if "skipped" in row]
    cells = {(row["B"], row["part"], row["tf32"], row["what"], row["form"]) for row in found}
    eager = {("QRNN", "eager"), ("LSTM", "eager")}
    assert {cell[3:] for cell in cells if cell[2]} == eager | {("QRNN", "compiled")}
    assert {cell[3:] for cell in cells if not cell[2]} == eager
    assert len(cells) == len(found) == 2 * 2 * (3 + 2)


def test_the_whole_plan_is_what_was_to_be_measured():
    plan = gpu.PLAN
    assert plan.shapes == ((32, 512, 640), (8, 512, 320), (128, 32, 320), (1, 65_536, 64))
    assert len(plan.batches) * len(plan.lengths) == 30 and plan.width == 320


def test_compiling_ahead_says_what_failed(monkeypatch):
    assert "seconds" in gpu.compiled_row(("a way", lambda: gpu.compile_method(TINY, "cpu", (2, 16, 3), "scan")))
    assert gpu.compiled_row(("nothing", lambda: 1 / 0)) == {
        "what": "nothing",
        "skipped": "ZeroDivisionError: division by zero",
    }


def test_models_are_trained_at_once_and_tested_where_they_did_not_come_to_it(tmp_path, monkeypatch):
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text("the cat sat on the <unk> mat\n" * 40)
    small = ["--preset", "bradbury", "--epochs", "1", "--embedding", "4", "--hidden", "4", "--batch-size", "2"]
    late = {"qrnn": ["--no-test"], "lstm": []}  # as a run that was stopped, it has not read the test split
    monkeypatch.setattr(gpu, "flags", lambda preset, model: [*small, "--models", model, *late[model]])
    found = {row["run"]: row for row in rows(tmp_path, "bradbury", "--data", str(tmp_path), "--seconds", "300")}
    assert {name: row["beside"] for name, row in found.items()} == {"qrnn": ["lstm"], "lstm": ["qrnn"]}
    for row in found.values():
        assert row["result"]["test_perplexity"] > 1 and row["result"]["epochs"], row
    assert str(tmp_path) not in json.dumps(found)


def test_a_run_that_is_stopped_before_its_first_epoch_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "flags", lambda preset, model: ["--preset", "demo", "--models", model])
    for row in rows(tmp_path, "bradbury", "--data", str(tmp_path), "--seconds", "0"):
        assert row["skipped"] and row["exit_code"] != 0


@pytest.mark.parametrize("arguments", (["nothing", "out"], ["tests"], ["tests", "out", "--dev", "cpu"]))
def test_wrong_arguments_are_told_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")


def test_without_data_the_training_is_skipped_with_a_line(tmp_path, capsys):
    assert main(["bradbury", str(tmp_path), "--device", "cpu", "--data", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"bradbury: skipped, there is no folder {tmp_path / 'none'}\n"
    assert not (tmp_path / "bradbury.json").exists()


def test_the_commit_can_be_told(tmp_path, monkeypatch):
    for told, commit, dirty in (("0123", "0123", False), ("0123-dirty", "0123", True)):
        monkeypatch.setenv("COMMIT", told)
        Record(tmp_path / "a.json", "cpu")
        provenance = json.loads((tmp_path / "a.json").read_text())["provenance"]
        assert (provenance["commit"], provenance["dirty"]) == (commit, dirty)


# --- the script ------------------------------------------------------------------------------------------------------


def test_the_script_is_free_of_slips():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_the_script_goes_on_after_a_failed_step_and_logs(tmp_path):
    """The interpreter is one that fails, and prints what it was asked for."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "asked: $*"\nexit 3\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out"), "data"], env={**os.environ, "PYTHON": str(fake)}, cwd=tmp_path, check=True
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    asked = [line.split()[3] for line in log.splitlines() if line.startswith("asked: ")]
    assert done.returncode == 0
    assert sorted(asked[:2]) == ["compile_methods", "tests"] and asked[2] == "methods"
    assert sorted(asked[3:5]) == ["bradbury", "fig4"] and asked[5:] == ["training_steps"]
    assert log.count("exit code 3") == 6 and f"--data {tmp_path / 'data'}" in log


def test_the_limits_of_the_steps_are_under_a_quarter_of_an_hour():
    limits = {name: int(limit) for limit, name in re.findall(r"^ [^#\n]*\bstep (\d+) (\w+)", SCRIPT.read_text(), re.M)}
    assert set(limits) == {*gpu.MEASURED, "bradbury"}
    assert sum(limits.values()) - limits["compile_methods"] - limits["bradbury"] < 15 * 60  # beside tests and fig4


def test_steps_without_a_network_need_pytorch_alone():
    """Of what is no part of Python or of this project, PyTorch and what it brings are imported, and nothing else."""
    code = (
        "import sys, torch, torch._dynamo, torch.utils.benchmark, torch.profiler; before = set(sys.modules)\n"
        "import benchmarks.gpu\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(new - {'torch', 'benchmarks', 'lab', 'qrnn', 'qrnn_layer'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
