"""The settings of the sentiment example and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from examples.sentiment.data import FOLDS
from lab.run import RunConfig
from lab.settings import check_range


@dataclass(frozen=True)
class Reading:
    """What is read, and by which models."""

    preset: Literal["paper", "mr", "demo"] = "paper"
    """Where all other flags start from.
    demo: generated sentences whose best possible accuracy is known; half a minute. --demo is short for it.
    mr: rt-polarity, give it by --data; 10 minutes on 2 CPU cores.
    paper: IMDb as in the QRNN paper; for a GPU."""

    models: tuple[Literal["qrnn", "lstm"], ...] = ("qrnn", "lstm")
    """Which models to train, in this order."""
    corpus: Literal["imdb", "rt-polarity", "synthetic"] = "imdb"
    """imdb: whole reviews, downloaded or from --data. rt-polarity: sentences, from --data. synthetic: generated."""
    data: Path | None = None
    """Folder with the corpus: aclImdb as it was unpacked, or rt-polarity.pos and rt-polarity.neg."""
    fold: int = 0
    """0 to 9. rt-polarity: the tenth that is test; the next is validation. imdb: the tenth of train that is validation.
    """
    vocabulary: int | None = 30_000
    """How many different words to know, the most frequent ones of train; others count as <unk>. None: all."""
    glove: Path | None = None
    """Text file with a word and its vector on each line, as GloVe's; training goes on from there. None: random ones."""
    batch_size: int = 24
    """Reviews a step, over all processes together."""

    embedding: int = 300
    """Width of the word vectors."""
    hidden: int = 256
    """Width of each QRNN layer; the LSTM's follows from it: as many recurrent parameters."""
    layers: int = 4
    """Recurrent layers of either model, each fed with the words and the outputs of all layers before it."""
    kernel_size: int = 2
    """QRNN: how many words each step sees, itself and those before it."""
    mode: Literal["f", "fo", "ifo"] = "fo"
    """QRNN: its gates: forget; forget and output; input, forget and output."""
    activation: Literal["softplus", "exp", "sigmoid", "relu", "tanh", "identity"] = "tanh"
    """QRNN: of the candidate."""
    dropout: float = 0.3
    """Dropout on the word vectors, between the recurrent layers, and before the classifier."""


@dataclass(frozen=True)
class Config(RunConfig, Reading):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM to tell good reviews from bad ones, in the same way, and compare them.

    A preset sets everything, each flag changes one thing. The comparison and all else goes to runs/NAME.
    """

    prefix: ClassVar[str] = "sentiment-"
    names: ClassVar[dict[str, str]] = {"qrnn": "QRNN", "lstm": "LSTM"}
    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "glove"}

    def check(self) -> None:
        """Raises InputError: a value out of range."""
        super().check()
        for name in ("batch_size", "embedding", "hidden", "layers", "kernel_size"):
            check_range(name, getattr(self, name), low=1)
        check_range("dropout", self.dropout, low=0, high=1)
        check_range("fold", self.fold, low=0, high=FOLDS - 1)
        if self.vocabulary is not None:
            check_range("vocabulary", self.vocabulary, low=3)  # <eos>, <unk> and a word


PRESETS = {
    # The paper's L2 holds for the word vectors too. To RMSprop it is all the gradient that an absent word has, to be
    # scaled up like any other: after 300 steps without the word its vector is gone.
    "paper": Config(epochs=10, optimizer="rmsprop", lr=1e-3, weight_decay=4e-6),
    # The paper's models, but random vectors: with Adam, one-cycle and more dropout smaller models came to 75 % on
    # validation, with the paper's RMSprop and dropout to 73 %.
    "mr": Config(
        preset="mr",
        corpus="rt-polarity",
        vocabulary=10_000,
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
