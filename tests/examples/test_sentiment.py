"""The sentiment example, from the reviews to the report."""

from __future__ import annotations

import errno
import json
import signal
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

from examples.sentiment import __main__ as sentiment
from examples.sentiment.__main__ import (
    PRESETS,
    Config,
    Prediction,
    Sentiment,
    accuracy,
    main,
    most_certain,
    predict,
)
from examples.sentiment.data import (
    FLIPPED,
    FOLDS,
    Review,
    ReviewBatches,
    imdb,
    load_reviews,
    read_vectors,
    rt_polarity,
    synthetic,
)
from examples.sentiment.model import build_model
from lab.batches import EOS_ID, build_vocabulary, encode
from lab.checkpoint import load_checkpoint
from lab.command_line import parse
from lab.corpora import CorpusError
from lab.run import count_parameters

TINY = ["--preset", "mr", "--data", "mr", "--embedding", "8", "--hidden", "6", "--layers", "2", "--vocabulary", "None"]
TINY += ["--epochs", "2", "--batch-size", "8", "--device", "cpu", "--name", "x"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, but for a small corpus in the form of rt-polarity."""
    reviews = synthetic(seed=1).train[:120]
    (tmp_path / "mr").mkdir()
    for label, ending in enumerate(("neg", "pos")):
        lines = [f"{' '.join(review.words)} \n" for review in reviews if review.label == label]
        (tmp_path / "mr" / f"rt-polarity.{ending}").write_bytes("".join(lines).encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on more
    yield tmp_path
    torch.set_num_threads(before)


def results(run: str) -> dict:
    return json.loads(Path("runs", run, "results.json").read_text())


# --- reading ---------------------------------------------------------------------------------------------------------


def test_rt_polarity_is_latin_1_and_lines_end_at_newlines_only(folder):
    path = folder / "mr" / "rt-polarity.pos"
    path.write_bytes(path.read_bytes() + b"caf\xe9 no\xebl\x85 au lait \r\n\n")
    reviews = rt_polarity(folder / "mr", fold=0, seed=0)
    found = [review for split in (reviews.train, reviews.valid, reviews.test) for review in split]
    assert Review(["café", "noël", "au", "lait"], 1) in found  # \x85 is a blank to `split`
    assert len(found) == 121


def test_folds_are_disjoint_complete_stratified_and_seeded(folder):
    lines = {0: [f"bad {i}" for i in range(53)], 1: [f"good {i}" for i in range(47)]}
    for label, ending in enumerate(("neg", "pos")):
        (folder / "mr" / f"rt-polarity.{ending}").write_text("\n".join(lines[label]) + "\n")
    everything = Counter(" ".join(line.split()) for texts in lines.values() for line in texts)

    def texts(reviews: list[Review]) -> list[str]:
        return [" ".join(review.words) for review in reviews]

    splits = [rt_polarity(folder / "mr", fold, seed=3) for fold in range(FOLDS)]
    for fold, split in enumerate(splits):
        assert Counter(texts(split.train) + texts(split.valid) + texts(split.test)) == everything
        assert split.valid == splits[(fold + 1) % FOLDS].test
        for part in (split.valid, split.test):
            labels = Counter(review.label for review in part)
            assert labels[0] in (5, 6) and labels[1] in (4, 5)
    assert Counter(text for split in splits for text in texts(split.test)) == everything
    assert rt_polarity(folder / "mr", 0, seed=3) == splits[0] != rt_polarity(folder / "mr", 0, seed=4)


def write_imdb(folder: Path) -> None:
    for split, count in (("train", 20), ("test", 4)):
        for name in ("pos", "neg"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                text = f"A {name} film!<br /><br />It isn't {split}-{i}, señor."
                (folder / split / name / f"{i}_7.txt").write_text(text, encoding="utf-8")


def test_imdb_folder(folder):
    write_imdb(folder / "aclImdb")
    reviews = imdb(folder / "aclImdb", fold=2, seed=0)
    assert [len(reviews.train), len(reviews.valid), len(reviews.test)] == [36, 4, 8]
    for split in reviews.train, reviews.valid, reviews.test:
        assert 2 * sum(review.label for review in split) == len(split)
        assert all(review.words[1] == ("neg", "pos")[review.label] for review in split)
    assert reviews.test[0].words == [
        "A",
        "neg",
        "film",
        "!",
        "It",
        "isn",
        "'",
        "t",
        "test",
        "-",
        "0",
        ",",
        "señor",
        ".",
    ]
    assert reviews.valid != imdb(folder / "aclImdb", fold=3, seed=0).valid


def test_imdb_from_the_hub(monkeypatch, capsys):
    rows = {"text": [f"film {i}" for i in range(40)], "label": [0, 1] * 20}

    def load_dataset(name: str) -> dict:
        assert name == "stanfordnlp/imdb"
        return {"train": rows, "test": rows, "unsupervised": {}}

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: types.SimpleNamespace(head=lambda *_, **__: None))
    reviews = imdb(None, fold=0, seed=0)
    assert len(reviews.test) == 40 and Review(["film", "3"], 1) in reviews.test and "stanfordnlp/imdb" in reviews.source

    def unreachable(name: str) -> dict:
        raise ConnectionError("no route\nto the hub")

    hub.load_dataset = unreachable
    line = refused(capsys, ["--preset", "paper", "--device", "cpu"])
    assert "no route" in line and "--data" in line and "hub)" not in line


def test_cue_words_decide_but_for_a_tenth():
    reviews = synthetic(seed=0)
    assert reviews == synthetic(seed=0) != synthetic(seed=1)
    for name, split in (("valid", reviews.valid), ("test", reviews.test)):
        cues = [sum(word.startswith("good") - word.startswith("bad") for word in review.words) for review in split]
        right = sum((cue > 0) == review.label for cue, review in zip(cues, split, strict=True))
        assert reviews.best[name] == 100 * right / len(split) == pytest.approx(100 * (1 - FLIPPED), abs=3)
        last = [word for review in split for word in review.words[-1:]]
        seen = [(word.startswith("good"), review.label) for word, review in zip(last, split, strict=True)]
        assert sum(guess == label for guess, label in seen) < 0.7 * len(split)  # who sees one word only is far off


# --- batches and vectors ---------------------------------------------------------------------------------------------


def test_batches_hold_every_review_once_with_its_label():
    reviews = synthetic(seed=0).train[:50]
    tokenizer = build_vocabulary([review.words for review in reviews], None)
    sequences = encode(tokenizer, [review.words for review in reviews])
    batches = ReviewBatches(sequences, [review.label for review in reviews], 8, seed=0)
    assert batches.tokens == 50 and len(batches) == len(list(batches.epoch(0))) == 7
    found = []
    for words, lengths, labels in batches.epoch(3):
        for row, length, label in zip(words, lengths, labels, strict=True):
            assert row[length - 1] == EOS_ID and not row[length:].any()
            found.append((row[:length].tolist(), int(label)))
    wanted = [(ids.tolist(), review.label) for ids, review in zip(sequences, reviews, strict=True)]
    assert sorted(found) == sorted(wanted)
    positions = sum(words.numel() for words, _, _ in batches.epoch(0))
    assert batches.padding == pytest.approx(1 - sum(map(len, sequences)) / positions)


def test_glove_vectors_start_the_known_words(folder):
    lines = ["good1 1 2", "Bad2 3 4", "at name@domain.com 5 6", "bad3 7 8", "nowhere 9 9"]
    (folder / "glove.txt").write_text("\n".join(lines) + "\n")
    vocabulary = {"good1": 2, "bad2": 3, "BAD3": 4, "word1": 5}
    found = read_vectors(folder / "glove.txt", vocabulary, width=2)
    assert {index: vector.tolist() for index, vector in found.items()} == {2: [1, 2], 4: [7, 8]}

    (folder / "fasttext.txt").write_text("2 2\ngood1 1 2 \nbad3 7 8 \n")  # a header, blanks at the ends
    assert read_vectors(folder / "fasttext.txt", vocabulary, width=2).keys() == {2, 4}

    (folder / "glove.txt").write_text("good1 1 2 3 4 5 6 7 -8\nbad1 1 1 1 1 1 1 1 1\n")
    assert main([*TINY, "--glove", "glove.txt", "--models", "qrnn"]) == 0
    assert results("x")["corpus"]["ready_made_vectors"] == 2
    assert "2 with a ready-made vector" in Path("runs/x/report.md").read_text()
    task = Sentiment(parse([*TINY, "--glove", "glove.txt"], PRESETS))
    weight = task.build("lstm").embedding.weight[task.tokenizer.token_to_id("good1")]
    assert weight.tolist() == [1, 2, 3, 4, 5, 6, 7, -8] and weight.requires_grad


@pytest.mark.parametrize(
    ("content", "words"),
    (
        (b"", "glove.txt: has none"),
        (b"nowhere 1 2 3 4 5 6 7 8\n", "glove.txt: has none"),
        (b"100 300\n", "line 1: 300 numbers given, --embedding 8"),
        (b"1 8\ngood1 1 2\n", "line 2: 2 numbers"),
        (b"1 8\n\xff\xfe\x00\x01", "not UTF-8"),  # word2vec's binary files
        (b"good1 1 2 3\n", "line 1: 3 numbers"),
        (b"good1 1 2 3 4 5 6 7 8 9\n", "line 1: 9 numbers"),
        (b"good1 1 2 3 4 5 6 7 8\nbad1 1 2\n", "line 2: 2 numbers"),
        (b"good1 1 2 3 4 5 6 7 x\n", "line 1: could not convert"),
        (b"good1 1 2 3 4 5 6 7 inf\n", "line 1: not all numbers are finite"),
        (b"caf\xe9 1 2 3 4 5 6 7 8\n", "not UTF-8"),
    ),
)
def test_malformed_glove_files_are_one_line(folder, capsys, content, words):
    (folder / "glove.txt").write_bytes(content)
    line = refused(capsys, [*TINY, "--glove", "glove.txt"])
    assert words in line and "glove.txt" in line


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_widths_are_matched_within_one_per_cent(preset):
    with torch.device("meta"):
        qrnn, lstm = (build_model(PRESETS[preset], name, 100) for name in ("qrnn", "lstm"))
    assert count_parameters(lstm.rnn) == pytest.approx(count_parameters(qrnn.rnn), rel=0.01)
    PRESETS[preset].check()


def test_the_default_is_the_setting_of_the_paper():
    config = parse([], PRESETS)
    wanted = {"layers": 4, "hidden": 256, "embedding": 300, "kernel_size": 2, "mode": "fo", "activation": "tanh"}
    wanted |= {"dropout": 0.3, "batch_size": 24, "optimizer": "rmsprop", "lr": 1e-3, "weight_decay": 4e-6}
    wanted |= {"corpus": "imdb", "schedule": "constant"}
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("name", ("qrnn", "lstm"))
def test_the_other_reviews_of_a_batch_change_nothing(name):
    model = build_model(Config(embedding=8, hidden=6, layers=3), name, vocabulary=20).double().eval()
    words, lengths = torch.randint(20, (5, 30)), torch.tensor([1, 7, 30, 12, 2])
    together = model(words, lengths)
    alone = [model(row[None, :length], length[None]) for row, length in zip(words, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("qrnn", "lstm"))
def test_every_word_is_seen_and_every_parameter_learns(name):
    model = build_model(Config(embedding=8, hidden=6, layers=3), name, vocabulary=20).eval()
    words, lengths = torch.arange(2, 14).view(1, 12), torch.tensor([12])
    model(words, lengths).sum().backward()
    assert model.embedding.weight.grad[2:14].abs().sum(1).min() > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


# --- accuracy --------------------------------------------------------------------------------------------------------


def predictions(right: int, wrong: int) -> list[Prediction]:
    return [Prediction([2, 0], 1, 0.9)] * right + [Prediction([3, 0], 0, 0.8)] * wrong


def test_interval_is_wilsons():
    # worked example of Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 0.2553 to 0.3662; 0 of 20; 1 of 29
    for right, count, low, high in ((81, 263, 25.53, 36.62), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18)):
        found = accuracy(predictions(right, count - right))
        assert found["accuracy"] == pytest.approx(100 * right / count)
        assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.006)


def test_surest_predictions_come_first_and_wrong_ones_last():
    tokenizer = build_vocabulary([["fine", "grim"]], None)
    some = [Prediction([2, 0], 1, p) for p in (0.6, 0.99, 0.8, 0.7)] + [Prediction([3, 0], 1, p) for p in (0.4, 0.01)]
    shown = most_certain(some, tokenizer)
    assert [round(example["probability"], 2) for example in shown] == [0.99, 0.8, 0.7, 0.99, 0.6]
    assert [example["words"] for example in shown] == [["fine"]] * 3 + [["grim"]] * 2
    assert [example["predicted"] for example in shown] == ["positive"] * 3 + ["negative"] * 2


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_demo_comes_close_to_the_best_possible_accuracy(capsys):
    assert main(["--demo", "--epochs", "3", "--device", "cpu"]) == 0
    best = synthetic(seed=0).best
    report = Path("runs/sentiment-demo-synthetic-0/report.md").read_text()
    assert f"{best['test']:.2f}" in next(line for line in report.splitlines() if "best possible" in line)
    for model in results("sentiment-demo-synthetic-0")["models"]:
        assert best["test"] - 5 < model["test"]["accuracy"] < best["test"] + 1.5, model["model"]


def test_report_shows_accuracies_and_examples(capsys):
    assert main(TINY) == 0
    printed, report = capsys.readouterr().out, Path("runs/x/report.md").read_text()
    assert (
        "reviews an epoch" in printed
        and "reviews/s" in printed
        and "94 reviews for training, 13 for validation" in report
    )
    for model in results("x")["models"]:
        for split in ("valid", "test"):
            cell = f"{model[split]['accuracy']:.2f} ({model[split]['low']:.1f} to {model[split]['high']:.1f})"
            assert cell in printed and cell in report
        assert model["valid_loss"] == min(line["valid_loss"] for line in model["epochs"])
        for example in model["examples"]:
            assert " ".join(example["words"]) in report
    assert "right, " in report and "WRONG, " in report and "Wilson" in report
    assert Path("runs/x/curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path.cwd()) not in report + json.dumps(results("x"))


def test_test_accuracy_is_that_of_the_best_weights_review_by_review():
    assert main([*TINY, "--models", "lstm"]) == 0
    task = Sentiment(parse(TINY, PRESETS))
    model = task.build("lstm").eval()
    model.load_state_dict(load_checkpoint(Path("runs/x/lstm"), "best")[0])
    reviews = load_reviews("rt-polarity", Path("mr"), fold=0, seed=0).test
    sequences = encode(task.tokenizer, [review.words for review in reviews])
    right = [
        (model(ids[None], torch.tensor([len(ids)])).item() > 0) == review.label
        for ids, review in zip(sequences, reviews, strict=True)
    ]
    assert results("x")["models"][0]["test"]["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert len(predict(model, task.test)) == len(reviews)


def test_finished_models_are_not_trained_again():
    assert main([*TINY, "--models", "qrnn"]) == 0
    before = results("x")["models"]
    assert main([*TINY, "--models", "qrnn", "--resume"]) == 0
    assert results("x")["models"] == before


def test_interrupted_and_resumed_is_as_never_interrupted(monkeypatch):
    assert main([*TINY, "--name", "whole"]) == 0
    validate, asked = Sentiment.validate, []

    def interrupt(task: Sentiment, model: torch.nn.Module) -> float:
        if not asked:  # after the first epoch
            signal.raise_signal(signal.SIGINT)
        asked.append(model)
        return validate(task, model)

    with monkeypatch.context() as patch:
        patch.setattr(Sentiment, "validate", interrupt)
        assert main(TINY) == 130
    (model,) = results("x")["models"]
    assert model["test"] is None and "not read" in Path("runs/x/report.md").read_text()
    assert main([*TINY, "--resume"]) == 0
    for one, other in zip(results("whole")["models"], results("x")["models"], strict=True):
        for key in ("best_epoch", "valid_loss", "valid", "test", "examples"):
            assert one[key] == other[key]


# --- wrong input -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The one line on stderr with which the command is refused; nothing is written."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and not Path("runs").exists()
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "."], "no rt-polarity.neg there"),
        (["--data", "None"], "--data DIR with rt-polarity.pos"),
        (["--corpus", "imdb"], "no reviews there"),
        (["--corpus", "synthetic"], "leave it out"),
        (["--fold", "10"], "--fold 10"),
        (["--fold", "-1"], "--fold -1"),
        (["--dropout", "1.5"], "--dropout 1.5"),
        (["--hidden", "0"], "--hidden 0"),
        (["--vocabulary", "2"], "--vocabulary 2"),
        (["--zoneout", "1.5"], "--zoneout 1.5"),
        (["--glove", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ),
)
def test_wrong_arguments_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, [*TINY, *arguments])


@pytest.mark.parametrize("name", ("mr/rt-polarity.pos", "aclImdb/train/pos/3_7.txt"))
def test_files_that_cannot_be_read_are_named(folder, monkeypatch, capsys, name):
    write_imdb(folder / "aclImdb")
    read_bytes, read_text = Path.read_bytes, Path.read_text

    def refuse(read):
        def reading(path, *args, **kwargs):
            if str(path) == name:
                raise PermissionError(errno.EACCES, "Permission denied", name)
            return read(path, *args, **kwargs)

        return reading

    monkeypatch.setattr(Path, "read_bytes", refuse(read_bytes))
    monkeypatch.setattr(Path, "read_text", refuse(read_text))
    corpus = ["--corpus", "imdb", "--data", "aclImdb"] if "Imdb" in name else []
    line = refused(capsys, [*TINY, *corpus])
    assert name in line and "Permission denied" in line


def test_too_few_reviews_for_the_folds(folder):
    (folder / "mr" / "rt-polarity.pos").write_text("fine\n" * 9)
    with pytest.raises(CorpusError, match="only 9 positive reviews"):
        rt_polarity(folder / "mr", fold=0, seed=0)


def test_help_says_what_everything_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        sentiment.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in ("--preset", "--demo", "--fold", "--glove", "--dropout", "--resume"):
        assert flag in printed
