"""The runs behind the pages of results: their flags, the script that makes them, the search for settings."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from examples.sentiment.__main__ import Sentiment
from examples.translation.__main__ import Translating
from experiment import build_model
from lab.corpora import load_corpus
from lab.language_model import LanguageModel
from lab.presets import PRESETS
from lab.run import count_parameters
from lab.synthetic import sample_sentences
from qrnn import QRNN
from qrnn_layer import QRNNLayer, QRNNState
from research import closed_form, context, jobs
from research.jobs import Job, identity
from research.studies import BOTH_WAYS, LANGUAGE_MODELS, READERS, SIZES, STUDIES, TRANSLATORS, main

ROOT = Path(__file__).parents[2]
TINY = "--preset demo --corpus text --embedding 8 --hidden 8 --epochs 1 --device cpu"


@pytest.fixture
def data(tmp_path):
    """A folder with a small text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, seed, count in (("train", 1, 60), ("valid", 2, 20), ("test", 3, 20)):
        lines = [" ".join(sentence) for sentence in sample_sentences(count, seed=seed)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_trials(folder: Path) -> None:
    def trial(model: str, lr: float, valid_perplexity: float) -> dict:
        dropouts = {"dropout": 0.3, "dropout_embedding": 0.3, "dropout_output": 0.3}
        initial = {"initialisation": "scaled", "forget_bias": 0.0}
        config = {"lr": lr, "weight_decay": 0.02, **dropouts, **initial}
        scores = {"valid_perplexity": valid_perplexity, "valid_loss": math.log(valid_perplexity)}
        return {"config": config, "models": [{"model": model, **scores}]}

    runs = {"a": trial("qrnn", 0.0015, 120.0), "b": trial("qrnn", 0.003, 100.0), "c": trial("lstm", 0.0015, 110.0)}
    runs |= {"e": trial("lstm", 0.003, 115.0)}
    runs["d"] = {"error": "exit code 1: diverged"}
    for search in (LANGUAGE_MODELS, TRANSLATORS, BOTH_WAYS, READERS):
        for run in runs.values():
            run.get("config", {})["preset"] = search.preset
        mine = {key: run for key, run in runs.items() if run.get("models", [{}])[0].get("model") != "qrnn"}
        (folder / f"{search.name}.json").write_text(json.dumps({"runs": mine if search is BOTH_WAYS else runs}))


@pytest.mark.parametrize("study", STUDIES)
def test_flags_are_understood_and_no_run_is_done_twice(study, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    write_trials(tmp_path)
    runs = STUDIES[study]()
    assert len({identity(run, "of a text") for run in runs.values()}) == len(runs)
    for run in runs.values():
        assert importlib.util.find_spec(run.module.split()[0])
        assert len(run.config.models) == 1


def test_the_lstm_on_the_penn_treebank_has_256_units():
    config = STUDIES["ptb_averaged"]()["LSTM, seed 0"].config
    assert build_model(config, "lstm", vocabulary=10).hidden == 256


@pytest.mark.parametrize(
    "study",
    [
        "ablation",
        "longer",
        "wikitext2_scaled",
        "candidates",
        "ptb_quarter",
        "ptb_tuned",
        "ptb_averaged",
        "ptb_changes",
        "forms",
    ],
)
def test_compared_models_have_as_many_recurrent_parameters(study):
    configs = [run.config for run in STUDIES[study]().values()]
    counts = [count_parameters(build_model(config, *config.models, vocabulary=10).rnn) for config in configs]
    assert max(counts) < 1.01 * counts[0] and min(counts) > 0.99 * counts[0]


def test_one_word_in_the_first_layer_costs_no_parameters():
    one, two = (
        count_parameters(build_model(STUDIES[study]()["QRNN, seed 0"].config, "qrnn", 10).rnn)
        for study in ("first_kernel", "seeds")
    )
    assert 0.99 * two < one < 1.01 * two


def test_the_preset_small_is_the_best_trial_of_both_models():
    for label in ("QRNN, seed 0", "LSTM, seed 0"):
        config = STUDIES["tuned"]()[label].config
        same = {"amp": None, "models": PRESETS["small"].models}
        if label.startswith("LSTM"):
            same |= {name: getattr(PRESETS["small"], name) for name in SIZES}  # the LSTM gets as many parameters
        assert replace(config, **same) == PRESETS["small"]


def test_compared_models_get_the_trial_that_was_best_on_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    write_trials(tmp_path)
    configs = {label: run.config for label, run in STUDIES["tuned"]().items()}
    assert {config.lr for label, config in configs.items() if label.startswith("QRNN")} == {0.003}
    assert {config.lr for label, config in configs.items() if label.startswith("LSTM")} == {0.0015}
    assert all(config.dropout_output == 0.3 and config.weight_decay == 0.02 for config in configs.values())
    translators = STUDIES["translation"]().values()
    assert [(run.config.lr, run.config.bidirectional) for run in translators] == [
        (0.003, False),
        (0.0015, False),
        (0.0015, True),
        (0.004, True),
        (0.002, True),
    ]
    assert [run.config.lr for run in STUDIES["folds"]().values()] == [0.003, 0.0015] * 10


def test_tuned_models_need_the_same_trials_of_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    assert main(["tuned", "--data", str(tmp_path)]) == 2
    write_trials(tmp_path)
    trials = json.loads((tmp_path / "language_models.json").read_text())
    trials["runs"].pop("e")  # two trials of one, one of the other
    (tmp_path / "language_models.json").write_text(json.dumps(trials))
    assert main(["tuned", "--data", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == second and "language_models.json" in first


def test_trials_that_differ_in_what_is_not_searched_are_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    write_trials(tmp_path)
    trials = json.loads((tmp_path / "language_models.json").read_text())
    for label, epochs in (("a", 2), ("b", 4)):
        trials["runs"][label]["config"]["epochs"] = epochs
    (tmp_path / "language_models.json").write_text(json.dumps(trials))
    assert main(["tuned", "--data", str(tmp_path)]) == 2
    assert "language_models.json: trials with epochs 2 and 4 found" in capsys.readouterr().err


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Where the runs and the results of studies go; the code stays where it is."""
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


DIVERGES = Job(f"{TINY} --models lstm --optimizer sgd --lr 1e30")


def test_a_study_writes_what_came_out_and_does_not_run_it_again(data, away, monkeypatch, capsys):
    wanted = {"good": Job(f"{TINY} --models qrnn"), "bad": DIVERGES}
    monkeypatch.setitem(STUDIES, "tiny", lambda: wanted)
    assert main(["tiny", "--data", str(data)]) == 1
    content = json.loads((away / "tiny.json").read_text())
    assert set(content["runs"]) == {"good", "bad"}
    assert content["runs"]["good"]["models"][0]["model"] == "qrnn" and not content["runs"]["good"]["interrupted"]
    assert content["runs"]["bad"]["error"].startswith("exit code 1: ")
    assert f"bad: {content['runs']['bad']['error']}" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("run again")))
    wanted.pop("bad")
    assert main(["tiny", "--data", str(data)]) == 0


def text_of(data: Path) -> str:
    return load_corpus("text", data).sha256_of_words


def test_what_is_on_record_stays_until_a_run_in_its_place_succeeds(data, away, monkeypatch):
    first, kept = Job(f"{TINY} --models qrnn"), {"identity": identity(DIVERGES, text_of(data)), "models": []}
    other = {"identity": "of other settings", "models": []}
    failed = {"identity": kept["identity"], "error": "an older one"}
    record = {"first": other, "second": kept, "third": other, "fourth": failed, "gone": kept}
    (away / "tiny.json").write_text(json.dumps({"runs": record}))
    wanted = {"second": DIVERGES, "first": first, "third": Job(f"{DIVERGES.flags} --seed 1")}
    wanted["fourth"] = Job(f"{DIVERGES.flags} --seed 2")
    monkeypatch.setitem(STUDIES, "tiny", lambda: wanted)
    assert main(["tiny", "--data", str(data)]) == 1
    runs = json.loads((away / "tiny.json").read_text())["runs"]
    assert list(runs) == ["second", "first", "third", "fourth", "gone"]
    assert runs["first"]["models"][0]["model"] == "qrnn"
    assert runs["second"] == runs["gone"] == kept and runs["third"] == other
    assert runs["fourth"]["error"].startswith("exit code 1: ")


@pytest.mark.parametrize("where", ["", "nowhere", "empty"])
@pytest.mark.parametrize("command", ["studies", "context"])
def test_without_the_corpus_nothing_runs_and_nothing_is_written(command, where, away, monkeypatch, capsys):
    (away / "empty").mkdir()
    monkeypatch.chdir(away)
    monkeypatch.setattr(context, "RESULTS", away)
    for name in ("tiny", context.COMPARED):
        monkeypatch.setitem(STUDIES, name, lambda: {"good": Job(f"{TINY} --models qrnn")})
    for name in ("tiny", "context"):
        (away / f"{name}.json").write_text('{"runs": {"good": {"identity": "x", "models": []}}}')
    before = {path.name: path.read_bytes() for path in away.glob("*.json")}
    mains = {"studies": lambda: main(["tiny", "--data", where]), "context": lambda: context.main(["--data", where])}
    assert mains[command]() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and ("empty" if where == "empty" else "--data") in line
    assert {path.name: path.read_bytes() for path in away.glob("*.json")} == before and not (away / "runs").exists()


DAMAGED = pytest.mark.parametrize("content", ["", '{"a"', "{}", "[]", "null"])


@DAMAGED
def test_a_damaged_record_is_named_before_anything_runs(data, away, monkeypatch, capsys, content):
    monkeypatch.setitem(STUDIES, "tiny", lambda: {"good": Job(f"{TINY} --models qrnn")})
    (away / "tiny.json").write_text(content)
    assert main(["tiny", "--data", str(data)]) == 2
    assert "tiny.json" in capsys.readouterr().err and (away / "tiny.json").read_text() == content
    assert not (away / "runs").exists()


@DAMAGED
def test_a_damaged_run_is_not_finished(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert not jobs.finished(tmp_path / "results.json")


def test_a_damaged_run_is_run_again(data, away, monkeypatch):
    monkeypatch.setitem(STUDIES, "tiny", lambda: {"good": Job(f"{TINY} --models qrnn")})
    assert main(["tiny", "--data", str(data)]) == 0
    (results,) = (away / "runs").glob("*/results.json")
    results.write_text('{"a"')
    assert main(["tiny", "--data", str(data)]) == 0
    assert json.loads(results.read_text())["models"]


def test_a_corpus_in_another_folder_is_the_same(data, away, monkeypatch):
    monkeypatch.setitem(STUDIES, "tiny", lambda: {"good": Job(f"{TINY} --models qrnn")})
    assert main(["tiny", "--data", str(data)]) == 0
    data.rename(away / "elsewhere")
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("run again")))
    assert main(["tiny", "--data", str(away / "elsewhere")]) == 0


def test_a_wrong_flag_is_one_line_before_anything_runs(data, away, monkeypatch, capsys):
    monkeypatch.setitem(STUDIES, "tiny", lambda: {"good": Job(TINY), "bad": Job(f"{TINY} --lr -1")})
    assert main(["tiny", "--data", str(data)]) == 2
    assert "--lr -1" in capsys.readouterr().err and not (away / "runs").exists()


def test_a_run_is_told_by_its_settings_and_its_text_not_by_its_flags():
    other = Job(f"{TINY} --models qrnn --hidden 8")
    assert identity(other, "text") == identity(Job(f"{TINY} --models qrnn"), "text")
    assert identity(Job(f"{TINY} --models qrnn --dense"), "text") != identity(other, "text")
    assert identity(other, "another text") != identity(other, "text")


def test_the_text_of_a_job_is_that_of_its_run(tmp_path):
    for split in ("train", "val", "test"):
        for language, line in (("de", "Guten Tag"), ("en", "Good day")):
            (tmp_path / f"{split}.{language}").write_text(f"{line}\n{line}, {line}\n")
    for longest, dropped in ((10, 1), (50, 0)):
        job = Job(f"--preset small --max-length {longest} --models qrnn", "examples.translation")
        text = Translating(replace(job.config, data=tmp_path)).fingerprint
        assert text["dropped_pairs"] == dropped
        assert jobs.identify({"a job": job}, tmp_path) == {"a job": identity(job, text["sha256_of_lines"])}


def test_each_fold_of_the_reviews_is_a_text_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    write_trials(tmp_path)
    for label, words in (("pos", "good"), ("neg", "bad")):
        lines = "\n".join(f"a {words} film of number {number}" for number in range(10))
        (tmp_path / f"rt-polarity.{label}").write_text(f"{lines}\n")
    wanted = {label: job for label, job in STUDIES["folds"]().items() if job.config.fold < 2}
    found = jobs.identify(wanted, tmp_path)
    assert len(found) == len({*found.values()}) == 4
    for label, job in wanted.items():
        text = Sentiment(replace(job.config, data=tmp_path)).fingerprint["sha256_of_reviews"]
        assert found[label] == identity(job, text)


def test_a_forgotten_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--data" in line


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
def test_the_plain_closed_form_is_the_recurrence(mode):
    layer = QRNNLayer(4, 5, mode=mode, activation="softplus", dtype=torch.float64)
    plain, x = closed_form.by_closed_form(layer), torch.randn(2, 9, 4, dtype=torch.float64)
    state = QRNNState(torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(plain(x, state)[0], layer(x, state)[0])
    wanted, found = (torch.autograd.grad(one(x, state)[0].square().sum(), one.weight)[0] for one in (layer, plain))
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():  # evaluation
        assert torch.equal(plain(x, state)[0], layer(x, state)[0])


def test_the_plain_closed_form_is_left_to_autograd():
    layer = closed_form.by_closed_form(QRNNLayer(4, 5, activation="softplus", zoneout=0.5))
    h, _ = layer(torch.randn(2, 9, 4))
    seen, nodes = set(), [h.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [other for other, _ in node.next_functions if other is not None]
    assert any("Logcumsumexp" in name for name in seen) and not any("Pool" in name for name in seen)
    h.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_the_plain_closed_form_trains(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY.split(), "--models", "qrnn", "--data", str(data)]
    assert closed_form.main([*flags, "--name", "plain", "--zoneout", "0.5"]) == 0
    for wrong in (["--activation", "tanh"], ["--generate", "the"]):
        assert closed_form.main([*flags, "--name", "other", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err and not (tmp_path / "runs" / "other").exists()
    assert closed_form.main(flags) == 0 and (tmp_path / "runs" / "closed-form-demo-text-0").is_dir()


def test_every_number_of_known_words_is_asked_of_the_same_words(monkeypatch):
    monkeypatch.setattr(context, "KNOWN", (1, 2, 4, 8))
    monkeypatch.setattr(context, "BATCH", 20)
    model = LanguageModel(QRNN(6, 6, batch_first=True), 6, vocabulary=11, embedding=6).eval()
    words = torch.randint(11, (27,))
    for known in context.KNOWN:
        costs = context.losses(model, words, known)
        assert len(costs) == 16  # from index 8 on; three are left, and a window of 8 scores four
        for index, cost in enumerate(costs):
            given = known // 2 + 1 + index % (known - known // 2)
            logits, _ = model(words[None, 8 + index - given : 8 + index])
            torch.testing.assert_close(cost, F.cross_entropy(logits[0, -1], words[8 + index]))


def test_models_are_compared_by_the_words_they_know(data, away, monkeypatch, capsys):
    for name in ("RESULTS", "ROOT"):
        monkeypatch.setattr(context, name, away)
    monkeypatch.setattr(context, "KNOWN", (1, 2, 4))
    monkeypatch.setattr(context, "COMPARED", "tiny")
    seeded = [(name, seed) for seed in range(2) for name in ("qrnn", "lstm")]
    flags = f"{TINY} --protocol stream --models"
    jobs = {f"{name}, seed {seed}": Job(f"{flags} {name} --seed {seed}") for name, seed in seeded}
    monkeypatch.setitem(STUDIES, "tiny", lambda: jobs)
    assert context.main(["--data", str(data)]) == 2
    assert "qrnn, seed 0 of tiny" in capsys.readouterr().err
    assert main(["tiny", "--data", str(data)]) == 0 and context.main(["--data", str(data)]) == 0
    content = json.loads((away / "context.json").read_text())
    monkeypatch.setattr(context, "KNOWN", (1, 1000))
    assert context.main(["--data", str(data)]) == 2
    assert f"--data {data}" in capsys.readouterr().err
    assert [(model["model"], model["seed"]) for model in content["models"]] == seeded
    assert all(len({*model["perplexity"]}) == 3 for model in content["models"])
    trained = json.loads((away / "tiny.json").read_text())["runs"]
    for model, run in zip(content["models"], trained.values(), strict=True):
        assert 1 < model["training_text"] < 1.5 * run["models"][0]["valid_perplexity"]
