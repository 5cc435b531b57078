"""Command lines as their users meet them: terminals, pipes, locales, wrong flags and values."""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.sentiment import config as sentiment
from examples.translation import config as translation
from lab import command_line, presets, settings
from lab.command_line import exit_code, parse
from lab.corpora import CorpusError
from lab.parser import Parser
from lab.report import fenced
from lab.run import check_sizes
from lab.settings import InputError
from lab.training import TrainingError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {"lm": presets.PRESETS, "sentiment": sentiment.PRESETS, "translation": translation.PRESETS}
every_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS)
# a command that is quick to start and prints what no small encoding has
COMMAND = """
import sys
from lab.command_line import exit_code, parse
from lab.presets import PRESETS
def command():
    config = parse(sys.argv[1:], PRESETS)
    for number in range(config.epochs):
        print(f"line {number}: caf\\N{LATIN SMALL LETTER E WITH ACUTE} \\u732b \\udce9")
        print(f"note {number}: caf\\N{LATIN SMALL LETTER E WITH ACUTE} \\u732b \\udce9", file=sys.stderr)
    return 0
sys.exit(exit_code(command))
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"} | variables


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a shell line in which `$RUN` is the command."""
    (folder / "command.py").write_text(COMMAND, encoding="utf-8")
    variables["RUN"] = f"{sys.executable} {folder / 'command.py'}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        cwd=folder,
        env=environment(**variables),
        timeout=120,
    )


# --- wrong flags -----------------------------------------------------------------------------------------------------


@every_experiment
@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--hiden", "3"], "--hidden"),  # what was meant
        (["--preset", "huge"], "huge"),
        (["--corpus", "latin"], "latin"),
        (["--models", "gru"], "gru"),
        (["--hidden", "many"], "many"),
        (["--device", "tpu"], "tpu"),
        (["--data", ""], "['']"),
        (["--data="], "['']"),
        (["--hidden", "3", "--lr", "0.1", "--ltr", "3"], "--lr FLOAT"),
        (["--hidden"], "--hidden"),
        (["--preset"], "--preset"),
    ),
)
def test_wrong_flags_are_told_in_one_line(capsys, experiment, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments, EXPERIMENTS[experiment])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and words in line and line.endswith("--help")


@pytest.mark.parametrize("variables", ({}, {"NO_COLOR": "1"}, {"COLUMNS": "30"}, {"PYTHONIOENCODING": "latin-1"}))
def test_on_a_terminal_a_wrong_flag_is_the_same_line(tmp_path, variables):
    """A pseudo-terminal, because tyro draws another error on one than in a pipe."""
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "command.py", "--hiden", "3"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(**variables),
    )
    os.close(terminal)
    printed = b""
    try:
        while piece := os.read(main, 4096):
            printed += piece
    except OSError as error:  # Linux's way to say that the other end is closed
        assert error.errno == errno.EIO
    os.close(main)
    assert process.wait(timeout=60) == 2
    (line,) = printed.decode().splitlines()
    assert line == "error: Unrecognized options: --hiden, 3; see --hidden INT in --help"


