"""Compare QRNN and LSTM: the two tables of all comparisons, won or lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame, Series
from sacrebleu.metrics import BLEU
from scipy.stats import ttest_ind, ttest_rel

from benchmarks.gpu_tables import frame
from benchmarks.record import markdown
from research.record import finished_runs
from research.studies import NAMES

DRAWS = 1000  # of the test sentences


class Compared(NamedTuple):
    """Hold what two models came to.

    Attributes:
        qrnn, lstm: their scores.
        interval: of the difference, 95 %; None if there is one seed.
        over: what it is taken over: what else might have been drawn.
        higher_is_better: of the score.
    """

    qrnn: float
    lstm: float
    interval: tuple[float, float] | None
    over: str
    higher_is_better: bool = False

    @property
    def gap(self) -> float:
        return self.qrnn - self.lstm

    def difference(self) -> str:
        if self.interval is None:
            return f"{self.gap:+.2f}, no interval"
        return "{:+.2f} ({:+.2f} to {:+.2f})".format(self.gap, *self.interval)

    @property
    def winner(self) -> str | None:
        """Say who is better, if the interval does."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return None
        return "QRNN" if (self.gap > 0) == self.higher_is_better else "LSTM"

    def ahead(self) -> str:
        undecided = "one seed does not tell" if self.interval is None else "neither: 0 is in the interval"
        return self.winner or undecided


def over_seeds(qrnn: Series, lstm: Series) -> Compared:
    """Compare the means, by Welch's t-test; a value for each seed."""
    means = qrnn.mean(), lstm.mean()
    if min(len(qrnn), len(lstm)) == 1:
        return Compared(*means, None, "one seed")
    low, high = ttest_ind(qrnn, lstm, equal_var=False).confidence_interval()
    return Compared(*means, (low, high), f"{len(qrnn)} seeds")


def over_folds(qrnn: Series, lstm: Series) -> Compared:
    """Compare mean accuracies by the paired t-test; a value for each fold, in the same order."""
    low, high = ttest_rel(qrnn.to_numpy(), lstm.to_numpy()).confidence_interval()
    return Compared(qrnn.mean(), lstm.mean(), (low, high), f"{len(qrnn)} folds", higher_is_better=True)


def over_sentences(qrnn: Mapping[str, Any], lstm: Mapping[str, Any]) -> Compared:
    """Compare BLEU by the paired bootstrap (Koehn 2004): both models on the same draws of the test sentences."""
    rng = np.random.default_rng(0)
    counts = [np.array([line.split() for line in model["bleu_counts"]], dtype=int) for model in (qrnn, lstm)]  # (S, 10)
    sentences = len(counts[0])
    draws = rng.multinomial(sentences, np.full(sentences, 1 / sentences), size=DRAWS)  # how often each is drawn
    ours, theirs = ([bleu(line) for line in draws @ mine] for mine in counts)
    low, high = np.quantile(np.subtract(ours, theirs), (0.025, 0.975))
    scores = [bleu(mine.sum(axis=0)) for mine in counts]
    over = f"{sentences:,} sentences, one seed"
    return Compared(scores[0], scores[1], (low, high), over, higher_is_better=True)


def bleu(counts: Sequence[int]) -> float:
    """Return BLEU of sums of `bleu_counts`, as sacrebleu has it by default."""
    *ngrams, length, reference = map(int, counts)
    return BLEU.compute_bleu(ngrams[:4], ngrams[4:], length, reference, smooth_method="exp").score


def compare(runs: DataFrame, score: str) -> Compared | None:
    """Return a score of the QRNNs and the LSTMs; None unless there are as many runs of one as of the other."""
    qrnn, lstm = (runs.loc[runs["model"] == name, score] for name in NAMES) if len(runs) else ((), ())
    return over_seeds(qrnn, lstm) if len(qrnn) == len(lstm) > 0 else None


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


def paper_sizes() -> Compared | None:
    """Return the language models of the paper's size, the QRNN with the mean of its zoneout in evaluation."""
    rows = frame("bradbury")
    if not len(rows):
        return None
    chosen = rows[rows["zoneout_in_evaluation"].isna() | (rows["zoneout_in_evaluation"] == "its mean")]
    return compare(DataFrame([*chosen["result"]]), "test_perplexity")


def reviews() -> Compared | None:
    """Return the accuracies on the test reviews of the folds that both models have read."""
    runs = finished_runs("folds")
    if not len(runs):
        return None
    accuracies = runs.assign(accuracy=[test["accuracy"] for test in runs["test"]])
    both = accuracies.pivot(index="fold", columns="model", values="accuracy").dropna()
    return over_folds(both["qrnn"], both["lstm"]) if len(both) > 1 else None


def translations() -> Compared | None:
    """Compare the BLEU of the QRNN with that of the LSTM that is best on validation."""
    runs = finished_runs("translation")
    if not len(runs) or {*runs["model"]} != {*NAMES}:
        return None
    best = runs.sort_values("valid_perplexity").drop_duplicates("model").set_index("model")
    return over_sentences(dict(best.loc["qrnn"]), dict(best.loc["lstm"]))


def test_perplexities(study: str) -> Callable[[], Compared | None]:
    return lambda: compare(finished_runs(study), "test_perplexity")


COMPARISONS: dict[str, Callable[[], Compared | None]] = {
    "WikiText-2, sentences, both tuned": test_perplexities("tuned"),
    "WikiText-2, one stream, not tuned": test_perplexities("wikitext2_scaled"),
    "Penn Treebank, one stream, both tuned": test_perplexities("ptb_averaged"),
    "Penn Treebank, bradbury, zoneout in the QRNN alone": paper_sizes,
    "translation of Multi30k, BLEU, both tuned": translations,
    "film reviews, accuracy in %, both tuned": reviews,
}


OLDER = {  # less tuned
    "Penn Treebank, one stream, dropout 0.3": test_perplexities("ptb_tuned"),
    "WikiText-2, sentences, larger initial weights": larger_candidates,
    "WikiText-2, sentences, weights of nn.LSTM": test_perplexities("seeds"),
    "WikiText-2, sentences, weights of nn.LSTM, layer 1 with k = 1": one_word_first,
    "WikiText-2, sentences, dense, validation perplexity": best_dense,
}


def compared(comparisons: dict[str, Callable[[], Compared | None]], verdict: bool) -> str:
    """Return a row for each comparison: the means and their difference; with a verdict, who is ahead."""
    rows = []
    for label, make in comparisons.items():
        if pair := make():
            row = {"comparison": label} | dict(zip(NAMES.values(), map("{:.2f}".format, pair[:2]), strict=True))
            row |= {"QRNN - LSTM (95 % interval)": pair.difference()}
            rows.append(row | ({"interval over": pair.over, "ahead": pair.ahead()} if verdict else {}))
    return markdown(DataFrame(rows))


def verdict() -> str:
    """Say in a sentence who is better in which comparison."""
    pairs = {label: make() for label, make in COMPARISONS.items()}
    won = [f"the {pair.winner} ({label})" for label, pair in pairs.items() if pair and pair.winner]
    if not won:
        return "no interval leaves out zero, so none of these comparisons says that one of the two is better."
    return f"the interval says so for {', '.join(won)}, and in no other row."


BLOCKS: dict[str, Callable[[], str]] = {
    "comparison": partial(compared, COMPARISONS, verdict=True),
    "older comparison": partial(compared, OLDER, verdict=True),
    "verdict": verdict,
    "readme comparison": partial(compared, COMPARISONS, verdict=False),
}
