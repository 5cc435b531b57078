"""The pages say what the files under research/results say, their links lead somewhere, and their code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pandas import Series
from scipy.stats import t

from benchmarks import gpu_tables, record
from examples.sentiment import model as sentiment
from examples.translation import model as translation
from examples.translation.__main__ import scores
from experiment import build_model
from research import comparison, figures, jobs, pages, studies, tables
from research.comparison import over_seeds, over_sentences
from research.record import finished_runs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = sorted(record.RESULTS.glob("*.json"))
EVERY_PAGE = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- the pages -------------------------------------------------------------------------------------------------------


@EVERY_PAGE
def test_every_number_is_made_from_the_results(page):
    text = page.read_text()
    assert pages.render(text) == text, "run `make results`"


@EVERY_PAGE
def test_a_block_in_a_sentence_does_not_begin_a_line(page):
    """There Markdown takes the rest of the line for HTML."""
    for line in page.read_text().splitlines():
        assert not re.match(r"\s*<!-- begin [^>]*-->.", line), line


@EVERY_PAGE
def test_links_lead_somewhere_and_figures_have_a_text(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'<img src="([^"]*)"', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name, target in re.findall(r"\]\(([^)#]*)#([^)]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", (page.parent / name if name else page).read_text(), re.MULTILINE)
        assert target in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target
    texts = re.findall(r"!\[([^]]*)\]", text) + re.findall(r'<img [^>]*?alt="([^"]*)"', text)
    assert len(texts) == text.count("docs/images/") and all(len(words) > 40 for words in texts)


def test_every_figure_is_on_a_page():
    shown = {name for page in pages.PAGES for name in re.findall(r"docs/images/([\w.-]+)", page.read_text())}
    assert {path.name for path in (ROOT / "docs" / "images").iterdir()} <= shown


def test_every_study_has_its_place():
    assert set(tables.STUDIES) == set(studies.STUDIES)
    places = {match["name"] for page in pages.PAGES for match in pages.BLOCK.finditer(page.read_text())}
    assert {*studies.STUDIES, "comparison", "older comparison", "context"} <= places


def test_blocks_are_filled_where_they_stand(monkeypatch):
    monkeypatch.setattr(pages, "BLOCKS", {"a table": lambda: "| 1 |", "number": lambda: r"\2"})
    text = "x <!-- begin number --><!-- end number --> y\n<!-- begin a table -->\nold\n<!-- end a table -->\n"
    made = pages.render(text)
    assert made.splitlines() == [
        r"x <!-- begin number -->\2<!-- end number --> y",
        "<!-- begin a table -->",
        "| 1 |",
        "<!-- end a table -->",
    ]
    assert pages.render(made) == made


@pytest.mark.parametrize(
    "text", ["<!-- begin nothing --><!-- end nothing -->", "<!-- begin seeds -->", "<!-- end x -->"]
)
def test_a_block_without_a_name_or_an_end_is_an_error(text):
    with pytest.raises(ValueError, match="block"):
        pages.render(text)


# --- tables ----------------------------------------------------------------------------------------------------------


def run(name: str, valid: float, test: float | None, **config: object) -> dict:
    """A run on record, made up."""
    curve = [{"epoch": n, "valid_perplexity": valid + 2 - n, "train_perplexity": valid + 1} for n in (1, 2)]
    sizes = {"hidden": 8, "recurrent_parameters": 1000, "parameters": 2000}
    model = sizes | {"model": name, "valid_perplexity": valid, "test_perplexity": test, "epochs": curve}
    origin = {"commit": "0123456789", "machine": {"gpu": None, "cpu": "a CPU", "threads": 1}}
    config = {
        "preset": "small",
        "epochs": 2,
        "lr": 0.01,
        "dropout": 0.2,
        "weight_decay": 0.001,
        "dense": False,
    } | config
    return origin | {"versions": {"torch": "2", "python": "3"}, "config": config, "models": [model]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes results/NAME.json, and makes its folder that of the results."""
    for module in (jobs, tables, gpu_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr("research.record.RESULTS", tmp_path)

    def write_runs(study: str, **runs: dict) -> None:
        (tmp_path / f"{study}.json").write_text(json.dumps({"command": "a command", "runs": runs}))

    return write_runs


def cells(table: str) -> list[list[str]]:
    """The cells of a table in Markdown, without header and rule."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line[:1] == "|"]


def test_studies_are_shown_with_what_failed_and_what_is_missing(write):
    made = tables.STUDIES["ablation"]
    assert "`x --data DIR`" in tables.recorded("ablation", "x", made)
    write("ablation", LSTM=run("lstm", 90.0, 89.0), broken={"error": "exit code 1: no luck"})
    shown = tables.recorded("ablation", "x", made)
    assert cells(shown) == [["LSTM", "8", "1,000 / 2,000", "90.0"]]
    assert "broken failed: exit code 1: no luck." in shown and "LSTM, seed 1; " in shown
    assert "commit 012345678, a CPU, 1 core a run, torch 2, Python 3" in shown
    write("ablation", broken={"error": "exit code 1: no luck"})
    assert tables.recorded("ablation", "x", made).startswith("broken failed: exit code 1: no luck.")


def test_seeds_are_averaged_and_the_best_trial_is_bold(write):
    runs = {f"a{seed}": run("qrnn", 90.0 + 2 * seed, 89.0 + 2 * seed) for seed in (0, 1)}
    write("seeds", **runs, b=run("lstm", 95.0, 94.0))
    qrnn, lstm = cells(tables.seeds(finished_runs("seeds")))
    assert qrnn == ["QRNN", "2", "8", "1,000 / 2,000", "91.00 ± 1.41", "90.00 ± 1.41", "92.00 ± 1.41"]
    assert lstm[4:] == ["95.00", "94.00", "96.00"]
    settings = {"lr": "{:.2g}", "dropout": "{:.2f}"}
    write("readers", a=run("qrnn", 92.0, None), b=run("lstm", 99.0, None), c=run("lstm", 98.0, None, lr=0.02))
    shown = cells(tables.trials(finished_runs("readers"), settings))
    assert shown == [["0.01", "0.20", "**92.00**", "99.00"], ["0.02", "0.20", "", "**98.00**"]]
    write("readers", a=run("qrnn", 92.0, None))
    assert cells(tables.trials(finished_runs("readers"), settings)) == [["0.01", "0.20", "**92.00**"]]


def test_a_study_can_be_sorted_and_shows_each_epoch(write):
    write("ablation", bad=run("qrnn", 90.0, None), good=run("lstm", 80.0, None))
    assert [row[0] for row in cells(tables.STUDIES["ablation"](finished_runs("ablation")))] == ["good", "bad"]
    assert cells(tables.longer(finished_runs("ablation")))[0] == ["bad", "8", "91.0", "90.0", "91.0"]


def test_the_first_layer_is_compared_with_the_seeds(write):
    write("seeds", a=run("qrnn", 90.0, 89.0), b=run("qrnn", 92.0, 91.0), c=run("lstm", 1.0, 1.0))
    write("first_kernel", a=run("qrnn", 80.0, 79.0), b=run("qrnn", 82.0, 81.0))
    shown = tables.first_kernel(finished_runs("first_kernel"))
    assert [row[4] for row in cells(shown)] == ["81.00 ± 1.41", "91.00 ± 1.41"]
    assert "minus k = 2: -10.00 (" in shown


def test_the_interval_is_that_of_welch():
    seeds = Series([79.0, 79.3, 79.1]), Series([80.0, 79.6, 80.6])
    pair, (one, other) = over_seeds(*seeds), (values.var() / 3 for values in seeds)
    freedom = (one + other) ** 2 / (one**2 / 2 + other**2 / 2)
    half = t.ppf(0.975, freedom) * (one + other) ** 0.5
    assert pair.interval == pytest.approx((pair.gap - half, pair.gap + half))


def test_ahead_is_who_the_interval_says():
    low, high, wide = Series([10.0, 10.1, 10.2]), Series([20.0, 20.1, 20.2]), Series([5.0, 10.0, 15.0])
    assert over_seeds(low, high).winner == over_seeds(high, low)._replace(higher_is_better=True).winner == "QRNN"
    assert over_seeds(high, low).winner == "LSTM" and over_seeds(low, wide).winner is None
    alone = over_seeds(low[:1], high[:1])
    assert alone.winner is alone.interval is None and alone.difference() == "-10.00, no interval"


def test_folds_are_compared_in_pairs(write):
    """Folds differ far more than models do."""
    qrnn, lstm = [70.0, 75.0, 80.0, 60.0], [69.0, 74.1, 78.9, 59.0]
    runs = {f"q{n}": run("qrnn", 1.0, None, fold=n, accuracy=value) for n, value in enumerate(qrnn)}
    runs |= {f"l{n}": run("lstm", 1.0, None, fold=n, accuracy=value) for n, value in reversed([*enumerate(lstm)])}
    for made in runs.values():
        made["models"][0]["test"] = {"accuracy": made["config"].pop("accuracy")}
    write("folds", **runs)
    pair = comparison.reviews()
    assert pair.gap == pytest.approx(1.0) and pair.winner == "QRNN" and pair.over == "4 folds"
    gaps = Series(qrnn) - Series(lstm)
    assert pair.interval[1] - pair.gap == pytest.approx(t.ppf(0.975, 3) * gaps.std() / 2)
    assert cells(tables.folds(finished_runs("folds")))[3] == ["3", "60.00", "59.00"]
    runs.pop("l3")
    write("folds", **runs)
    assert comparison.reviews().over == "3 folds"
    assert cells(tables.folds(finished_runs("folds")))[3] == ["3", "60.00", ""]


def test_translations_are_compared_on_the_same_draws_of_sentences():
    references = [f"the {noun} of number {n} is {n % 7} feet long" for n, noun in enumerate(["boat", "car"] * 100)]
    good = [line.replace("boat", "ship") if n % 8 == 0 else line for n, line in enumerate(references)]
    bad = [line.replace("is", "was") if n % 3 == 0 else line for n, line in enumerate(good)]
    models = [scores(lines, references) for lines in (good, bad)]
    pair = over_sentences(*models)
    assert pair[:2] == pytest.approx([model["bleu"] for model in models]) and pair.winner == "QRNN"
    low, high = pair.interval
    assert low < pair.gap < high < 2 * pair.gap
    assert over_sentences(models[1], models[0]).winner == "LSTM"
    alike = over_sentences(models[0], models[0])
    assert alike.interval == (0, 0) and alike.winner is None  # not so if each had draws of its own


def test_of_the_translators_the_best_on_validation_are_compared(write):
    words = [f"sentence {n} has {n % 7} words" for n in range(100)]

    def made(model: str, valid: float, lines: list[str]) -> dict:
        of_model = run(model, valid, None)
        of_model["models"][0] |= scores(lines, words)
        return of_model

    worse = [line.replace("has", "had") for line in words]
    write("translation", a=made("qrnn", 2.0, words), b=made("lstm", 3.0, words), c=made("lstm", 2.5, worse))
    pair = comparison.translations()
    assert pair.qrnn == pytest.approx(100) and pair.lstm < 90
    write("translation", a=made("qrnn", 2.0, words))
    assert comparison.translations() is None


def test_the_papers_qrnn_is_compared_as_it_is_evaluated_now():
    rows = gpu_tables.frame("bradbury")
    scores = dict(zip(rows["zoneout_in_evaluation"].fillna("LSTM"), rows["result"], strict=True))
    assert comparison.paper_sizes()[:2] == tuple(scores[name]["test_perplexity"] for name in ("its mean", "LSTM"))


def test_comparisons_have_as_many_runs_of_one_as_of_the_other(write):
    scores = {"a": ("qrnn", 80.0), "b": ("qrnn", 82.0), "c": ("lstm", 90.0), "d": ("lstm", 90.5)}
    several = {label: run(name, 95.0, test) for label, (name, test) in scores.items()}
    write("tuned", **several)
    write("ptb_averaged", a=run("qrnn", 70.0, 60.0))
    (row,) = cells(comparison.BLOCKS["comparison"]())
    assert row[:3] == ["WikiText-2, sentences, both tuned", "81.00", "90.25"] and row[3].startswith("-9.25 (-")
    assert "no interval" in comparison.verdict()
    write("ptb_averaged", **{label + again: made for label, made in several.items() for again in ("", "!")})
    assert "for the QRNN (Penn Treebank, one stream, both tuned), and in no other row" in comparison.verdict()


def test_older_comparisons_share_what_was_run_once(write):
    lstms = {label: run("lstm", 95.0, test) for label, test in (("c", 90.0), ("d", 90.5))}
    write("seeds", a=run("qrnn", 95.0, 80.0), b=run("qrnn", 95.0, 82.0), **lstms)
    dense = {label: run("qrnn", valid, None, dense=True) for label, valid in (("a", 60.0), ("b", 55.0))}
    write("longer", **dense)
    (row,) = cells(comparison.BLOCKS["older comparison"]())
    assert row[:3] == ["WikiText-2, sentences, weights of nn.LSTM", "81.00", "90.25"]
    assert comparison.best_dense() is comparison.one_word_first() is None
    write("longer", **dense, c=run("lstm", 50.0, None, dense=True))
    assert comparison.best_dense().gap == 5.0
    write("first_kernel", a=run("qrnn", 90.0, 70.0), b=run("qrnn", 90.0, 70.2))
    assert comparison.one_word_first().gap == pytest.approx(-20.15)
    (_, row, _) = cells(comparison.BLOCKS["older comparison"]())
    assert row[0].endswith("layer 1 with k = 1") and row[-1] == "QRNN"


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.STUDIES)
def test_figures_are_drawn_also_of_a_part(name, write, tmp_path):
    runs = {f"{name} {seed}": run(name, 90.0 + seed, None) for name in ("qrnn", "lstm") for seed in (0, 1)}
    for made in runs.values():
        made["config"]["reverse"] = True
        made["models"][0]["attention"] = {"source": "ab", "translation": "c", "per_cent": ["20 80", "70 30"]}
    for part in (runs, dict(list(runs.items())[:1])):
        write("x", **part)
        figures.STUDIES[name](finished_runs("x"), tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 5000
        (tmp_path / "x.png").unlink()


@pytest.mark.parametrize("name", figures.STUDIES)
def test_runs_of_the_lstm_alone_stop_no_page(name, write, tmp_path):
    made = run("lstm", 90.0, None, reverse=True)
    made["models"][0]["attention"] = {"source": "ab", "translation": "c", "per_cent": ["20 80", "70 30"]}
    write("x", one=made)
    figures.STUDIES[name](finished_runs("x"), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() == (name != "translation")  # that figure is of the QRNN


def models_by_words(seeds: int) -> dict:
    """What `research.context` writes, of a QRNN that is a tenth worse than the LSTM where two words are known."""
    words = {"qrnn": [200.0, 110.0, 90.0], "lstm": [200.0, 100.0, 90.0]}
    models = [
        {"model": name, "seed": seed, "perplexity": [score + seed for score in scores], "training_text": 50.0 + seed}
        for seed in range(seeds)
        for name, scores in words.items()
    ]
    origin = json.loads((record.RESULTS / "context.json").read_text())
    return origin | {"study": "a study", "known": [1, 2, 4], "models": models}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_known_words_are_drawn_and_missing_ones_are_said(seeds, tmp_path, monkeypatch):
    content = models_by_words(seeds)
    figures.draw_context(content, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr("research.record.RESULTS", tmp_path)
    assert "`python -m research.context --data DIR`" in tables.context()
    (tmp_path / "context.json").write_text(json.dumps(content))
    shown = cells(tables.context())
    assert [row[0] for row in shown] == ["1", "2", "3-4", "training text, all words before"]
    assert shown[0][3].startswith("1.000") and shown[1][3].startswith("1.1" if seeds == 1 else "1.099")
    assert all(("(" in row[3]) == (seeds > 1) for row in shown)


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_says_where_it_comes_from(path):
    content = json.loads(path.read_text())
    provenance = content.get("provenance", content)
    for key in ("command", "commit", "machine", "versions", "seed"):
        assert provenance[key] is not None, key
    runs = [run for run in content.get("runs", {}).values() if "error" not in run]
    for origin in (provenance, *runs, *(start for run in runs for start in run.get("earlier_starts", ()))):
        assert origin["dirty"] is False, "made by code that was not committed"


ON_RECORD = {name: study for name, study in studies.STUDIES.items() if jobs.on_record(name)}


@pytest.mark.parametrize("study", ON_RECORD)
def test_runs_on_record_have_the_settings_of_today_and_the_same_text(study):
    runs, wanted = jobs.on_record(study), ON_RECORD[study]()
    texts = {label: sha256_of_text(run) for label, run in runs.items()}
    for label, run in runs.items():
        assert run["identity"] == jobs.identity(wanted[label], texts[label]), "run it again"
        assert different(run, wanted[label]) <= UNIMPORTANT[run["models"][0]["model"]]
    assert len({*texts.values()}) == len({run["config"].get("fold") for run in runs.values()})


def sha256_of_text(run: dict) -> str:
    (found,) = (value for name, value in run["corpus"].items() if name.startswith("sha256_of_"))
    return found


def different(run: dict, job: jobs.Job) -> set[str]:
    """The settings in which the run differs from the job; those that are younger than the run do not count."""
    chosen = json.loads(json.dumps(jobs.settings(job)))
    if job.module == "research.closed_form":
        del chosen["method"]  # which counts for nothing there
    if run["config"].get("device") == run["machine"]["device"]:
        del chosen["device"]  # what `auto` takes there, by its name
    return {name for name, value in chosen.items() if run["config"].get(name, value) != value}


# `test` is read after training. Of the QRNN's settings the LSTM has its width alone, which the next test looks at.
UNIMPORTANT = {"qrnn": {"test"}, "lstm": {"test", "hidden", "mode"}}


BUILDERS = {"examples.translation": translation.build_model, "examples.sentiment": sentiment.build_model}


@pytest.mark.parametrize("study", ON_RECORD)
def test_models_on_record_have_the_width_of_today(study):
    wanted = ON_RECORD[study]()
    for label, run in jobs.on_record(study).items():
        (model,) = run["models"]
        build = BUILDERS.get(wanted[label].module, build_model)
        assert model["hidden"] == build(wanted[label].config, model["model"], 10).hidden


def test_example_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(blocks)], cwd=ROOT, check=True)
