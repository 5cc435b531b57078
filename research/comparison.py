"""QRNN against LSTM: the two tables of all comparisons, won or lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pandas as pd
from pandas import DataFrame, Series
from scipy.stats import ttest_ind

from benchmarks.record import markdown
from research.record import finished_runs, load
from research.studies import NAMES


class Compared(NamedTuple):
    """What two models came to, a value for each seed."""

    qrnn: Series
    lstm: Series
    higher_is_better: bool = False

    @property
    def gap(self) -> float:
        return self.qrnn.mean() - self.lstm.mean()

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the gap by Welch's t-test over seeds; None with one seed."""
        if min(len(self.qrnn), len(self.lstm)) < 2:
            return None
        low, high = ttest_ind(self.qrnn, self.lstm, equal_var=False).confidence_interval()
        return low, high

    def difference(self) -> str:
        if self.interval is None:
            return f"{self.gap:+.2f}, one seed, no interval"
        return "{:+.2f} ({:+.2f} to {:+.2f})".format(self.gap, *self.interval)

    @property
    def winner(self) -> str | None:
        """Who is better, if the interval says so."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return None
        return "QRNN" if (self.gap > 0) == self.higher_is_better else "LSTM"

    def ahead(self) -> str:
        undecided = "one seed does not tell" if self.interval is None else "neither: 0 is in the interval"
        return self.winner or undecided


def compare(runs: DataFrame, score: str) -> Compared | None:
    """Return a score of the QRNNs and the LSTMs; None unless there are as many runs of one as of the other."""
    qrnn, lstm = (runs.loc[runs["model"] == name, score] for name in NAMES) if len(runs) else ((), ())
    return Compared(qrnn, lstm) if len(qrnn) == len(lstm) > 0 else None


def best_dense() -> Compared | None:
    """Return the best of the QRNNs with dense connections, and the best of the LSTMs."""
    runs = finished_runs("longer")
    dense = runs[runs["dense"].astype(bool)].sort_values("valid_perplexity").drop_duplicates("model")
    return compare(dense, "valid_perplexity")


def one_word_first() -> Compared | None:
    """Return the QRNNs whose first layer sees one word, and the LSTMs of `seeds`."""
    runs = [finished_runs("first_kernel"), finished_runs("seeds").query("model == 'lstm'")]
    return compare(pd.concat(runs), "test_perplexity")


def larger_candidates() -> Compared | None:
    """Return the QRNNs with tanh and the LSTMs whose candidates are larger at first."""
    runs = finished_runs("initial")
    return compare(runs[runs["activation"] == "tanh"] if len(runs) else runs, "test_perplexity")


def reviews() -> Compared:
    """Return the accuracies on the test reviews."""
    accuracies = {model["model"]: Series([model["test"]["accuracy"]]) for model in load("sentiment.json")["models"]}
    return Compared(**accuracies, higher_is_better=True)


def test_perplexities(study: str) -> Callable[[], Compared | None]:
    return lambda: compare(finished_runs(study), "test_perplexity")


COMPARISONS: dict[str, Callable[[], Compared | None]] = {
    "WikiText-2, sentences, perplexity": test_perplexities("seeds"),
    "WikiText-2, sentences, layer 1 with k = 1": one_word_first,
    "WikiText-2, sentences, larger initial weights": larger_candidates,
    "WikiText-2, sentences, both tuned": test_perplexities("tuned"),
    "WikiText-2, one stream, perplexity": test_perplexities("wikitext2"),
    "Penn Treebank, one stream, perplexity": test_perplexities("ptb"),
    "film reviews, accuracy in %": reviews,
}


ALL = COMPARISONS | {
    "WikiText-2, sentences, dense, validation perplexity": best_dense,
}


def compared(comparisons: dict[str, Callable[[], Compared | None]], verdict: bool) -> str:
    """A row for each comparison: the means over seeds and their difference; with a verdict, who is ahead."""
    rows = []
    for label, make in comparisons.items():
        if pair := make():
            scores = [pair.qrnn.mean(), pair.lstm.mean()]
            row = {"comparison": label} | dict(zip(NAMES.values(), map("{:.2f}".format, scores), strict=True))
            row |= {"QRNN - LSTM (95 % interval)": pair.difference()} | ({"ahead": pair.ahead()} if verdict else {})
            rows.append(row)
    return markdown(DataFrame(rows))


def verdict() -> str:
    """Who is better in which comparison, in a sentence."""
    pairs = {label: make() for label, make in ALL.items()}
    won = [f"the {pair.winner} ({label})" for label, pair in pairs.items() if pair and pair.winner]
    if not won:
        return "no interval leaves out zero, so none of these comparisons says that one of the two is better."
    return f"the interval says so for {', '.join(won)}, and in no other row."


BLOCKS: dict[str, Callable[[], str]] = {
    "comparison": partial(compared, ALL, verdict=True),
    "verdict": verdict,
    "readme comparison": partial(compared, COMPARISONS, verdict=False),
}
