"""The engine: what is trained does not depend on interruptions, and nothing that was written is lost."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lab.batches import SentenceBatches, StreamBatches, build_vocabulary, encode
from lab.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_file
from lab.corpora import load_corpus
from lab.language_model import LanguageModel, next_word_loss
from lab.run_folder import ModelFolder
from lab.settings import InputError, Settings
from lab.state import Progress
from lab.synthetic import sample_sentences
from lab.training import OPTIMIZERS, FutureLeakWarning, Trainer, TrainingError, evaluate
from qrnn import QRNN

SETTINGS = Settings(epochs=3, lr=5e-3, device="cpu", clip=1.0)
TEXT = sample_sentences(60, seed=1)
TOKENIZER = build_vocabulary(TEXT, None)
IDS = encode(TOKENIZER, TEXT)
WORDS = TOKENIZER.get_vocab_size()
RUN = 64 * "0"  # the identity of a run


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on more, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopAfter:
    """A `StopSignal` that comes at the given look."""

    def __init__(self, steps: float = math.inf) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def model(kind: str = "qrnn") -> LanguageModel:
    torch.manual_seed(0)
    if kind == "qrnn":
        rnn = QRNN(8, 12, 2, batch_first=True, dropout=0.3, kernel_size=3, zoneout=0.2)
    else:
        rnn = nn.LSTM(8, 12, 2, batch_first=True, dropout=0.3)
    return LanguageModel(rnn, 12, WORDS, 8, dropout_embedding=0.1, dropout_output=0.1)


def batches(protocol: str) -> SentenceBatches | StreamBatches:
    return SentenceBatches(IDS, 8) if protocol == "sentence" else StreamBatches(IDS, 4, 20)


def validate(model: nn.Module) -> float:
    return evaluate(model, next_word_loss, StreamBatches(IDS[:20], 1, 50))


def train(
    folder: Path, *, kind="qrnn", protocol="stream", stop=None, settings=SETTINGS, step=next_word_loss
) -> Trainer:
    trainer = Trainer(model(kind), step, batches(protocol), settings)
    trainer.run(ModelFolder(folder, RUN), validate, stop or StopAfter(), kind)
    return trainer


def log(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl but for the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same(one: Trainer, one_folder: Path, other: Trainer, other_folder: Path) -> None:
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
    assert log(one_folder) == log(other_folder)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("qrnn", "lstm"))
@pytest.mark.parametrize("protocol", ("sentence", "stream"))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_and_resumed_is_bit_for_bit_as_never_stopped(tmp_path, kind, protocol, optimizer):
    settings = replace(SETTINGS, optimizer=optimizer)
    whole = train(tmp_path / "whole", kind=kind, protocol=protocol, settings=settings)
    stops = (3, len(batches(protocol)), 2)  # in an epoch, after its last step, soon again
    for steps in stops:
        train(tmp_path / "parts", kind=kind, protocol=protocol, settings=settings, stop=StopAfter(steps - 1))
    last = train(tmp_path / "parts", kind=kind, protocol=protocol, settings=settings)
    assert_same(whole, tmp_path / "whole", last, tmp_path / "parts")
    assert len([line for line in log(tmp_path / "parts") if "valid_loss" in line]) == settings.epochs


@pytest.mark.parametrize("damage", ("later lines", "cut", "gone", "foreign", "link"))
def test_a_log_is_brought_back_whatever_became_of_it(tmp_path, damage):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    train(folder, stop=StopAfter(5))
    path, elsewhere = folder / "metrics.jsonl", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    if damage == "later lines":  # as a killed process leaves it
        path.write_text(path.read_text() + '{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    elif damage == "cut":
        os.truncate(path, 10)
    elif damage == "foreign":
        path.write_bytes(b"\xff no json" * 1000)
    else:
        path.unlink()
    if damage == "link":
        path.symlink_to(elsewhere)
    assert_same(whole, tmp_path / "whole", train(folder), folder)
    assert elsewhere.read_text() == "mine"


def test_an_epoch_is_a_line(tmp_path, capsys):
    train(tmp_path, stop=StopAfter(len(batches("stream")) + 2))
    first = capsys.readouterr().out.splitlines()
    train(tmp_path)
    second = capsys.readouterr().out.splitlines()
    assert len(first) == 1 and re.fullmatch(r"qrnn epoch 1/3: valid \d\.\d+, \d+ s left", first[0])
    assert [line.partition(":")[0] for line in second] == ["qrnn epoch 2/3", "qrnn epoch 3/3"]
    assert second[-1].endswith(f"valid {log(tmp_path)[-1]['valid_loss']:.4g}")


def test_the_time_left_is_that_of_all_steps_so_far(tmp_path):
    trainer = Trainer(model(), next_word_loss, batches("stream"), SETTINGS)
    trainer._label, trainer._show = "qrnn", float
    trainer.progress = Progress(step=len(batches("stream")), epoch=1, wall_seconds=300.0)  # as after a resume
    assert trainer._epoch_line(2.0) == "qrnn epoch 1/3: valid 2, 10 min left"


def test_interruption_evaluates_without_touching_best_and_log(tmp_path):
    trainer = Trainer(model(), next_word_loss, batches("stream"), SETTINGS)
    outcome = trainer.run(ModelFolder(tmp_path, RUN), validate, StopAfter(4), "qrnn")
    assert outcome.progress.step == 5
    assert outcome.interrupted_loss == validate(trainer.model)
    assert not list(tmp_path.glob("best-*"))
    assert all("valid_loss" not in line for line in log(tmp_path))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", (truncate, flip_bit, Path.unlink))
@pytest.mark.parametrize("file", ("weights.safetensors", "state.pt", "SHA256SUMS"))
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage, file):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    train(folder, stop=StopAfter(3))
    train(folder, stop=StopAfter(3))
    newest = max(folder.glob("last-*"))
    damage(newest / file)
    resumed = train(folder)
    messages = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(messages) == 1 and str(newest) in messages[0] and "checkpoint before" in messages[0]
    assert_same(whole, tmp_path / "whole", resumed, folder)


def forge(path: Path, change) -> None:
    """Change the content of a checkpoint, and make its sums good again."""
    weights = safetensors.torch.load((path / "weights.safetensors").read_bytes())
    state = torch.load(path / "state.pt", weights_only=True)
    state = change(weights, state) or state
    (path / "weights.safetensors").write_bytes(safetensors.torch.save(weights))
    torch.save(state, path / "state.pt")
    names = ("weights.safetensors", "state.pt")
    sums = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(sums))


BAD_CONTENT = {
    "another run": lambda weights, state: state | {"run": "another"},
    "no state": lambda weights, state: [1, 2],
    "no progress": lambda weights, state: {name: value for name, value in state.items() if name != "progress"},
    "a progress of text": lambda weights, state: state | {"progress": state["progress"] | {"best_loss": "x"}},
    "a later epoch": lambda weights, state: state | {"progress": state["progress"] | {"epoch": 99}},
    "no weight": lambda weights, state: weights.popitem() and None,
    "a weight of another shape": lambda weights, state: weights.update(softmax_bias=torch.zeros(1)),
    "a weight that is not finite": lambda weights, state: weights.update(
        softmax_bias=weights["softmax_bias"] * math.nan
    ),
    "moments of another shape": lambda weights, state: (
        state["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)) or state
    ),
    "what was carried of another shape": lambda weights, state: (
        state["ranks"][0].update(carried=((torch.zeros(1, 1, 1), torch.zeros(1)),)) or state
    ),
    "random numbers of nothing": lambda weights, state: (
        state["ranks"][0].update(generators={"cpu": torch.zeros(3, dtype=torch.uint8)}) or state
    ),
    "a log of nothing": lambda weights, state: state | {"log": "{"},
}


@pytest.mark.parametrize("content", BAD_CONTENT)
def test_good_sums_with_bad_content_fall_back_to_the_checkpoint_before(tmp_path, capsys, content):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    train(folder, stop=StopAfter(3))
    train(folder, stop=StopAfter(3))
    newest = max(folder.glob("last-*"))
    forge(newest, lambda weights, state: state)  # by itself that is no damage
    load_checkpoint(folder, "last")
    forge(newest, BAD_CONTENT[content])
    resumed = train(folder)
    assert [line for line in capsys.readouterr().err.splitlines() if str(newest) in line]
    assert (folder / f"damaged-{newest.name}").is_dir()
    assert_same(whole, tmp_path / "whole", resumed, folder)


def test_dropout_is_on_again_after_a_state_that_does_not_fit(tmp_path):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    train(folder, stop=StopAfter(len(batches("stream")) + 2))  # the checkpoint before is of an epoch's end: no state
    forge(max(folder.glob("last-*")), BAD_CONTENT["what was carried of another shape"])
    resumed = train(folder)
    assert resumed.model.training
    assert_same(whole, tmp_path / "whole", resumed, folder)


def test_writing_checkpoints_is_no_training(tmp_path, monkeypatch):
    clock, save = itertools.count(), ModelFolder.save
    late = []

    def slow(self, *arguments):
        late.append(10**6)
        save(self, *arguments)

    monkeypatch.setattr(ModelFolder, "save", slow)
    monkeypatch.setattr("lab.training.time.perf_counter", lambda: next(clock) + sum(late))
    progress = train(tmp_path).progress
    assert progress.seconds < 10**6 < progress.wall_seconds


def test_copies_beside_checkpoints_are_ignored(tmp_path, capsys):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    train(folder, stop=StopAfter(3))
    newest = max(folder.glob("last-*"))
    shutil.copytree(newest, f"{newest}.bak")
    shutil.copytree(newest, folder / "last-old")
    (folder / "best-000004.bak").mkdir()
    resumed = train(folder)
    assert "damaged" not in capsys.readouterr().err
    assert_same(whole, tmp_path / "whole", resumed, folder)
    assert Path(f"{newest}.bak").is_dir() and (folder / "last-old").is_dir()


def test_a_checkpoint_under_the_number_of_another_is_damaged(tmp_path, capsys):
    train(tmp_path)
    best = max(tmp_path.glob("best-*"))
    shutil.copytree(best, tmp_path / "best-000099")
    _, state, lines = load_checkpoint(tmp_path, "best")
    assert state["number"] == int(best.name[-6:]) and "best-000099" in lines[0]


def test_all_damaged_is_one_clear_line(tmp_path):
    train(tmp_path, stop=StopAfter(3))
    for path in tmp_path.glob("last-*"):
        flip_bit(path / "state.pt")
    with pytest.raises(CheckpointError, match=r"^.*every last checkpoint is damaged.*--name$"):
        train(tmp_path)


def test_best_and_last_and_the_ones_before_are_kept(tmp_path):
    trainer = train(tmp_path)
    names = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["best", "best", "last", "last"]
    _, state, _ = load_checkpoint(tmp_path, "best")
    lines = [line for line in log(tmp_path) if "valid_loss" in line]
    best = min(lines, key=lambda line: line["valid_loss"])
    assert (state["epoch"], state["valid_loss"]) == (best["epoch"], best["valid_loss"])
    assert trainer.progress.best_epoch == best["epoch"]


def no_space_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    count, fsync = iter(range(10**6)), os.fsync

    def full(descriptor: int) -> None:
        if next(count) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("write", range(5))  # the three files, the folder of each, and more: any of them may fail
def test_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch, write):
    save_checkpoint(tmp_path, "last", {"w": torch.ones(3)}, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        no_space_at(patch, write)
        save_checkpoint(tmp_path, "last", {"w": torch.zeros(3)}, {"step": 2})
    weights, state, lines = load_checkpoint(tmp_path, "last")
    assert (state["step"], lines) == (1, []) and weights["w"].sum() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last-000001"]


def test_full_disk_in_training_then_resumed(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        no_space_at(patch, 20)
        train(tmp_path / "parts")
    assert_same(whole, tmp_path / "whole", train(tmp_path / "parts"), tmp_path / "parts")


@pytest.mark.parametrize("aside", (True, False))
def test_write_file_follows_no_link(tmp_path, aside):
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "report.md"
    elsewhere.write_text("mine")
    (tmp_path / "report.md.tmp" if aside else path).symlink_to(elsewhere)
    write_file(path, "new")
    assert path.read_text() == "new" and not path.is_symlink() and elsewhere.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


def test_an_error_of_a_write_names_the_file(tmp_path, monkeypatch):
    no_space_at(monkeypatch, 0)
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "report.md", "new")
    assert caught.value.filename == str(tmp_path / "report.md")


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    write_file(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        no_space_at(patch, 0)
        write_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- losses that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_loss_not_finite_stops_and_says_where(tmp_path, value):
    calls = iter(range(1, 10**6))

    def step(model, batch, carried):
        loss, items, carried = next_word_loss(model, batch, carried)
        return (loss * value if model.training and next(calls) == 21 else loss), items, carried

    steps_per_epoch = len(batches("stream"))
    assert steps_per_epoch < 21 < 2 * steps_per_epoch
    with pytest.raises(TrainingError, match=r"step 21, epoch 2.*last good checkpoint is kept"):
        train(tmp_path, step=step)
    weights, state, _ = load_checkpoint(tmp_path, "last")
    assert state["progress"]["epoch"] == 1
    assert all(weight.isfinite().all() for weight in weights.values())


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("qrnn", "lstm"))
def test_perplexity_does_not_depend_on_the_batch_size(kind):
    candidate = model(kind)
    one_by_one = evaluate(candidate, next_word_loss, SentenceBatches(IDS, 1, shuffle=False))
    for rows in (2, 7, 60):
        loss = evaluate(candidate, next_word_loss, SentenceBatches(IDS, rows, shuffle=False))
        assert math.exp(loss) == pytest.approx(math.exp(one_by_one), rel=1e-6)
    whole = evaluate(candidate, next_word_loss, StreamBatches(IDS, 1, 10**6))
    for window in (1, 33, 1000):
        loss = evaluate(candidate, next_word_loss, StreamBatches(IDS, 1, window))
        assert math.exp(loss) == pytest.approx(math.exp(whole), rel=1e-6)
    assert abs(whole - one_by_one) > 1e-4  # state is carried in one and not in the other


def test_perplexity_is_that_of_every_word_counted_once():
    candidate = model().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for sentence in IDS:
            words = torch.cat([torch.tensor([TOKENIZER.token_to_id("<eos>")]), sentence])
            logits, _ = candidate(words[None, :-1])
            total -= float(logits[0].double().log_softmax(-1)[range(len(sentence)), sentence].sum())
            count += len(sentence)
    assert evaluate(candidate, next_word_loss, SentenceBatches(IDS, 5)) == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("training", (True, False))
def test_evaluation_is_in_eval_mode_and_restores(training):
    candidate = model().train(training)
    assert validate(candidate) == validate(candidate)  # no dropout, no zoneout
    assert candidate.training is training


class Peeking(nn.Module):
    """Knows one word too many: each step is also told the input of the next."""

    def __init__(self, inner: LanguageModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words, state=None):
        logits, state = self.inner(words, state)
        return logits + 8 * nn.functional.one_hot(words.roll(-1, dims=1), WORDS), state


def test_a_model_that_sees_the_future_is_caught():
    corpus = load_corpus("synthetic")
    split = SentenceBatches(encode(TOKENIZER, corpus.valid), 16, shuffle=False)
    floor = corpus.floor["valid"]
    with pytest.warns(FutureLeakWarning, match="sees the future"):
        loss = evaluate(Peeking(model()), next_word_loss, split, floor)
    assert math.exp(loss) < floor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.exp(evaluate(model(), next_word_loss, split, floor)) > floor


# --- settings --------------------------------------------------------------------------------------------------------


def test_learning_rates():
    cycle = Settings(epochs=10, lr=2.0, schedule="one-cycle", warmup=0.2)
    rates = [cycle.learning_rate(step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(2.0, rel=0.03) and rates.index(max(rates)) in (19, 20)
    assert rates[0] < 0.1 and rates[-1] < 1e-3 and rates[:20] == sorted(rates[:20])
    decay = Settings(lr=1.0, schedule="decay", lr_decay=0.5, lr_decay_after=6)
    assert [decay.learning_rate(10 * epoch, 10) for epoch in (0, 5, 6, 7)] == [1.0, 1.0, 0.5, 0.25]
    assert Settings(lr=0.3).learning_rate(10**6, 10) == 0.3


@pytest.mark.parametrize(
    "bad", ({"epochs": 0}, {"lr": -1.0}, {"lr": math.nan}, {"clip": 0.0}, {"warmup": 1.5}, {"checkpoint_minutes": -1.0})
)
def test_bad_settings_are_named(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: .* expected$"):
        Settings(**bad).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(InputError, match="--device cuda"):
        Settings(device="cuda").check()


def test_bf16_trains_and_is_evaluated_in_float32(tmp_path):
    trainer = train(tmp_path, settings=replace(SETTINGS, amp="bf16"))
    exact = train(tmp_path / "float32")
    lines = [line for line in log(tmp_path) if "valid_loss" in line]
    assert lines != log(tmp_path / "float32")  # it did train in another precision
    assert lines[-1]["valid_loss"] == pytest.approx(validate(exact.model), rel=0.05)
    with torch.no_grad():
        assert trainer.model(IDS[0][None])[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ("qrnn", "lstm"))
def test_compile_trains_and_keeps_the_names_of_the_weights(tmp_path, kind):
    torch.manual_seed(0)
    rnn = QRNN(8, 12, batch_first=True, method="log") if kind == "qrnn" else nn.LSTM(8, 12, batch_first=True)
    candidate = LanguageModel(rnn, 12, WORDS, 8)
    names = list(candidate.state_dict())
    stream = StreamBatches([torch.cat(IDS)[:160]], 4, 8)  # 5 windows of one shape: one compilation
    trainer = Trainer(candidate, next_word_loss, stream, replace(SETTINGS, compile=True))
    trainer.run(ModelFolder(tmp_path, RUN), lambda model: float(torch.rand(())), StopAfter(), kind)
    assert list(trainer.model.state_dict()) == names
    assert set(load_checkpoint(tmp_path, "best")[0]) == set(names)
    losses = [line["train_loss"] for line in log(tmp_path) if "train_loss" in line]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only there is freed memory kept")
def test_freed_memory_is_kept_and_given_back_before_a_peak_is_measured():
    code = """
import torch
from lab.provenance import keep_freed_memory, peak_memory, reset_peak_memory
cpu = torch.device("cpu")
for kept in (False, True):
    if kept:
        keep_freed_memory()
    torch.ones(2**24)  # 64 MiB
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    reset_peak_memory(cpu)
    print((resident - peak_memory(cpu)) >> 20)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    before, kept = map(int, done.stdout.split())
    assert before < 16 and kept > 48  # MiB that only the reset gave back
