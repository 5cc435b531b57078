"""Make the tables of research/README.md from research/results/*.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, log
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.record import RESULTS, markdown, source, wide
from research import jobs, studies
from research.comparison import Compared, over_seeds
from research.record import finished_runs, load
from research.studies import NAMES

NAMED = 4  # of the runs that are missing
FIT = "training text, with dropout"
SIZES = {"hidden": "units", "sizes": "parameters, recurrent / all"}
TRIAL_FORMS = {"initialisation": "{}", "lr": "{:g}", "forget_bias": "{:g}", "dropout": "{:g}"}
SCORES = {"valid_perplexity": "validation perplexity", "test_perplexity": "test perplexity", "fit": FIT}


# --- the studies -----------------------------------------------------------------------------------------------------


def recorded(name: str, command: str, made: Callable[[DataFrame], str]) -> str:
    """Return what `made` makes of the runs in results/NAME.json, what is missing, and where they come from."""
    on_record, runs = jobs.on_record(name), finished_runs(name)
    wanted = studies.STUDIES[name]() if name in studies.STUDIES else {}
    lines = [f"{label} failed: {run['error']}." for label, run in on_record.items() if "error" in run]
    missing = [label for label in wanted if label not in on_record]
    if not on_record or missing:
        named = "; ".join(missing[:NAMED]) + f"; and {len(missing) - NAMED} more" * (len(missing) > NAMED)
        what = f": {named}. It is done by " if on_record else ": "
        lines.append(f"Not run yet{what}`{command} --data DIR`.")
    shown = [made(runs), *lines, study_source(name)] if len(runs) else lines
    return "\n\n".join(shown)


def study_source(name: str) -> str:
    """Return where the runs come from, from what they say themselves."""
    content = load(f"{name}.json")
    runs = [run for run in content["runs"].values() if "error" not in run]
    starts = [start for run in runs for start in (*run.get("earlier_starts", ()), run)]

    def all_of(parts: list[str]) -> str:
        return " and ".join(sorted(set(parts)))

    commits = all_of([start["commit"][:9] for start in starts])
    machines = [run["machine"] for run in runs]
    where = all_of([each["gpu"] or f"{each['cpu']}, {each['threads']} core a run" for each in machines])
    versions = all_of(["torch {torch}, Python {python}".format(**run["versions"]) for run in runs])
    return f"`research/results/{name}.json`: `{content['command']}`, commit {commits}, {where}, {versions}."


def study(runs: DataFrame, first: str, scores: tuple[str, ...] = ("valid_perplexity",), by_value: bool = False) -> str:
    """Return a row for each run; by value: the best one first."""
    runs = runs.sort_values("valid_perplexity") if by_value else runs
    shown = runs[["hidden", "sizes", *scores]].copy()
    shown[[*scores]] = shown[[*scores]].map("{:.1f}".format)
    return wide(shown.rename(columns=SIZES | SCORES), first)


def longer(runs: DataFrame) -> str:
    """Return a row for each run, a column for each epoch, and the fit to the training text in the last one."""
    curves = runs["curve"].map(lambda lines: [line["valid_perplexity"] for line in lines])
    shown = DataFrame(curves.to_list(), index=runs.index).rename(columns=lambda epoch: f"epoch {epoch + 1}")
    shown = shown.assign(fit=runs["fit"]).map("{:.1f}".format)
    shown.insert(0, "units", runs["hidden"])
    return wide(shown.rename(columns=SCORES), "model")


def trials(runs: DataFrame, settings: dict[str, str], score: str = "valid_perplexity", digits: str = "{:.2f}") -> str:
    """Return a row for each trial, a column for each model that has it, the best of each in bold.

    Args:
        runs: on record.
        settings: what differs between trials -> how a value of it is written.
        score: what a trial is judged by, on validation; lower is better.
        digits: how it is written.
    """
    scores = runs.pivot(index=[*settings], columns="model", values=score)
    title = score.replace("valid_", "validation ")
    names = [name for name in NAMES if name in scores]
    cells = {f"{NAMES[name]}, {title}": best_in_bold(scores[name], digits) for name in names}
    values = scores.index.to_frame(index=False)
    shown = DataFrame({name.replace("_", " "): values[name].map(form.format) for name, form in settings.items()})
    return markdown(shown.rename(columns={"lr": "learning rate"}).assign(**cells))


def best_in_bold(scores: Series, digits: str) -> list[str]:
    texts = ("" if pd.isna(score) else digits.format(score) for score in scores)
    best = scores == scores.min()
    return [f"**{text}**" if bold else text for text, bold in zip(texts, best, strict=True)]


def seeds(runs: DataFrame, names: dict[str, str] = NAMES, key: str = "model") -> str:
    """Return mean and standard deviation over the seeds, a row for each of the names."""
    rows = []
    for name, label in names.items():
        mine = runs[runs[key] == name]
        if len(mine):
            row = {"model": label, "seeds": len(mine)} | {
                shown: mine[column].iloc[0] for column, shown in SIZES.items()
            }
            rows.append(row | {shown: mean_and_deviation(mine[column]) for column, shown in SCORES.items()})
    return markdown(DataFrame(rows))


def mean_and_deviation(values: Series) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def first_kernel(runs: DataFrame) -> str:
    """Compare a first layer that sees one word with one that sees two, as in the QRNNs of `seeds`."""
    two = finished_runs("seeds").query("model == 'qrnn'")
    names = {"one": "QRNN, first layer k = 1", "two": "QRNN, k = 2 in both"}
    both = pd.concat([runs.assign(first="one"), two.assign(first="two")])
    shown = seeds(both, names, "first")
    gap = over_seeds(runs["test_perplexity"], two["test_perplexity"]).difference()
    return f"{shown}\n\nTest perplexity, k = 1 in the first layer minus k = 2: {gap}."


def initial(runs: DataFrame) -> str:
    """Return mean and standard deviation over the seeds, a row for each kind of model."""
    kinds = runs.index.str.replace(r", seed \d+", "", regex=True)
    return seeds(runs.assign(kind=kinds), {kind: kind for kind in kinds}, "kind")


def translation(runs: DataFrame) -> str:
    """Return a row for each model, with its settings, and the signatures of the scores."""
    settings = {"lr": "learning rate", "initialisation": "initial weights", "forget_bias": "forget bias"}
    scores = {"valid_perplexity": "validation perplexity", "bleu": "BLEU", "chrf": "chrF"}
    shown = runs[["hidden", "recurrent_parameters", *settings, "dropout", *scores]].copy()
    shown["recurrent_parameters"] = shown["recurrent_parameters"].map("{:,}".format)
    shown[[*scores]] = shown[[*scores]].map("{:.2f}".format)
    names = {"hidden": "units", "recurrent_parameters": "recurrent parameters"} | settings | scores
    first = runs.iloc[0]
    signatures = f"BLEU: {first['bleu_signature']}; chrF: {first['chrf_signature']}."
    return f"{wide(shown.rename(columns=names), 'model')}\n\n{signatures}"


def folds(runs: DataFrame) -> str:
    """Return a row for each fold, a column for each model."""
    shown = runs.assign(accuracy=[f"{test['accuracy']:.2f}" for test in runs["test"]])
    table = shown.pivot(index="fold", columns="model", values="accuracy").fillna("")[[*NAMES]]
    return wide(table.rename(columns=lambda name: f"{NAMES[name]}, test accuracy, %"), "fold")


# --- what is not a study ---------------------------------------------------------------------------------------------


def context() -> str:
    """Return both perplexities and their ratio for each number of words known; the last row is of the training text."""
    if not (RESULTS / "context.json").exists():
        return "Not measured yet: `python -m research.context --data DIR` does it."
    content = load("context.json")
    rows = []
    for words, pair in by_words(content).items():
        row = {"words known": words, "QRNN": f"{exp(pair.qrnn):.1f}", "LSTM": f"{exp(pair.lstm):.1f}"}
        interval = " ({:.3f} to {:.3f})".format(*map(exp, pair.interval)) if pair.interval else ""
        rows.append(row | {"QRNN / LSTM (95 % interval)": f"{exp(pair.gap):.3f}{interval}"})
    return f"{markdown(DataFrame(rows))}\n\n{source('context.json', content)}"


def by_words(content: dict[str, Any]) -> dict[str, Compared]:
    """Compare logarithms of perplexities over the seeds, for each number of words known, and of the training text."""
    models = content["models"]
    logs = DataFrame([[*model["perplexity"], model["training_text"]] for model in models]).map(log)
    logs.columns = [*spans(content["known"]), "training text, all words before"]
    is_qrnn = Series([model["model"] == "qrnn" for model in models])
    return {words: over_seeds(logs[words][is_qrnn], logs[words][~is_qrnn]) for words in logs}


def spans(known: list[int]) -> list[str]:
    """Return 1, 2, 3-4, 5-8 ...: what stands for 1, 2, 4, 8 ... words known."""
    return [str(most) if most < 3 else f"{most // 2 + 1}-{most}" for most in known]


ALL = tuple(SCORES)
STUDIES: dict[str, Callable[[DataFrame], str]] = {
    "seeds": seeds,
    "tuned": seeds,
    "forms": partial(study, first="mode, candidate", scores=ALL, by_value=True),
    "ablation": partial(study, first="what is changed", by_value=True),
    "longer": longer,
    "numerics": partial(study, first="pieces of T words", scores=ALL),
    "ptb_tuned": seeds,
    "ptb_averaged": seeds,
    "ptb_changes": partial(study, first="model", scores=ALL, by_value=True),
    "wikitext2_scaled": seeds,
    "first_kernel": first_kernel,
    "initial": initial,
    "candidates": partial(study, first="candidate", by_value=True),
    "language_models": partial(trials, settings=TRIAL_FORMS | {"weight_decay": "{:g}"}),
    "translators": partial(trials, settings=TRIAL_FORMS),
    "both_ways": partial(trials, settings=TRIAL_FORMS),
    "translation": translation,
    "readers": partial(trials, settings=TRIAL_FORMS, score="valid_loss", digits="{:.3f}"),
    "folds": folds,
    "ptb_quarter": partial(study, first="model", scores=("valid_perplexity", "fit"), by_value=True),
}
BLOCKS: dict[str, Callable[[], str]] = {
    **{name: partial(recorded, name, f"python -m research.studies {name}", made) for name, made in STUDIES.items()},
    "context": context,
}
