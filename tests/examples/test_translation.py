"""The translation example: reading pairs, batches, both models, the scores, and the experiment end to end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from examples.translation import __main__ as translation
from examples.translation import attention
from examples.translation.__main__ import Translating, main, scores, translate
from examples.translation.config import PRESETS
from examples.translation.data import (
    BOS,
    EOS,
    PAD,
    UNK,
    UNKNOWN,
    Pair,
    PairBatches,
    Vocabulary,
    drop_long,
    read_parallel,
    reversed_strings,
)
from examples.translation.lstm_seq2seq import LSTMSeq2Seq
from examples.translation.model import build_model, build_qrnn, next_character_loss, recurrent_part
from lab.batches import IGNORE
from lab.command_line import parse
from lab.corpora import CorpusError
from lab.run import count_parameters

ROOT = Path(__file__).parents[2]
TINY = ["--preset", "demo", "--corpus", "files", "--data", "text", "--source", "aa", "--target", "bb", "--epochs", "2"]
TINY += [
    "--embedding",
    "4",
    "--hidden",
    "8",
    "--layers",
    "2",
    "--batch-size",
    "16",
    "--device",
    "cpu",
    "--beam-size",
    "2",
]
NUMBERS = {"train": (0, 80), "val": (80, 90), "test_2016_flickr": (90, 102)}

both_models = pytest.mark.parametrize("name", ("qrnn", "lstm", "lstm --bidirectional"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, but for a small parallel text."""
    pairs = reversed_strings(seed=1).train
    (tmp_path / "text").mkdir()
    for split, (first, end) in NUMBERS.items():
        for side, language in enumerate(("aa", "bb")):
            lines = "".join(f"{pair[side]}\n" for pair in pairs[first:end])
            (tmp_path / "text" / f"{split}.{language}").write_text(lines)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on more
    yield tmp_path
    torch.set_num_threads(before)


