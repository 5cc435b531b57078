"""The settings of the sentiment example and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from examples.sentiment.data import FOLDS
from lab.run import RunConfig
from lab.settings import Chosen, Count, Range, Words


@dataclass(frozen=True)
class Reading(Chosen):
    """Say what is read."""

    preset: Literal["paper", "mr", "demo"] = "paper"
    """The values that all other flags start from. Of a flag that is given twice the last counts.
    demo: generated sentences whose best possible accuracy is known; half a minute. --demo is short for it.
    mr: rt-polarity, single sentences in the folder --data; 10 minutes on 2 CPU cores.
    paper: IMDb as in the QRNN paper; for a GPU."""

    corpus: Literal["imdb", "rt-polarity", "synthetic"] = "imdb"
    """What to train on. imdb: whole reviews, downloaded or in the folder --data.
    rt-polarity: sentences, in the folder --data. synthetic: generated."""
    data: Path | None = None
    """Folder with the corpus: aclImdb as it was unpacked, or rt-polarity.pos and rt-polarity.neg."""
    fold: Annotated[int, Range(low=0, high=FOLDS - 1)] = 0
    """Which tenth of the reviews is set aside, 0 to 9. rt-polarity: it is the test split, the next is validation.
    imdb: it is the validation split."""
    vocabulary: Words | None = 30_000
    """How many different words to know, the most frequent ones; all others become <unk>. none: all of them."""
    glove: Path | None = None
    """Text file with ready-made word vectors, a word and its numbers on each line, as GloVe and fastText have.
    Training goes on from them. none: it starts from random ones."""
    batch_size: Count = 24
    """Reviews that a step reads, over all processes together."""


@dataclass(frozen=True)
class Config(RunConfig, Reading):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM to tell good reviews from bad ones, and compare them.

    A preset sets every value, each flag changes one. Results go to runs/NAME.

    Without a GPU, start with --demo (half a minute), then --preset mr (10 minutes).
    """

    prefix: ClassVar[str] = "sentiment-"
    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "glove"}


PRESETS = {
    # The paper's L2 holds for the word vectors too. To RMSprop it is all the gradient that an absent word has, to be
    # scaled up like any other: after 300 steps without the word its vector is gone.
    "paper": Config(layers=4, dropout=0.3, epochs=10, optimizer="rmsprop", lr=1e-3, weight_decay=4e-6),
    # The paper's models, but random vectors: with Adam, one-cycle and more dropout smaller models came to 75 % on
    # validation, with the paper's RMSprop and dropout to 73 %.
    "mr": Config(
        preset="mr",
        corpus="rt-polarity",
        vocabulary=10_000,
        layers=4,
        dropout=0.5,
        epochs=3,
        optimizer="adam",
        lr=1e-3,
        schedule="one-cycle",
        weight_decay=4e-6,
    ),
    "demo": Config(
        preset="demo",
        corpus="synthetic",
        vocabulary=None,
        embedding=32,
        hidden=24,
        layers=2,
        mode="ifo",  # counts: what it adds and what it keeps are two gates
        dropout=0.1,
        epochs=5,
        optimizer="rmsprop",
        lr=5e-3,
        schedule="one-cycle",
        weight_decay=4e-6,
    ),
}
