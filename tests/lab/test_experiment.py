"""The experiment, from the command line to the report."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import experiment
from examples.translation import __main__ as translation
from experiment import LanguageModelling, build_model, build_qrnn, main
from lab import run as comparison
from lab.checkpoint import load_checkpoint
from lab.command_line import exit_code, parse
from lab.corpora import load_corpus
from lab.dense_lstm import DenseLSTM
from lab.language_model import LanguageModel
from lab.presets import PRESETS
from lab.run import count_parameters
from lab.run_folder import RunFolder
from lab.synthetic import sample_sentences
from lab.training import Trainer

SCRIPT = str(Path(experiment.__file__))
TINY = ["--preset", "demo", "--corpus", "text", "--data", "text", "--embedding", "8", "--hidden", "12", "--layers", "2"]
TINY += ["--epochs", "2", "--batch-size", "8", "--device", "cpu", "--lr", "0.004"]
STREAM = [*TINY, "--protocol", "stream", "--bptt", "10", "--zoneout", "0.2", "--dropout", "0.3"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, but for a small text."""
    for split, seed, count in (("train", 1, 150), ("valid", 2, 30), ("test", 3, 30)):
        (tmp_path / "text").mkdir(exist_ok=True)
        lines = [" ".join(sentence) for sentence in sample_sentences(count, seed=seed)]
        (tmp_path / "text" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on more
    yield tmp_path
    torch.set_num_threads(before)


def run_script(*arguments: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(run: str, model: str) -> list[dict[str, float]]:
    """metrics.jsonl but for the times."""
    lines = [json.loads(line) for line in Path("runs", run, model, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def results(run: str) -> dict:
    return json.loads(Path("runs", run, "results.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_both_models_are_compared(capsys):
    assert main([*TINY, "--name", "x"]) == 0
    printed = capsys.readouterr().out
    report = Path("runs/x/report.md").read_text()
    found = results("x")
    assert "The whole run will take about" in printed
    for model in found["models"]:
        for word in (model["model"].upper(), f"{model['test_perplexity']:.2f}", f"{model['parameters']:,}"):
            assert word in printed and word in report
        assert model["sample"] in report
        assert [line["epoch"] for line in model["epochs"]] == [1, 2]
        assert model["valid_perplexity"] == min(line["valid_perplexity"] for line in model["epochs"])
        assert 0 < model["training_seconds"] <= model["wall_seconds"]
        assert model["peak_memory_bytes"] > 2**20
    assert Path("runs/x/curves.png").read_bytes().startswith(b"\x89PNG")
    text = json.dumps(found)
    for private in (str(Path.cwd()), str(Path.home()), platform.node()):
        assert private not in text
    assert found["seed"] == 0 and not found["interrupted"] and found["versions"]["torch"] == torch.__version__


def test_test_perplexity_is_that_of_the_best_weights_word_by_word():
    assert main([*TINY, "--name", "x", "--models", "qrnn"]) == 0
    config = parse([*TINY, "--models", "qrnn"], PRESETS)
    task = LanguageModelling(config)
    model = task.build("qrnn").eval()
    model.load_state_dict(load_checkpoint(Path("runs/x/qrnn"), "best")[0])
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in task.test.epoch(0):
            for row, target in zip(inputs, targets, strict=True):
                length = int((target >= 0).sum())
                logits, _ = model(row[None, :length])
                total -= float(logits[0].double().log_softmax(-1)[range(length), target[:length]].sum())
                count += length
    assert results("x")["models"][0]["test_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_table_fits_a_terminal_and_the_report_can_be_repeated(capsys, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *TINY, "--data", str(folder / "text"), "--generate", "a b"])
    assert main([*TINY, "--name", "x", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("model  ") : printed.index("The report is")]
    assert max(map(len, table.splitlines())) <= 80
    report = Path("runs/x/report.md").read_text()
    for row in table.splitlines():
        assert not row or row.split("  ")[0] in report
    assert f"--data {folder / 'text'} --generate 'a b'`" in report
    assert str(folder) not in json.dumps(results("x"))


def test_timing_changes_nothing(monkeypatch):
    assert main([*TINY, "--name", "timed"]) == 0
    monkeypatch.setattr(comparison, "announce", lambda *_: None)
    assert main([*TINY, "--name", "untimed"]) == 0
    for model in ("qrnn", "lstm"):
        assert log("timed", model) == log("untimed", model)


def test_demo_prints_the_best_possible_perplexity(capsys):
    assert main(["--preset", "demo", "--epochs", "1", "--hidden", "16", "--embedding", "16", "--models", "qrnn"]) == 0
    floor = load_corpus("synthetic").floor
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("model") and line.endswith("best possible") for line in lines)
    for name, value in (("validation", floor["valid"]), ("test", floor["test"])):
        (row,) = [line for line in lines if line.startswith(f"{name} perplexity")]
        assert row.endswith(f"{value:.2f}")


def test_a_long_run_on_a_cpu_is_announced(capsys, monkeypatch):
    monkeypatch.setattr(comparison, "seconds_per_item", lambda *_: 10.0)
    assert (
        main([*TINY, "--preset", "girrbach", "--name", "x", "--epochs", "3", "--models", "qrnn", "--vocabulary", "50"])
        == 0
    )
    printed = capsys.readouterr().out
    assert re.search(r"about \d+ h \d+ min", printed) and "--preset small" in printed


# --- fairness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_widths_are_matched_within_one_per_cent(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        target = count_parameters(build_qrnn(config, config.hidden))
        lstm = build_model(config, "lstm", 100)
    assert count_parameters(lstm.rnn) == pytest.approx(target, rel=0.01)
    config.check()


def test_a_tied_softmax_has_a_projection_at_every_width():
    for width in (8, 12):
        model = LanguageModel(torch.nn.LSTM(8, width), width, 20, 8, tied=True)
        assert model.projection.weight.shape == (8, width)


def test_dense_lstm_is_lstm_layers_and_goes_on_where_it_stopped():
    torch.manual_seed(0)
    rnn, x = DenseLSTM(3, 5, num_layers=2), torch.randn(2, 7, 3)
    first, _ = rnn.layers[0](x)
    second, (h, c) = rnn.layers[1](torch.cat([x, first], dim=2))
    output, states = rnn(x)
    torch.testing.assert_close((output, *states[1]), (second, h, c), rtol=0, atol=0)
    start, state = rnn(x[:, :4])
    rest, last = rnn(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([start, rest], dim=1), output)
    torch.testing.assert_close(last, states)


def test_dense_connections_are_for_both_models():
    config = parse(["--preset", "small", "--dense", "--dropout", "0.5"], PRESETS)
    qrnn, lstm = (build_model(config, name, vocabulary=10) for name in ("qrnn", "lstm"))
    assert qrnn.rnn.dense and isinstance(lstm.rnn, DenseLSTM) and lstm.rnn.dropout.p == 0.5
    assert abs(count_parameters(lstm.rnn) / count_parameters(qrnn.rnn) - 1) < 0.01


def test_forget_bias_is_for_both_models():
    flags = ["--preset", "small", "--no-dense", "--hidden", "6"]
    plain, raised = (parse([*flags, "--forget-bias", value], PRESETS) for value in ("0", "1"))
    for name in ("qrnn", "lstm"):
        before, after = (dict(build_model(config, name, 10).rnn.named_parameters()) for config in (plain, raised))
        hidden = build_model(plain, name, 10).hidden
        for key, parameter in before.items():
            expected = parameter.detach().clone()
            if key.endswith(".bias") or "bias_ih" in key:
                expected[hidden : 2 * hidden] += 1
            torch.testing.assert_close(after[key], expected, rtol=0, atol=0, msg=f"{name} {key}")


def test_initial_weights_of_glorot_are_for_both_models():
    config = parse(["--preset", "small", "--hidden", "40", "--initialisation", "xavier", "--forget-bias", "2"], PRESETS)
    for name in ("qrnn", "lstm"):
        model = build_model(config, name, 10)
        for key, parameter in model.rnn.named_parameters():
            blocks = parameter.detach().chunk(3 if name == "qrnn" else 4)
            for index, block in enumerate(blocks):
                if "bias" in key:
                    raised = index == 1 and "bias_hh" not in key
                    assert block.unique().tolist() == [2.0 if raised else 0.0], key
                elif "weight_hh" in key:
                    torch.testing.assert_close(block @ block.T, torch.eye(model.hidden), atol=1e-5, rtol=0)
                else:
                    bound = (6 / sum(block.shape)) ** 0.5
                    assert 0.98 * bound < block.abs().max() <= bound, key


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
def test_initial_candidates_are_larger_in_both_models(mode):
    flags = ["--preset", "small", "--hidden", "6", "--mode", mode, "--initialisation"]
    uniform, scaled = (parse([*flags, value], PRESETS) for value in ("uniform", "scaled"))
    for name in ("qrnn", "lstm"):
        before, model = dict(build_model(uniform, name, 10).rnn.named_parameters()), build_model(scaled, name, 10)
        first, gain = (0, 2 if mode == "f" else 4) if name == "qrnn" else (2 * model.hidden, 4)
        for key, parameter in model.rnn.named_parameters():
            expected = before[key].detach().clone()
            assert expected.abs().max() <= (1 / min(expected.shape[-1], model.hidden)) ** 0.5
            if key.endswith("weight") or "weight_ih" in key:
                expected[first : first + model.hidden] *= gain
            assert torch.equal(parameter, expected), f"{name} {key}"


def test_the_first_layer_can_see_fewer_words():
    config = replace(PRESETS["demo"], layers=3, first_kernel_size=1)
    assert [layer.kernel_size for layer in build_qrnn(config, 8).layers] == [1, 2, 2]


def test_no_match_keeps_the_width():
    config = parse(["--no-match"], PRESETS)
    with torch.device("meta"):
        assert build_model(config, "lstm", 100).hidden == config.hidden


def test_without_flags_it_is_the_preset_small():
    assert parse([], PRESETS) == parse(["--preset", "small"], PRESETS) == PRESETS["small"]


def test_girrbach_is_the_log_space_repository_setting():
    config = parse(["--preset", "girrbach"], PRESETS)
    wanted = {
        "preset": "girrbach",
        "corpus": "wikitext-2",
        "protocol": "sentence",
        "layers": 2,
        "hidden": 640,
        "embedding": 300,
        "kernel_size": 5,
        "mode": "fo",
        "zoneout": 0.1,
        "dropout": 0.4,
        "batch_size": 32,
        "epochs": 40,
        "optimizer": "adamw",
        "vocabulary": 10_000,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_dense_models_read_a_stream_and_continue_a_prompt(capsys):
    assert main([*STREAM, "--dense", "--amp", "bf16", "--epochs", "1", "--name", "x"]) == 0
    assert all(math.isfinite(model["test_perplexity"]) for model in results("x")["models"])
    assert main(["--generate", "the", "--name", "x"]) == 0


# --- stopping and going on -------------------------------------------------------------------------------------------


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


def test_killed_and_resumed_is_bit_for_bit_as_never_killed():
    arguments = [*STREAM, "--checkpoint-minutes", "0"]
    assert main([*arguments, "--name", "whole"]) == 0
    process = run_script(*arguments, "--name", "killed")
    wait_for_lines(Path("runs/killed/qrnn/metrics.jsonl"), 12, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("runs/killed/qrnn/result.json").exists()
    assert main([*arguments, "--name", "killed", "--resume"]) == 0
    for model in ("qrnn", "lstm"):
        assert log("whole", model) == log("killed", model)
    keys = ("best_epoch", "valid_perplexity", "test_perplexity", "sample")
    for one, other in zip(results("whole")["models"], results("killed")["models"], strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_interrupted_evaluates_reports_and_can_go_on(number):
    arguments = [*STREAM, "--name", "x", "--epochs", "200"]
    process = run_script(*arguments)
    wait_for_lines(Path("runs/x/qrnn/metrics.jsonl"), 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    (model,) = results("x")["models"]
    assert results("x")["interrupted"] and model["test_perplexity"] is None and model["valid_perplexity"] > 1
    assert "Interrupted" in Path("runs/x/report.md").read_text() and "stopped at epoch" in output
    before = log("x", "qrnn")
    process = run_script(*arguments, "--resume")
    wait_for_lines(Path("runs/x/qrnn/metrics.jsonl"), len(before) + 2, process)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert log("x", "qrnn")[: len(before)] == before


def test_a_second_interruption_stops_at_once_without_a_traceback():
    process = run_script(*STREAM, "--name", "x", "--epochs", "200")
    wait_for_lines(Path("runs/x/qrnn/metrics.jsonl"), 3, process)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in errors, errors


def test_an_interruption_inside_a_compiled_import_is_one_too(capsys):
    def importing() -> int:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    assert exit_code(importing) == 130
    assert capsys.readouterr().err == "error: stopped at once; --resume goes on\n"
    with pytest.raises(ImportError):
        exit_code(lambda: importlib.import_module("no_such_module"))


@pytest.mark.parametrize("script", ((SCRIPT,), ("-m", "examples.sentiment"), ("-m", "examples.translation")))
def test_an_interruption_of_the_imports_has_no_traceback(folder, script):
    (folder / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(SCRIPT).parent}"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, *script], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


def test_finished_models_are_not_trained_again():
    assert main([*TINY, "--name", "x", "--seed", "3"]) == 0
    before, report = snapshot(Path("runs/x/qrnn")), results("x")["models"]
    assert main([*TINY, "--name", "x", "--seed", "3", "--resume"]) == 0
    assert snapshot(Path("runs/x/qrnn")) == before and results("x")["models"] == report


def refused(capsys: pytest.CaptureFixture, arguments: list[str], code: int = 2, main=main, flag="--generate") -> str:
    """The one line on stderr with which the command is refused."""
    capsys.readouterr()
    arguments = [flag if word == "--generate" else word for word in arguments]
    assert main(arguments) == code
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in printed.err, printed.err
    return lines[0]


def test_an_existing_run_is_not_overwritten(capsys):
    assert main([*TINY, "--name", "x", "--models", "qrnn"]) == 0
    before = snapshot(Path("runs"))
    line = refused(capsys, [*TINY, "--name", "x", "--models", "qrnn"])
    assert "--resume" in line and "--name" in line
    assert snapshot(Path("runs")) == before


def test_a_run_names_all_commits_that_trained_it(monkeypatch):
    arguments = [*TINY, "--name", "x", "--models", "qrnn"]

    def start(commit: str, dirty: bool, *flags: str) -> list[tuple[str, bool]]:
        real = comparison.provenance
        with monkeypatch.context() as patch:
            patch.setattr(comparison, "provenance", lambda **_: real(**_) | {"commit": commit, "dirty": dirty})
            assert main([*arguments, *flags]) == 0
        return [(start["commit"], start["dirty"]) for start in (*results("x")["earlier_starts"], results("x"))]

    assert start("first", True) == [("first", True)]
    Path("runs/x/qrnn/result.json").unlink()  # as if it had been killed before the end
    assert start("second", False, "--resume") == [("first", True), ("second", False)]
    assert "commit first with changes, second\n" in Path("runs/x/report.md").read_text()
    assert start("third", False, "--resume") == [("first", True), ("second", False)]  # trained nothing


def test_a_folder_in_which_another_process_trains_is_refused(capsys):
    arguments = [*TINY, "--name", "x", "--models", "qrnn"]
    assert main(arguments) == 0
    before = snapshot(Path("runs/x/qrnn"))
    with RunFolder(Path("runs/x")).locked():
        assert "runs/x is being trained by another process" in refused(capsys, [*arguments, "--resume"])
    assert snapshot(Path("runs/x/qrnn")) == before
    assert main([*arguments, "--resume"]) == 0


def test_resuming_with_other_settings_names_them(capsys, folder):
    assert main([*TINY, "--name", "x", "--models", "qrnn"]) == 0
    before = snapshot(Path("runs"))
    line = refused(capsys, [*TINY, "--name", "x", "--models", "qrnn", "--resume", "--lr", "0.5", "--hidden", "13"])
    assert "lr 0.004 became 0.5" in line and "hidden 12 became 13" in line and "epochs" not in line
    (folder / "text" / "train.txt").write_text("a b c d e f g h .\n" * 20)
    assert "sha256_of_words" in refused(capsys, [*TINY, "--name", "x", "--models", "qrnn", "--resume"])
    assert snapshot(Path("runs")) == before


def test_full_disk_is_one_line_and_the_run_goes_on_later(capsys, monkeypatch):
    arguments = [*TINY, "--name", "x", "--models", "qrnn"]
    fsync, count = os.fsync, iter(range(10**6))

    def full(descriptor: int) -> None:
        if next(count) >= 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: runs/x/qrnn/last.tmp") and "--resume" in line
    assert main([*arguments, "--resume"]) == 0


def test_a_run_has_its_corpus_in_its_name_and_no_infinity_in_its_results():
    assert main([*TINY, "--models", "lstm", "--epochs", "1", "--lr", "1e4", "--no-test"]) == 0
    json.loads(Path("runs/demo-text-0/results.json").read_text(), parse_constant=pytest.fail)


def test_what_is_left_after_a_resume_adds_up(capsys, monkeypatch):
    arguments = [*STREAM, "--name", "x", "--epochs", "4"]
    monkeypatch.setattr(comparison, "seconds_per_item", lambda *_: 1.0)
    monkeypatch.setattr(comparison, "evaluation_seconds", lambda *_: 0.0)

    def minutes(*flags: str) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(comparison, "train_model", lambda *_: pytest.fail("announced"))
            with pytest.raises(pytest.fail.Exception):
                main([*arguments, *flags])
        found = re.findall(r"about (?:(\d+) h )?(\d+) min\b", capsys.readouterr().out)
        return [60 * int(hours or 0) + int(minutes) for hours, minutes in found]

    qrnn, lstm, whole = minutes()
    assert qrnn == lstm and qrnn + lstm == whole
    Path("runs/x/qrnn").mkdir()
    steps = len(LanguageModelling(parse(arguments, PRESETS)).train)
    Path("runs/x/qrnn/metrics.jsonl").write_text(json.dumps({"step": 3 * steps}) + "\n")  # three epochs of four
    left, lstm, total = minutes("--resume")
    assert left == pytest.approx(qrnn / 4, abs=1) and left + lstm == total


def test_diverging_training_is_one_line(capsys):
    arguments = [*TINY, "--name", "x", "--optimizer", "sgd", "--schedule", "constant", "--clip", "None", "--lr", "1e30"]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: stopped at step \d+, epoch 1: ", line) and "--lr" in line


# --- generating ------------------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt_with_each_model(capsys):
    assert main([*TINY, "--name", "x"]) == 0
    word = sample_sentences(1, seed=1)[0][0]
    before = snapshot(Path("runs"))
    capsys.readouterr()
    assert main(["--name", "x", "--generate", f"{word.upper()} xyzzy"]) == 0
    printed = capsys.readouterr()
    assert "xyzzy" in printed.err and "<unk>" in printed.err
    assert printed.out.count(f"{word.lower()} xyzzy ") == 2
    assert "qrnn (epoch" in printed.out and "lstm (epoch" in printed.out
    assert snapshot(Path("runs")) == before


def test_generate_believes_only_what_is_of_the_run(capsys):
    for name, seed in (("x", "0"), ("y", "1")):
        assert main([*TINY, "--name", name, "--seed", seed, "--models", "qrnn", "--epochs", "1"]) == 0
    generate = ["--name", "x", "--generate", "anna"]
    vocabulary = Path("runs/x/vocabulary.json")
    good = vocabulary.read_text()
    vocabulary.write_text(good.replace("anna", "emma"))
    assert "vocabulary.json" in refused(capsys, generate)
    vocabulary.write_text(good)
    for path in Path("runs/x/qrnn").glob("best-*"):
        shutil.rmtree(path)
        shutil.copytree(Path("runs/y/qrnn", path.name), path)
    capsys.readouterr()
    assert main(generate) == 2 and "runs/x/qrnn" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("runs/x/qrnn").glob("damaged-*"))  # it only reads
    assert "experiment" in refused(capsys, generate, main=translation.main, flag="--translate")


def test_a_config_that_was_deleted_or_changed_is_not_gone_on_with(capsys):
    arguments = [*TINY, "--name", "x", "--models", "qrnn", "--epochs", "1"]
    assert main(arguments) == 0
    path = Path("runs/x/config.json")
    text = path.read_text()
    for content in (None, "", text[: len(text) // 2], "[]", text.replace("0.004", "0.5"), '{"a": 1}'):
        path.unlink() if content is None else path.write_text(content)
        before = snapshot(Path("runs"))
        assert "runs/x" in refused(capsys, [*arguments, "--resume", "--lr", "0.5"])
        assert "runs/x" in refused(capsys, ["--name", "x", "--generate", "anna"])
        assert snapshot(Path("runs")) == before
        path.write_text(text)
    assert main([*arguments, "--resume"]) == 0


def test_two_runs_started_under_one_name_do_not_mix(capsys, monkeypatch):
    arguments = [*TINY, "--models", "qrnn", "--epochs", "1", "--name", "x"]
    real = RunFolder.locked

    @contextlib.contextmanager
    def first_the_other(folder: RunFolder):
        monkeypatch.setattr(RunFolder, "locked", real)
        assert main([*arguments, "--seed", "1"]) == 0
        with real(folder):
            yield

    monkeypatch.setattr(RunFolder, "locked", first_the_other)
    assert main(arguments) == 2
    assert "runs/x" in capsys.readouterr().err and results("x")["seed"] == 1
    assert main(["--name", "x", "--generate", "anna"]) == 0


@pytest.mark.parametrize("kind", ("runs is a file", "runs/x is a file", "no permission", "a long name", "a link"))
def test_a_folder_that_cannot_be_is_one_line(capsys, monkeypatch, kind):
    name = 300 * "x" if kind == "a long name" else "x"
    Path("elsewhere").mkdir()
    if kind == "runs is a file":
        Path("runs").write_text("")
    elif kind != "a long name":
        Path("runs").mkdir()
    if kind == "runs/x is a file":
        Path("runs/x").write_text("")
    elif kind == "a link":
        Path("runs/x").symlink_to(Path("elsewhere").resolve())
    elif kind == "no permission":  # root would have it

        def refuse(path, *_, **__) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(os, "mkdir", refuse)
    assert f"runs/{name}" in refused(capsys, [*TINY, "--name", name])
    assert not list(Path("elsewhere").iterdir())


def test_the_folder_may_vanish_while_it_trains(capsys, monkeypatch):
    real = Trainer._end_epoch

    def vanish(trainer: Trainer, *arguments) -> None:
        shutil.rmtree("runs/x")
        real(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_end_epoch", vanish)
    assert main([*TINY, "--name", "x", "--models", "qrnn"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: runs/x/qrnn")


def test_generate_without_a_run(capsys):
    assert "runs/nothing holds no run" in refused(capsys, ["--name", "nothing", "--generate", "the"])
    Path("runs/empty").mkdir(parents=True)
    assert "runs/empty holds no run" in refused(capsys, ["--name", "empty", "--generate", "the"])


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", (TINY, STREAM), ids=("sentence", "stream"))
def test_two_processes_give_the_result_of_one(arguments):
    plain = [*arguments, "--zoneout", "0", "--dropout", "0", "--models", "qrnn"]
    plain[plain.index("--batch-size") + 1] = "7"  # the processes' shares differ
    process = run_script(*plain, "--name", "two", processes=2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("The report is") == 1
    assert main([*plain, "--name", "one"]) == 0
    one, two = results("one")["models"][0], results("two")["models"][0]
    for key in ("valid_perplexity", "test_perplexity"):
        assert two[key] == pytest.approx(one[key], rel=0.001)
    assert [line["step"] for line in log("two", "qrnn")] == [line["step"] for line in log("one", "qrnn")]


@pytest.mark.parametrize("case", ("data", "folder", "flag"))
def test_two_processes_fail_in_one_line(case):
    flags = {"data": ["--data", "nowhere"], "folder": [], "flag": ["--lr", "-1"]}[case]
    if case == "folder":
        assert main([*TINY, "--models", "qrnn", "--epochs", "1", "--name", "x"]) == 0
        flags = ["--epochs", "1", "--models", "qrnn", "--name", "x", "--resume"]  # of one process
    process = run_script(*TINY, *flags, processes=2)
    _, errors = process.communicate(timeout=300)
    words = {"data": "nowhere", "folder": "processes", "flag": "--lr"}[case]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line and "[rank" not in errors and "exitcode  : 2" in errors
    own = errors.partition("Traceback")[0].splitlines()  # what the launcher says comes after
    assert [other for other in own if not re.match(r"[WE]\d{4} ", other)] == [line]


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--models", "qrnn", "qrnn"], "different"),
        (["--hidden", "-3"], "hidden"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--kernel-size", "0"], "--kernel-size 0"),
        (["--vocabulary", "2"], "--vocabulary 2"),
        (["--dropout", "1.5"], "--dropout 1.5"),
        (["--zoneout", "nan"], "--zoneout nan"),
        (["--lr", "0"], "--lr 0"),
        (["--name", "../x"], "--name"),
        (["--data", "nowhere"], "nowhere"),
        pytest.param(
            ["--device", "cuda"], "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
        (["--protocol", "stream", "--batch-size", "1000000"], "1000000"),
    ),
)
def test_wrong_arguments_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, [*TINY, *arguments])
    assert not Path("runs").exists()


def test_wrong_text_is_one_line(capsys, folder):
    train, valid = folder / "text" / "train.txt", folder / "text" / "valid.txt"
    good = train.read_bytes()
    train.write_bytes(b"caf\xe9 au lait\n")
    assert "UTF-8" in refused(capsys, TINY)
    train.write_bytes(b"")
    assert "empty" in refused(capsys, TINY)
    train.write_bytes(good)
    valid.unlink()
    assert "valid" in refused(capsys, TINY)
    assert not Path("runs").exists()


def test_damaged_config_and_checkpoints_are_one_line(capsys):
    assert main([*TINY, "--name", "x", "--models", "qrnn"]) == 0
    for path in Path("runs/x/qrnn").glob("best-*/state.pt"):
        path.write_bytes(b"no checkpoint")
    with contextlib.suppress(FileNotFoundError):
        Path("runs/x/qrnn/result.json").unlink()
    capsys.readouterr()
    assert main([*TINY, "--name", "x", "--models", "qrnn", "--resume"]) == 2
    assert "every best checkpoint is damaged" in capsys.readouterr().err.splitlines()[-1]
    Path("runs/x/config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, [*TINY, "--name", "x", "--resume"])


def test_help_says_what_everything_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], PRESETS)
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in ("--preset", "--resume", "--generate", "--no-match", "--protocol", "--checkpoint-minutes"):
        assert flag in printed