def results(run: str) -> dict:
    return json.loads(Path("runs", run, "results.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_pairs_of_all_splits_are_read_in_order(folder):
    text = read_parallel(folder / "text", "aa", "bb")
    pairs = reversed_strings(seed=1).train
    assert [text.train, text.valid, text.test] == [pairs[first:end] for first, end in NUMBERS.values()]
    assert text.name == "text aa-bb" and text.origin == "folder text"
    turned = read_parallel(folder / "text", "bb", "aa")
    assert turned.train == [Pair(pair.target, pair.source) for pair in text.train]


@pytest.mark.parametrize("ending", ("\n", "\r\n"))
def test_only_line_feeds_end_a_line(folder, ending):
    strange = "a\u2028b\x0cc"  # `str.splitlines` would make three lines of it
    for language in ("aa", "bb"):
        content = "\ufeff" + "".join(f" {line}\t{ending}" for line in (strange, "d"))
        (folder / "text" / f"train.{language}").write_bytes(content.encode())
    assert read_parallel(folder / "text", "aa", "bb").train == [Pair(strange, strange), Pair("d", "d")]


def test_what_is_wrong_with_the_files_is_said(folder):
    def refused(words: str) -> None:
        with pytest.raises(CorpusError, match=words) as caught:
            read_parallel(folder / "text", "aa", "bb")
        assert "\n" not in str(caught.value)

    train, valid = folder / "text" / "train.aa", folder / "text" / "val.bb"
    lines = train.read_text().splitlines()
    train.write_text("\n".join(lines[:-1]) + "\n")
    refused(r"train.aa has 79 lines, train.bb 80")
    train.write_text("\n".join([*lines[:6], " ", *lines[7:]]) + "\n")
    refused(r"train.aa: line 7 is empty")
    train.write_bytes(b"caf\xe9\n")
    refused(r"train.aa: not UTF-8 at byte 3")
    train.unlink()
    refused(r"no train split there; looked for train.aa$")
    train.write_text("\n".join(lines))
    valid.unlink()
    refused(r"val.bb: cannot be read \(No such file or directory\)")
    with pytest.raises(CorpusError, match="nowhere: no such folder"):
        read_parallel(folder / "nowhere", "aa", "bb")


def test_generated_strings_are_reversed_mapped_and_different():
    text = reversed_strings(seed=0)
    pairs = text.train + text.valid + text.test
    assert len({pair.source for pair in pairs}) == len(pairs) == 4_400
    assert all(len(set(pair.source)) == len(pair.source) for pair in pairs)
    mapping = {letter: image for pair in pairs for letter, image in zip(pair.source[::-1], pair.target, strict=True)}
    assert sorted(mapping) == sorted(mapping.values()) == list("abcdefgh")
    assert all(pair.target == "".join(mapping[letter] for letter in reversed(pair.source)) for pair in pairs)
    assert reversed_strings(seed=0) == text != reversed_strings(seed=1)


def test_long_pairs_are_dropped_on_either_side():
    short, long = Pair("abc", "ab"), Pair("ab", "abcd")
    assert drop_long([short, long, Pair(*long[::-1])], 3) == [short]


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_rare_characters_are_unknown():
    vocabulary = Vocabulary.of([Pair("aaé", "bbx"), Pair("a", "b")], at_least=3)
    assert vocabulary.characters == "ab" and len(vocabulary) == 6
    ids = vocabulary.encode("abx")
    assert ids == [UNK + 1, UNK + 2, UNK] and vocabulary.decode(ids) == f"ab{UNKNOWN}"


# --- batches ---------------------------------------------------------------------------------------------------------


def make_task(*flags: str) -> Translating:
    return Translating(parse([*TINY, *flags], PRESETS))


def test_every_pair_comes_once_an_epoch_with_its_mask():
    task = make_task()
    epochs = []
    for n in range(2):
        seen = []
        for batch in task.train.epoch(n):
            assert batch.source.shape == (len(batch.source_lengths), batch.source_lengths.max())
            for source, length, inputs, targets in zip(*batch, strict=True):
                count = int((targets != IGNORE).sum())
                assert (source[length:] == PAD).all() and (source[:length] > UNK).all()
                assert inputs[0] == BOS and targets[count - 1] == EOS
                assert (inputs[1:count] == targets[: count - 1]).all()
                assert (targets[count:] == IGNORE).all() and (inputs[count + 1 :] == PAD).all()
                decode = task.vocabulary.decode
                seen.append(Pair(decode(source[:length].flip(0)), decode(targets[: count - 1])))
        epochs.append(seen)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.text.train)
    assert epochs[0] != epochs[1]
    assert task.train.tokens == sum(len(pair.target) + 1 for pair in task.text.train)


def test_batches_are_the_same_in_the_same_epoch_and_of_similar_length():
    task = make_task()
    for one, other in zip(task.train.epoch(3), task.train.epoch(3), strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(one, other, strict=True))
    assert 0 < task.train.padding < 0.15
    assert len(task.train) == len(list(task.train.epoch(0))) == 5
    lengths = [int(batch.source_lengths.sum()) for batch in task.valid.epoch(0)]
    assert lengths == sorted(lengths)


def test_no_pairs_are_refused():
    with pytest.raises(CorpusError, match="--max-length"):
        PairBatches([], 4)


def test_the_source_is_read_backwards_unless_told_otherwise():
    task, forwards = make_task(), make_task("--no-reverse")
    for (one, _), (other, _) in zip(task.valid.pairs, forwards.valid.pairs, strict=True):
        assert torch.equal(one, other.flip(0))


# --- models ----------------------------------------------------------------------------------------------------------


def make_model(name: str, *flags: str) -> tuple[Translating, torch.nn.Module]:
    """In float64, in evaluation mode."""
    name, *more = name.split()
    task = make_task("--layers", "3", *more, *flags)
    return task, task.build(name).double().eval()


@both_models
def test_padding_changes_nothing(name):
    task, model = make_model(name)
    (batch,) = PairBatches(task.train.pairs[:9], 9).epoch(0)
    assert len(set(batch.source_lengths.tolist())) > 2
    logits = model(batch.source, batch.source_lengths, batch.inputs)
    for row, (source, length, inputs, targets) in enumerate(zip(*batch, strict=True)):
        count = int((targets != IGNORE).sum())
        alone = model(source[None, :length], length[None], inputs[None, :count])
        torch.testing.assert_close(logits[row, :count], alone[0], rtol=1e-10, atol=1e-10)


@both_models
def test_parallel_is_step_by_step(name):
    task, model = make_model(name)
    batch = next(iter(task.train.epoch(0)))
    logits = model(batch.source, batch.source_lengths, batch.inputs)
    state = model.start(batch.source, batch.source_lengths)
    for t, tokens in enumerate(batch.inputs.unbind(1)):
        step, state, attention = model.step(tokens, state)
        torch.testing.assert_close(step, logits[:, t], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))
        beyond = torch.arange(batch.source.shape[1]) >= batch.source_lengths[:, None]
        assert (attention[beyond] == 0).all()