def test_scripts_with_few_flags_say_it_in_one_line(capsys):
    parser = Parser("Do something.")
    parser.add_argument("--data")
    for arguments in (["--dat", "x"], ["more"], ["--data"]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert arguments[0] in line


# --- values ----------------------------------------------------------------------------------------------------------

HUGE = 10**20
NUMBERS = {  # flag -> values that are out of range, whatever the experiment
    "seed": (-1, 2**63, 2**64, 2**65),
    "epochs": (0, -1, HUGE),
    "hidden": (0, HUGE),
    "embedding": (0, HUGE),
    "layers": (0, HUGE),
    "kernel_size": (0, HUGE),
    "batch_size": (0, HUGE),
    "lr": (0.0, -1.0, float("inf"), float("nan")),
    "lr_decay": (0.0, 1.5, float("inf"), float("nan")),
    "lr_decay_after": (-1,),
    "weight_decay": (-1.0, float("inf"), float("nan")),
    "clip": (0.0, float("inf"), float("nan")),
    "warmup": (-0.1, 1.1, float("nan")),
    "dropout": (-0.1, 1.1, float("inf"), float("nan")),
    "zoneout": (-0.1, 1.1, float("inf"), float("nan")),
    "forget_bias": (float("inf"), 1e9, float("nan")),
    "checkpoint_minutes": (-1.0, float("inf"), float("nan")),
}
OF_ONE = {
    "lm": {
        "bptt": (0, HUGE),
        "vocabulary": (0, 2),
        "first_kernel_size": (0, HUGE),
        "dropout_embedding": (1.5,),
        "dropout_output": (1.5,),
    },
    "sentiment": {"fold": (-1, 10), "vocabulary": (0, 2)},
    "translation": {
        "beam_size": (0, HUGE),
        "length_penalty": (-1.0, 1000.0, float("inf"), float("nan")),
        "first_kernel_size": (0, HUGE),
        "max_length": (0, HUGE),
    },
}


@every_experiment
def test_every_number_has_a_range_and_is_checked_before_any_work(experiment):
    (config, *_), wrong = EXPERIMENTS[experiment].values(), NUMBERS | OF_ONE[experiment]
    numbers = {name for name, value in vars(config).items() if type(value) in (int, float)}
    assert numbers <= wrong.keys()
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {re.escape(str(value))}: "):
                replace(config, **{name: value}).check()


@every_experiment
def test_presets_and_the_limits_of_the_ranges_are_accepted(experiment):
    for config in EXPERIMENTS[experiment].values():
        replace(config, seed=2**63 - 1, dropout=1.0, zoneout=0.0, warmup=1.0, clip=None).check()
    torch.manual_seed(2**63 - 1 + 64)  # the last process's


def test_data_for_generated_strings_is_refused():
    with pytest.raises(InputError, match="--data text"):
        parse(["--demo", "--data", "text"], translation.PRESETS)


@pytest.mark.parametrize(("experiment", "flag"), (("lm", "--generate"), ("translation", "--translate")))
def test_a_prompt_that_is_no_text_is_refused(experiment, flag):
    with pytest.raises(InputError, match=flag):
        parse([flag, os.fsdecode(b"caf\xe9")], EXPERIMENTS[experiment])
    assert "caf\xe9" in vars(parse([flag, "caf\xe9"], EXPERIMENTS[experiment])).values()


@every_experiment
def test_none_is_read_in_small_letters_too_and_demo_is_short(experiment):
    presets = EXPERIMENTS[experiment]
    for word in ("none", "None", "NONE"):
        config = parse(["--clip", word, "--data", word, "--amp", word, "--name", word], presets)
        assert (config.clip, config.data, config.amp, config.name) == (None, None, None, None)
    assert parse(["--demo"], presets) == parse(["--preset", "demo"], presets) == presets["demo"]
    assert parse([], presets) == next(iter(presets.values()))


@pytest.mark.parametrize("name", ("qrnn", "lstm"))
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(monkeypatch, name):
    from experiment import build_model

    class Task:
        config = replace(presets.PRESETS["demo"], models=(name,))

        def build(self, name):
            return build_model(self.config, name, 100)

    task, cpu = Task(), torch.device("cpu")
    check_sizes(task, cpu)
    monkeypatch.setattr(settings, "memory_bytes", lambda device: 10**6)
    with pytest.raises(InputError, match=f"{name} .*--hidden 192"):
        check_sizes(task, cpu)
    monkeypatch.undo()
    for size in ({"hidden": 10**6, "embedding": 10**6}, {"hidden": 10**6, "layers": 256, "kernel_size": 1000}):
        task.config = replace(task.config, **size)
        with pytest.raises(InputError, match="--hidden 1000000"):
            check_sizes(task, cpu)


# --- what goes wrong later -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    (
        (InputError("--lr 0"), 2, "--lr 0"),
        (CorpusError("x: empty"), 2, "x: empty"),
        (CorpusError("a folder\nof two lines: empty"), 2, "a folder of two lines: empty"),
        (TrainingError("loss nan"), 1, "loss nan"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "runs/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 1, "runs/x: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (OSError("two\nlines"), 1, "two"),
        (OSError(), 1, "OSError"),
        (MemoryError(), 1, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "memory"),
        (KeyboardInterrupt(), 130, "--resume"),
    ),
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, words):
    def command() -> int:
        raise error

    assert exit_code(command) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_how_to_go_on_is_said_in_the_words_of_the_caller(capsys):
    def command() -> int:
        raise KeyboardInterrupt

    assert exit_code(command, "the same command goes on") == 130
    assert capsys.readouterr().err == "error: stopped at once; the same command goes on\n"


def test_mistakes_of_the_program_keep_their_traceback():
    def command() -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code(command)


def test_what_all_processes_find_is_said_by_the_first(capsys, monkeypatch):
    def command() -> int:
        raise error

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(command_line, "PATIENCE", 0)
    error = InputError("--lr 0")
    assert exit_code(command) == 2 and capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        parse(["--hiden", "3"], presets.PRESETS)
    assert capsys.readouterr().err == ""


# --- terminals, pipes, locales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    (
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},  # Windows
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ),
)
def test_what_a_locale_cannot_show_is_escaped(tmp_path, variables):
    done = shell("$RUN --epochs 1", tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        assert stream.count(b"\n") == 1 and rb"\u732b \udce9" in stream


@pytest.mark.parametrize(
    ("line", "code", "printed"),
    (
        ("$RUN --epochs 20000 | head -1", 0, b"line 0"),
        ("$RUN --help | head -1", 0, b"usage"),
        ("$RUN --epochs 20000 2>&1 >/dev/null | head -1", 0, b"note 0"),
        ("$RUN --epochs 2 2>/dev/full", 0, b"line 1"),
        ("$RUN --epochs 2 2>&-", 0, b"line 1"),
        ("$RUN --epochs 2 2>&- >&-", 0, b""),
        ("$RUN --epochs 2 2>&1 >/dev/full", 1, b"error: stdout: No space left"),
    ),
)
def test_output_that_nobody_takes_ends_no_run(tmp_path, line, code, printed):
    done = shell(line, tmp_path)
    assert done.returncode == code and printed in done.stdout, done
    assert b"Traceback" not in done.stdout + done.stderr and b"Exception" not in done.stdout + done.stderr


def test_progress_can_be_followed_in_a_file():
    code = "import os; from lab.terminal import make_patient; make_patient(); print('epoch 1'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "epoch 1\n"  # not kept back for the end, which this process does not reach


@every_experiment
def test_help_fits_80_columns(capsys, monkeypatch, experiment):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], EXPERIMENTS[experiment])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and max(map(len, lines)) <= 80
    assert any("--checkpoint-minutes" in line for line in lines)


def test_a_block_of_text_cannot_be_closed_from_inside():
    assert fenced(["a ``` b", "c"]) == ["````text", "a ``` b", "c", "````"]
    assert fenced(["a ` b"]) == ["```text", "a ` b", "```"]