@both_models
def test_mixed_precision_is_about_the_same(name):
    task, model = make_model(name)
    (batch,) = PairBatches(task.train.pairs[:9], 9).epoch(0)
    loss, _, _ = task.step(model.float(), batch, None)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _, _ = task.step(model, batch, None)
    rough.backward()
    assert rough.item() == pytest.approx(loss.item(), rel=0.01)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both_models
def test_a_selected_state_goes_on_like_its_sentence(name):
    task, model = make_model(name)
    batch = next(iter(task.train.epoch(0)))
    _, state, _ = model.step(batch.inputs[:, 0], model.start(batch.source, batch.source_lengths))
    index = torch.tensor([3, 3, 0])
    expected, _, _ = model.step(batch.inputs[:, 1], state)
    logits, _, _ = model.step(batch.inputs[index, 1], state.index_select(index))
    torch.testing.assert_close(logits, expected[index])


@both_models
def test_nothing_of_later_targets_is_seen(name):
    task, model = make_model(name)
    batch = next(iter(task.train.epoch(0)))
    other = batch.inputs.clone()
    other[:, -1] = UNK
    one, two = (model(batch.source, batch.source_lengths, inputs) for inputs in (batch.inputs, other))
    assert torch.equal(one[:, :-1], two[:, :-1]) and not torch.equal(one[:, -1], two[:, -1])


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("preset", PRESETS)
def test_widths_are_matched_within_one_per_cent(preset, bidirectional):
    config = replace(PRESETS[preset], bidirectional=bidirectional)
    with torch.device("meta"):
        target = count_parameters(recurrent_part(build_qrnn(config, config.hidden, 100)))
        lstm = build_model(config, "lstm", 100)
    assert count_parameters(recurrent_part(lstm)) == pytest.approx(target, rel=0.01)
    outside = (lstm.source_embedding, lstm.target_embedding, lstm.output)
    assert count_parameters(lstm) == count_parameters(recurrent_part(lstm)) + sum(map(count_parameters, outside))
    config.check()


def test_an_encoder_that_reads_both_ways_starts_the_decoder_from_both_ends():
    torch.manual_seed(0)
    model = LSTMSeq2Seq(9, 9, 4, 6, num_layers=2, bidirectional=True)
    source, lengths = torch.randint(9, (1, 5)), torch.tensor([5])
    state = model.start(source, lengths)
    outputs, (_, c) = model.encoder(model.source_embedding(source))
    torch.testing.assert_close(state.keys, outputs)
    torch.testing.assert_close(state.h[1, 0], torch.cat([outputs[0, -1, :3], outputs[0, 0, 3:]]))  # the last layer's
    torch.testing.assert_close(state.c[0, 0], torch.cat([c[0, 0], c[1, 0]]))  # the first layer's
    with pytest.raises(ValueError, match="hidden_size 7: an even number expected"):
        LSTMSeq2Seq(9, 9, 4, 7, num_layers=2, bidirectional=True)


def test_an_odd_width_for_both_ways_is_refused_before_any_work(capsys):
    assert main([*TINY, "--hidden", "7", "--no-match", "--bidirectional", "--name", "x"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--hidden 7" in line and "--bidirectional" in line and not Path("runs/x").exists()


def test_the_default_is_the_papers_setting():
    config = parse([], PRESETS)
    wanted = {"layers": 4, "hidden": 320, "embedding": 16, "first_kernel_size": 6, "kernel_size": 2, "mode": "fo"}
    wanted |= {"activation": "tanh", "dropout": 0.2, "optimizer": "adam", "lr": 1e-3, "clip": 5.0, "reverse": True}
    wanted |= {"beam_size": 8, "length_penalty": 0.6, "max_length": 300, "causal_encoder": False}
    assert {name: getattr(config, name) for name in wanted} == wanted


# --- translating and scoring -----------------------------------------------------------------------------------------


@both_models
def test_translations_do_not_depend_on_what_is_translated_beside_them(name, monkeypatch):
    monkeypatch.setattr(translation, "SEARCH_ROWS", 4)
    task, model = make_model(name)
    sources = [source for source, _ in task.test.pairs]
    together = translate(task.config, model, sources)
    for source, found in zip(sources, together, strict=True):
        assert found.attention.shape == (len(found.tokens) + 1, len(source))
        length = 2 * max(len(other) for other in sources) + 10
        if len(found.tokens) < length:
            (alone,) = translate(task.config, model, [source])
            assert alone.score >= found.score - 1e-9 or len(alone.tokens) < len(found.tokens)


def test_scores_are_sacrebleus_with_their_signatures():
    translations = ["the cat sat on the mat .", "a man is riding a horse", "two dogs run"]
    references = ["the cat is on the mat .", "a man is riding a horse", "two dogs are running"]
    found = scores(translations, references)
    assert found["bleu"] == BLEU().corpus_score(translations, [references]).score
    assert found["chrf"] == CHRF().corpus_score(translations, [references]).score
    assert 30 < found["bleu"] < found["chrf"] < 90
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert found["exact_match"] == pytest.approx(1 / 3)
    sums = [sum(column) for column in zip(*(map(int, line.split()) for line in found["bleu_counts"]), strict=True)]
    whole = BLEU().corpus_score(translations, [references])
    assert sums == [*whole.counts, *whole.totals, whole.sys_len, whole.ref_len]


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_the_demo_is_solved_by_both_models_which_then_translate(capsys):
    started = time.process_time()
    assert main(["--demo"]) == 0
    assert time.process_time() - started < 100
    assert "exact match" in capsys.readouterr().out
    models, before = results("translation-demo-reversed-0")["models"], snapshot(Path("runs"))
    for model in models:
        assert model["exact_match"] >= 0.99, model["model"]
    sample = models[0]["samples"][0]
    assert main(["--demo", "--translate", sample["source"]]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" (epoch")[0] for line in printed[::3]] == ["qrnn", "lstm"]
    assert printed[1::3] == [sample["reference"]] * 2
    assert snapshot(Path("runs")) == before


def test_the_report_shows_scores_translations_and_attention(capsys):
    assert main([*TINY, "--name", "x"]) == 0
    report, found = Path("runs/x/report.md").read_text(), results("x")
    pairs = read_parallel(Path("text"), "aa", "bb")
    assert found["corpus"]["valid_pairs"] == len(pairs.valid)
    for model in found["models"]:
        assert model["bleu_signature"] in report and model["chrf_signature"] in report
        assert f"{model['test_perplexity']:.3f}" in report and model["search_seconds"] > 0
        assert [sample["source"] for sample in model["samples"]] == [pair.source for pair in pairs.valid[:5]]
        for sample in model["samples"]:
            assert all(line in report for line in sample.values())
        attention = model["attention"]
        rows = [list(map(int, row.split())) for row in attention["per_cent"]]
        assert len(rows) == len(attention["translation"]) + 1
        assert all(len(row) == len(attention["source"]) and 95 <= sum(row) <= 105 for row in rows)
        assert f"![attention](attention-{model['model']}.png)" in report
        assert Path(f"runs/x/attention-{model['model']}.png").read_bytes().startswith(b"\x89PNG")


def test_characters_that_no_font_has_are_shown_by_their_code(monkeypatch):
    """Else Matplotlib warns, which is an error here, and draws boxes."""
    source, written = "ein \u4e2d\u65e5 \N{SLIGHTLY SMILING FACE} \N{CYRILLIC SMALL LETTER ZHE}", "a \u732b"
    weights = [" ".join(["9"] * len(source))] * (len(written) + 1)
    own = [font for font in attention.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(attention.fontManager, "ttflist", own)  # a machine without other fonts
    assert attention.fonts_for({*source, *written})[1] == set("\u4e2d\u65e5\u732b\N{SLIGHTLY SMILING FACE}")
    drawn = attention.draw_attention({"source": source, "translation": written, "per_cent": weights}, backwards=True)
    assert drawn.startswith(b"\x89PNG")


def test_max_length_is_for_training_only():
    task = make_task("--max-length", "5")
    everything = make_task()
    assert 0 < task.fingerprint["dropped_pairs"] == len(everything.train.pairs) - len(task.train.pairs)
    assert len(task.valid.pairs) == 10 and len(task.test.pairs) == 12


def test_interrupted_in_the_search_it_is_not_trained_again(monkeypatch, capsys):
    arguments = [*TINY, "--name", "x", "--models", "qrnn"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(translation, "beam_search", interrupted)
        assert main(arguments) == 130
    before = snapshot(Path("runs/x/qrnn"))
    assert main([*arguments, "--resume"]) == 0
    after = snapshot(Path("runs/x/qrnn"))
    assert {name: after[name] for name in before} == before
    assert "bleu" in results("x")["models"][0]


def test_killed_and_resumed_is_as_never_killed():
    arguments = [*TINY, "--models", "qrnn", "--epochs", "4", "--checkpoint-minutes", "0", "--dropout", "0.2"]
    assert main([*arguments, "--name", "whole"]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.translation", *arguments, "--name", "killed"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = Path("runs/killed/qrnn/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_bytes().splitlines()) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*arguments, "--name", "killed", "--resume"]) == 0
    keys = ("best_epoch", "valid_perplexity", "test_perplexity", "bleu", "samples", "attention")
    (one,), (other,) = results("whole")["models"], results("killed")["models"]
    assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


def test_interrupted_in_training_the_test_split_is_not_read(monkeypatch):
    step, count = next_character_loss, itertools.count()

    def stopping(*arguments):
        if next(count) == 40:  # beyond the steps that estimate the time
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(Translating, "step", staticmethod(stopping))
    assert main([*TINY, "--name", "x", "--models", "qrnn", "--epochs", "20"]) == 130
    (model,) = results("x")["models"]
    assert "bleu" not in model and "test_perplexity" not in model and len(model["samples"]) == 5
    assert "not read" in Path("runs/x/report.md").read_text()


# --- wrong input -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The one line on stderr with which the command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--hidden", "0"], "--hidden 0"),
        (["--beam-size", "0"], "--beam-size 0"),
        (["--length-penalty", "nan"], "--length-penalty nan"),
        (["--beam-size", "100000000000000000000"], "--beam-size 100000000000000000000"),
        (["--length-penalty", "1000"], "--length-penalty 1000"),
        (["--corpus", "reversed"], "--data text"),
        (["--dropout", "1.5"], "--dropout 1.5"),
        (["--max-length", "0"], "--max-length 0"),
        (["--max-length", "2"], "--max-length"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "None"], "--data"),
        (["--source", "cc"], "train.cc"),
        (["--target", "cc"], "train.cc"),
        (["--translate", "abc"], "runs/translation-demo-files-0 holds no run"),
    ),
)
def test_wrong_arguments_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, [*TINY, *arguments])
    assert not Path("runs").exists()


def test_an_empty_sentence_is_not_translated(capsys):
    assert main([*TINY, "--name", "x", "--models", "qrnn", "--epochs", "1"]) == 0
    assert "--translate" in refused(capsys, ["--name", "x", "--translate", ""])


def test_a_run_with_other_text_is_not_resumed(capsys, folder):
    assert main([*TINY, "--name", "x", "--models", "qrnn", "--epochs", "1"]) == 0
    (folder / "text" / "train.bb").write_text("abc\n" * 80)
    assert "sha256_of_lines" in refused(capsys, [*TINY, "--name", "x", "--models", "qrnn", "--epochs", "1", "--resume"])
